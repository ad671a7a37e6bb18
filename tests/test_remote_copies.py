"""Copies of remote model directories: hostile names, endless listings, changed copies."""

from __future__ import annotations

import os
import re
import tempfile
import urllib.error
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ask
from hostile.servers import KEYS, LINKS, web_server

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.storage import listing

MODEL = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The files of a model directory."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, text in MODEL.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, three levels deep so that ../../.. can be watched."""
    folder = tmp_path / "a/b/tmp"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    storage.local_copy.cache_clear()
    return folder


def files_of(folder: str | Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("link", LINKS)
def test_links_of_a_web_page(link: str, model: Path, tmp_path: Path) -> None:
    with web_server(model, [link]) as url:
        if LINKS[link]:
            with pytest.raises(InputError, match=re.escape(LINKS[link])) as refusal:
                storage.local_copy(url)
            assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
        else:
            assert files_of(storage.local_copy(url)) == MODEL
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_a_bucket(
    key: str, bucket: str, moto: tuple[object, str], model: Path, tmp_path: Path
) -> None:
    storage.upload(str(model), f"{bucket}/model")
    ask("PUT", f"{moto[1]}/bucket/{urllib.parse.quote(key, safe='').replace('%2F', '/')}", b"{}")
    for function in (storage.local_copy, storage.find_files):
        if KEYS[key]:
            with pytest.raises(InputError, match=KEYS[key]) as refusal:
                function(f"{bucket}/model")
            assert "\n" not in str(refusal.value)
        elif function is storage.local_copy:
            assert files_of(storage.local_copy(f"{bucket}/model")) == MODEL
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize(
    ("endless", "says"),
    [
        ("page", "expected a page that lists a folder"),
        ("folders", "expected at most 32 levels of folders, found more"),
        ("names", "expected at most 10,000 files, found more"),
    ],
)
def test_listings_that_never_end(
    endless: str, says: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_all: Callable[[str], object] = (
        storage.find_files if endless == "folders" else storage.local_copy
    )
    with web_server(model, [], endless) as url, pytest.raises(InputError, match=says):
        list_all(url)


def test_a_page_takes_time_in_proportion_to_its_length() -> None:
    for text in ("<a ", '<a href="', "<a href=", "<a x ", "<a" + " " * 50):
        list(listing._LINK.finditer(text * (1 << 19)))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.mkdir(mode=0o755), "the mode 755"),
        (lambda path: path.mkdir(mode=0o500), "the mode 500"),
        (lambda path: path.write_text(""), "a file"),
        (lambda path: path.symlink_to(path.parent.parent), "a symbolic link"),
        (lambda path: path.symlink_to("none"), "a symbolic link"),
        (lambda path: (path.mkdir(mode=0o700), os.chown(path, 4242, -1)), "one of user 4242"),
    ],
)
def test_a_temporary_folder_that_somebody_else_made(
    make: Callable[[Path], object], found: str, temporary: Path, model: Path
) -> None:
    path = temporary / f"sevenfold-{os.getuid()}"
    try:
        make(path)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    says = f"{path}: expected a folder of this user .* found {found}: remove it, or set TMPDIR"
    with pytest.raises(InputError, match=says):
        storage.user_temporary_folder()
    with web_server(model, []) as url, pytest.raises(InputError, match=says):
        storage.local_copy(url)


def test_copies_are_private_and_used_again(model: Path) -> None:
    old = os.umask(0)
    try:
        with web_server(model, []) as url:
            copy = Path(storage.local_copy(url))
            storage.local_copy.cache_clear()
            before = copy.stat().st_ino
            assert storage.local_copy(url) == str(copy) and copy.stat().st_ino == before
    finally:
        os.umask(old)
    for path in [copy.parent, copy, *copy.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def touch_again(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_text("stiehgw")
    os.utime(path, ns=(1, 1))


def replace_small(copy: Path) -> None:
    path = copy / "config.json"
    times = path.stat()
    path.write_text("[]")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        touch_again,
        replace_small,
        lambda copy: (copy / "tokenizer.json").unlink(),
        lambda copy: (copy / "modeling_x.py").write_text("import os"),
        lambda copy: (copy / "model.safetensors").write_text("more weights"),
        lambda copy: Path(f"{copy}.json").unlink(),
        lambda copy: Path(f"{copy}.json").write_text("{"),
    ],
)
def test_a_copy_that_changed_is_made_again(change: Callable[[Path], object], model: Path) -> None:
    with web_server(model, []) as url:
        copy = Path(storage.local_copy(url))
        change(copy)
        storage.local_copy.cache_clear()
        assert storage.local_copy(url) == str(copy) and files_of(copy) == MODEL


def test_files_that_do_not_fit_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4}))
    with (
        web_server(model, []) as url,
        pytest.raises(InputError, match=r"at most the 4 bytes that are free .* found "),
    ):
        storage.local_copy(url)
