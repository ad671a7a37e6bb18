"""The private folder for the sockets and logs of a local Ray.

Ray lets every user write to its own folder, its session folders and those of its sockets (mode
777). Another user could replace the object store's socket, or read the logs. So that folder lies in
one that only this user can enter.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator

import psutil

from sevenfold import storage
from sevenfold.errors import InputError

# The most bytes of a unix socket's path; 104 with the last zero byte on macOS, 108 on Linux.
MAX_SOCKET_PATH = 103
# The longest path of a socket within Ray's folder; the last number differs between nodes.
_LONGEST = "/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store.99"
_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_(\d+)")
# Sessions that have ended are kept, with their logs, for a user who asks why; not more than these.
KEPT_SESSIONS = 3


def ray_folder() -> str:
    """Returns the folder for a local Ray, within a folder of mode 700 of this user.

    It is in $RAY_TMPDIR if that is set, else in the temporary folder. Of the sessions there that
    have ended, the oldest are removed.

    Raises:
        InputError: Another user has made the folder, others can enter it, or its path is too long.
    """
    configured = os.environ.get("RAY_TMPDIR")
    folder = storage.user_folder(configured or tempfile.gettempdir())
    if not configured and _is_too_long(folder):
        folder = storage.user_folder("/tmp")  # noqa: S108 (checked below)
    if _is_too_long(folder):
        raise InputError(
            f"RAY_TMPDIR={configured}: expected a path of at most "
            f"{MAX_SOCKET_PATH - len(folder.removeprefix(str(configured)) + _LONGEST)} bytes, for "
            "the paths of Ray's sockets are limited: set a shorter one"
        )
    storage.require_private(folder)
    ray = os.path.join(folder, "ray")
    _remove_ended_sessions(ray)
    return ray


@contextlib.contextmanager
def default_ray_folder() -> Iterator[None]:
    """Makes `ray_folder` the one that Ray uses by default in this process, and in its children."""
    configured = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = os.path.dirname(ray_folder())
    try:
        os.makedirs(os.path.join(os.environ["RAY_TMPDIR"], "ray"), exist_ok=True)
        yield
    finally:
        if configured is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = configured


def _is_too_long(folder: str) -> bool:
    return len(os.fsencode(folder + _LONGEST)) > MAX_SOCKET_PATH


def _remove_ended_sessions(ray: str) -> None:
    """Removes the folders of sessions whose process has ended, apart from the newest ones."""
    names = os.listdir(ray) if os.path.isdir(ray) else []
    ended = []
    for name in names:
        match = _SESSION.fullmatch(name)
        if match and not psutil.pid_exists(int(match[1])):
            ended.append(name)
    # the names begin with the time
    for name in sorted(ended, reverse=True)[KEPT_SESSIONS:]:
        shutil.rmtree(os.path.join(ray, name), ignore_errors=True)
