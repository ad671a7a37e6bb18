"""The folder of a local Ray: no other user can enter it, and it does not grow."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sevenfold import storage
from sevenfold.cluster import temp_folder
from sevenfold.errors import InputError

OTHER_USER = 65534
USER = f"sevenfold-{os.getuid()}"


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in $RAY_TMPDIR; its path is short enough for the paths of sockets."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    return folder


def _link(path: Path) -> None:
    path.with_name("elsewhere").mkdir(0o700)
    path.symlink_to(path.with_name("elsewhere"))


def _other_user(path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can make the folder of another user")
    path.mkdir(0o700)
    os.chown(path, OTHER_USER, OTHER_USER)


TAKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "readable by all": (lambda path: path.mkdir(0o755), "found the mode 755"),
    "the group's too": (lambda path: path.mkdir(0o770), "found the mode 770"),
    "only to pass through": (lambda path: path.mkdir(0o711), "found the mode 711"),
    "a link": (_link, "found a symbolic link"),
    "a file": (lambda path: path.touch(), "found a file"),
    "another user's": (_other_user, f"found one of user {OTHER_USER}"),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_a_folder_that_others_can_enter_is_refused(taken: str, parent: Path) -> None:
    make, found = TAKEN[taken]
    before = os.umask(0)
    try:
        make(parent / USER)
    finally:
        os.umask(before)
    with pytest.raises(InputError, match=f"mode 700, .*{found}: remove it"):
        temp_folder.ray_folder()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_folder_is_private_under_any_umask(umask: int, parent: Path) -> None:
    before = os.umask(umask)
    try:
        folder = Path(temp_folder.ray_folder())
        assert Path(temp_folder.ray_folder()) == folder
    finally:
        os.umask(before)
    assert folder.parent == parent / USER
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_long_path_leaves_room_for_a_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    longest = "a" * 80
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / longest))
    with pytest.raises(InputError, match="expected a path of at most"):
        temp_folder.ray_folder()
    # a long TMPDIR was not meant for Ray
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / longest))
    checked: list[str] = []
    monkeypatch.setattr(storage, "require_private", checked.append)
    monkeypatch.setattr(temp_folder, "_remove_ended_sessions", checked.append)
    assert temp_folder.ray_folder() == f"/tmp/{USER}/ray"
    assert checked[0] == f"/tmp/{USER}"


def test_the_longest_path_that_is_accepted_is_one_of_a_socket(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = temp_folder.MAX_SOCKET_PATH - len(f"{parent}//{USER}{temp_folder._LONGEST}")
    monkeypatch.setenv("RAY_TMPDIR", str(parent / ("a" * room)))
    folder = temp_folder.ray_folder()
    path = Path(f"{folder}{temp_folder._LONGEST.removeprefix('/ray')}")
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
    monkeypatch.setenv("RAY_TMPDIR", str(parent / ("a" * (room + 1))))
    with pytest.raises(InputError, match="at most"):
        temp_folder.ray_folder()


def test_it_is_the_default_of_ray_for_a_while_only(parent: Path) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    folder = temp_folder.ray_folder()
    for _ in range(2):
        with temp_folder.default_ray_folder():
            assert get_default_ray_temp_dir() == folder
        assert os.environ["RAY_TMPDIR"] == str(parent)


def test_old_sessions_that_have_ended_are_removed(parent: Path) -> None:
    ray = Path(temp_folder.ray_folder())
    ended = subprocess.Popen(["true"])
    ended.wait()
    sessions = [f"session_2026-01-0{i}_00-00-00_123456_{ended.pid}" for i in range(1, 10)]
    running = f"session_2025-01-01_00-00-00_123456_{os.getpid()}"
    for name in (*sessions, running, "notes"):
        (ray / name / "logs").mkdir(parents=True)
    (ray / "session_latest").symlink_to(ray / sessions[-1])
    temp_folder.ray_folder()
    kept = {*sessions[-temp_folder.KEPT_SESSIONS :], running, "notes", "session_latest"}
    assert set(os.listdir(ray)) == kept


_LOCAL_RAY = """
import os, ray
os.umask(0)
from sevenfold.cluster import connect
connect.connect()
ray.get(ray.put(bytes(10**6)))
input()
"""


@pytest.mark.slow
def test_no_other_user_reaches_the_sockets_logs_and_objects_of_a_local_ray(parent: Path) -> None:
    parent.chmod(0o777)
    process = subprocess.Popen(
        [sys.executable, "-c", _LOCAL_RAY], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        sockets: set[str] = set()
        while not {"plasma_store", "raylet"} <= sockets:
            assert process.poll() is None
            sockets = {p.name for p in parent.glob("*/ray/session_2*/sockets/*") if p.is_socket()}
        assert os.listdir(parent) == [USER]
        assert stat.S_IMODE((parent / USER).stat().st_mode) == 0o700
        for store in Path("/dev/shm").glob("plasma*"):
            assert not store.stat().st_mode & 0o077, store
    finally:
        process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
