"""Whole folders: uploads, and folders that replace others."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat as stat_module
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil

from sevenfold.errors import InputError
from sevenfold.storage.checksums import CHECKSUMS
from sevenfold.storage.copies import user_temporary_folder
from sevenfold.storage.files import find_files, remove
from sevenfold.storage.filesystem import filesystem, stat
from sevenfold.storage.paths import is_url, join
from sevenfold.storage.retry import with_retries


def upload(folder: str, to: str) -> None:
    """Copies a local folder to a path or URL.

    JSON files, which name the files next to them, are copied last, and of these the checksums.
    """
    fs, root = filesystem(to)
    paths = [p for p in Path(folder).rglob("*") if p.is_file()]
    for path in sorted(paths, key=lambda p: (p.suffix == ".json", p.name == CHECKSUMS, p)):
        target = f"{root}/{path.relative_to(folder).as_posix()}"
        parent = target.rsplit("/", 1)[0]
        with_retries(to, "created", functools.partial(fs.makedirs, parent, exist_ok=True))
        with_retries(to, "written", functools.partial(fs.put_file, str(path), target))


@contextlib.contextmanager
def new_folder(path: str, replaced: re.Pattern[str] | None = None) -> Iterator[str]:
    """Provides a local temporary folder that is moved to `path` when the block ends.

    On a local disk it is moved by one rename; to a URL it is uploaded file by file. If the block
    raises, what is at `path` stays as it is. If several processes write to the same path, each has
    its own temporary folder, and the one that ends last determines the result.

    Args:
        path: The folder, or a link to it.
        replaced: Which files of an earlier folder at `path` are removed, by their relative paths.
            New files replace those of the same name, and all other files stay. None: there must
            be no folder at `path`, or an empty one.

    Yields:
        The folder to write to.

    Raises:
        InputError: There is a file at `path`; or there is a folder with files in it and `replaced`
            is None; or the storage refuses access.
        RunError: The storage keeps failing.
    """
    if stat(path).get("type") == "file":
        raise InputError(f"{path}: expected a folder, found a file: choose another path")
    if is_url(path):
        with tempfile.TemporaryDirectory() as temporary:
            yield temporary
            _upload_over(temporary, path, replaced)
        return
    path = os.path.realpath(path)
    with temporary_folder_beside(path) as temporary:
        yield temporary
        _set_modes(temporary)
        digest = hashlib.sha256(path.encode()).hexdigest()[:24]
        with filelock.FileLock(os.path.join(user_temporary_folder(), f"{digest}.lock")):
            _move_into_place(temporary, path, replaced)


def _set_modes(folder: str) -> None:
    """Gives all files and folders in a new folder the modes of files that this process creates.

    safetensors writes files that only their owner can read, and copies keep the modes of originals.
    The folder's own mode tells the umask, which could be read only by changing it for a moment.
    """
    mode = stat_module.S_IMODE(os.stat(folder).st_mode)
    for parent, subfolders, files in os.walk(folder):
        for names, wanted in ((subfolders, mode), (files, mode & 0o666)):
            for path in (os.path.join(parent, name) for name in names):
                if not os.path.islink(path):
                    os.chmod(path, wanted)


def _upload_over(folder: str, url: str, replaced: re.Pattern[str] | None) -> None:
    """Uploads a folder to a URL, then removes the earlier files there that it replaces."""
    earlier = find_files(url)
    if replaced is None and earlier:
        raise _not_empty_error(url)
    upload(folder, url)
    for name in earlier:
        is_replaced = replaced is not None and replaced.fullmatch(name)
        if is_replaced and not os.path.exists(os.path.join(folder, name)):
            remove(join(url, name))


def _not_empty_error(path: str) -> InputError:
    return InputError(
        f"{path}: expected a new or empty folder, found one with files in it: choose another path"
    )


@contextlib.contextmanager
def temporary_folder_beside(path: str) -> Iterator[str]:
    """Provides a temporary folder next to `path`, on the same disk, and removes it at the end.

    Temporary folders that killed processes of this machine left there are removed first.
    """
    for leftover in _leftovers(path, "unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = _temporary_path(path, "unfinished")
    os.makedirs(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_path(path: str, purpose: str) -> str:
    """Returns a new hidden path next to `path` that names this host and process, and a purpose."""
    parent, base = os.path.split(path)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    return os.path.join(parent, f".{base}.{owner}-{secrets.token_hex(4)}.{purpose}")


def _leftovers(path: str, purpose: str) -> list[str]:
    """Returns the `_temporary_path`s of processes of this machine that have ended."""
    parent, base = os.path.split(path)
    pattern = re.compile(
        rf"\.{re.escape(base)}\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{8}}\.{purpose}"
    )
    names = os.listdir(parent) if os.path.isdir(parent) else []
    matches = [pattern.fullmatch(name) for name in names]
    return [os.path.join(parent, m[0]) for m in matches if m and not psutil.pid_exists(int(m[1]))]


def _move_into_place(temporary: str, path: str, replaced: re.Pattern[str] | None) -> None:
    """Renames a folder to `path`.

    An earlier folder there is moved away first; then its files that are to stay are moved back.

    Args:
        temporary: The folder.
        path: Where it is moved to.
        replaced: As in `new_folder`.
    """
    # A process may have been killed between the two renames below: its files are restored now.
    earlier = _leftovers(path, "replaced")
    while True:
        try:
            os.rename(temporary, path)  # succeeds if there is nothing, or an empty folder
            break
        except OSError:
            if not os.path.isdir(path):
                raise
        if replaced is None:
            raise _not_empty_error(path)
        earlier.append(_temporary_path(path, "replaced"))
        with contextlib.suppress(FileNotFoundError):  # another process has moved it away
            os.rename(path, earlier[-1])
    for folder in earlier:
        _restore_files(folder, path, replaced)
        shutil.rmtree(folder, ignore_errors=True)


def _restore_files(earlier: str, path: str, replaced: re.Pattern[str] | None) -> None:
    """Moves files of an earlier folder to `path`, except those that are replaced or exist there."""
    for folder, subfolders, files in os.walk(earlier):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *links]:
            source = os.path.join(folder, name)
            relative = os.path.relpath(source, earlier)
            target = os.path.join(path, relative)
            if os.path.lexists(target):
                continue
            if replaced and replaced.fullmatch(relative.replace(os.sep, "/")):
                continue
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.rename(source, target)
