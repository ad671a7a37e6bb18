"""Operations on files and folders, local or at a URL: list, read, write, copy, remove."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import fsspec

from sevenfold.errors import InputError, first_line
from sevenfold.storage.filesystem import VERSION_KEYS, filesystem, is_http, is_listing, stat
from sevenfold.storage.listing import plain_name, remote_files
from sevenfold.storage.paths import is_url
from sevenfold.storage.reader import Reader
from sevenfold.storage.retry import T, with_retries

# What a user can do about a damaged file that a run needs.
DAMAGED_HINT = "restore the file from a copy"


class InputFile(NamedTuple):
    """A file that was found, with what its listing says about it.

    Attributes:
        path: The path or URL.
        size: The size in bytes; None if the storage does not say it.
        version: What changes when the file is written again: the time of that, or a store's tag; ""
            if the storage reports nothing of the kind.
    """

    path: str
    size: int | None
    version: str


class InputListing(NamedTuple):
    """The files that a path stands for.

    Attributes:
        files: The files to read, sorted by their paths.
        names: Of a folder, their names relative to it; else ().
        unread: The relative names of the other files in the folder.
    """

    files: list[InputFile]
    names: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


class NoFilesError(InputError):
    """There is no file to read.

    Attributes:
        unread: The relative names of other files in the folder.
    """

    def __init__(self, message: str, unread: tuple[str, ...] = ()):
        super().__init__(message)
        self.unread = unread


def input_files(path: str, suffixes: tuple[str, ...]) -> list[InputFile]:
    """Returns the files that a path or URL of a file, folder or glob stands for; see `list_input`.

    Args:
        path: The path or URL.
        suffixes: The suffixes of the files to return from a folder.
    """
    return list_input(path, suffixes).files


def list_input(
    path: str, suffixes: tuple[str, ...], is_read: Callable[[str], bool] | None = None
) -> InputListing:
    """Lists the files that a path or URL of a file, folder or glob stands for.

    Files in object stores are listed, and not looked up one by one.

    Args:
        path: The path or URL.
        suffixes: The suffixes of the files to read in a folder. It is searched at any depth; files
            and folders whose names begin with "." or "_" are left out.
        is_read: Instead of the suffixes: whether a file of the folder is read, by its name.

    Raises:
        InputError: There is nothing at the path, the folder contains no such file, or the URL is a
            folder or glob over HTTP.
        RunError: The storage keeps failing.
    """
    names: dict[str, str] = {}  # relative names, by the names in `infos`
    unread: list[str] = []
    fs, root = filesystem(path)
    info = stat(path)
    if is_http(path) and is_listing(path, info, suffixes):
        raise InputError(
            f"{path}: expected the URL of one file, found a folder or glob, which cannot be listed "
            "over HTTP"
        )
    infos: dict[str, dict[str, Any]] = {}
    expected = "a file or folder"
    if info.get("type") in ("file", "other"):  # a FIFO or device is refused when it is opened
        infos, expected = {root: info}, "a file"
    elif info.get("type") == "directory":
        hidden = re.compile(r"(^|/)[._]")
        for name, about in _find(path).items():
            fits = is_read(name) if is_read else name.lower().endswith(suffixes)
            if fits and not hidden.search(name):
                full = f"{root.rstrip('/')}/{name}"
                names[full], infos[full] = name, about
            else:
                unread.append(name)
        expected = f"files ({', '.join('*' + s for s in suffixes)}) in this folder"
    elif not is_http(path) and any(c in root for c in "*?["):
        infos, expected = _glob(fs, path, root), "a file that matches"
    if not infos:
        raise NoFilesError(f"{path}: expected {expected}, found none", tuple(unread))
    relative = tuple(names[name] for name in sorted(names))
    return InputListing(_input_files(fs, path, info, infos), relative, tuple(unread))


def _input_files(
    fs: fsspec.AbstractFileSystem,
    path: str,
    info: dict[str, Any],
    infos: dict[str, dict[str, Any]],
) -> list[InputFile]:
    """Returns the listed files, sorted.

    Args:
        fs: The filesystem.
        path: The path of the file, folder or glob.
        info: fsspec's info about it.
        infos: The same about each file, by its name in the filesystem.
    """
    if is_http(path):
        return [InputFile(path, info["size"], _version(info))]
    if not is_url(path):
        # a link to nothing is refused when it is opened
        sizes = {name: os.path.getsize(name) if os.path.exists(name) else None for name in infos}
        return [InputFile(name, sizes[name], version(name)) for name in sorted(infos)]
    return [
        InputFile(fs.unstrip_protocol(name), about["size"], _version(about))
        for name, about in sorted(infos.items())
    ]


def _glob(fs: fsspec.AbstractFileSystem, path: str, root: str) -> dict[str, dict[str, Any]]:
    """Returns the files that match a glob, with fsspec's info about each.

    Args:
        fs: The filesystem.
        path: The glob, as the user gave it.
        root: The glob within the filesystem.
    """
    # huggingface_hub's filesystem raises errors anyway, and does not know the setting
    strict = {} if path.startswith("hf://") else {"on_error": "raise"}
    matches = with_retries(path, "listed", lambda: fs.glob(root, detail=True, **strict))
    if is_url(path):
        for name in matches:
            plain_name(name.lstrip("/"), path)
    return {
        name: info
        for name, info in matches.items()
        if info["type"] == "file" or (info["type"] == "other" and not fs.isdir(name))
    }


def exists(path: str) -> bool:
    """Returns whether there is a file or folder."""
    return bool(stat(path))


def size(path: str) -> int:
    """Returns the size of a file in bytes. Raises InputError if there is none."""
    info = stat(path)
    if info and info["size"] is not None:
        return int(info["size"])
    with open_read(path) as f:
        return f.size


def version(path: str) -> str:
    """Returns what changes when a file is written again: the time of that, or a store's tag.

    It is "" if there is no file, or if its storage reports nothing of the kind.
    """
    if not is_url(path):
        return str(os.stat(path).st_mtime_ns) if os.path.exists(path) else ""
    return _version(stat(path))


def _version(info: dict[str, Any]) -> str:
    """Returns what fsspec's info about a file says of its version; see `version`."""
    return next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")


def listdir(path: str) -> list[str]:
    """Returns the names in a folder, sorted; [] if there is no folder."""
    fs, root = filesystem(path)
    if stat(path).get("type") != "directory":
        return []
    paths = with_retries(path, "listed", lambda: fs.ls(root, detail=False))
    names = sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in paths)
    return [plain_name(name, path) for name in names] if is_url(path) else names


def find_files(path: str) -> list[str]:
    """Returns the files in a folder at any depth, relative to it; [] if there is no folder."""
    return list(_find(path)) if exists(path) else []


def _find(path: str) -> dict[str, dict[str, Any]]:
    """Returns the files in a folder at any depth.

    Returns:
        fsspec's info about each by its relative name, sorted; of local files it is empty.
    """
    if is_url(path):
        return remote_files(path)
    fs, root = filesystem(path)
    paths = with_retries(path, "listed", lambda: fs.find(root, on_error="raise"))
    return {name: {} for name in sorted(p[len(root) :].lstrip("/") for p in paths)}


def open_read(path: str) -> Reader:
    """Opens a file for reading bytes.

    Raises:
        InputError: There is no file at the path, or access is refused.
        RunError: The storage keeps failing. All reads raise it too.
    """
    return Reader(path)


def makedirs(path: str) -> None:
    """Creates a folder and its parents, if they do not exist."""
    fs, root = filesystem(path)
    with_retries(path, "created", lambda: fs.makedirs(root, exist_ok=True))


def remove(path: str) -> None:
    """Removes a file, or a folder with everything in it, if it exists."""
    fs, root = filesystem(path)
    if stat(path):
        with_retries(path, "removed", lambda: fs.rm(root, recursive=True))


def remove_empty(path: str) -> None:
    """Removes a local folder if it is empty.

    At a URL it does nothing: object stores have no empty folders, because their folders are only
    prefixes of names.
    """
    if not is_url(path):
        with contextlib.suppress(OSError):  # not empty, or already removed
            os.rmdir(path)


def write(path: str, data: bytes | str) -> None:
    """Writes a file atomically.

    On a local disk a temporary file is renamed; on an object store a single put is atomic.
    """
    content = data.encode() if isinstance(data, str) else data
    makedirs(path.rsplit("/", 1)[0])
    fs, root = filesystem(path)

    def write_once() -> None:
        if is_url(path):
            fs.pipe_file(root, content)
        else:
            _replace(path, content)

    with_retries(path, "written", write_once)


def _replace(path: str, content: bytes) -> None:
    """Writes a local file by renaming a temporary file to it."""
    # random, because threads of one process may write the same file
    temporary = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def copy(path: str, to: str) -> None:
    """Copies a file that will not be changed any more.

    On one local disk the copy is a hard link, so both names share the same content.
    """
    makedirs(to.rsplit("/", 1)[0])
    if is_url(path):
        fs, root = filesystem(path)
        with_retries(path, "copied", lambda: fs.cp_file(root, filesystem(to)[1]))
        return
    try:
        os.link(path, to)
    except OSError:  # on another disk, or on a filesystem without hard links
        shutil.copyfile(path, to)


def read_text(path: str) -> str:
    """Returns the content of a text file in UTF-8.

    Raises:
        InputError: There is no such file, or it is not UTF-8.
        RunError: The storage keeps failing.
    """
    with open_read(path) as f:
        content = f.read()
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise InputError(
            f"{path}: expected UTF-8 text, found an invalid byte at offset {e.start}"
        ) from None


def read_json(
    path: str, parse: Callable[[Any], T] = lambda tree: tree, hint: str = DAMAGED_HINT
) -> T:
    """Returns what a JSON file holds.

    Args:
        path: The file.
        parse: Makes the result of the file's content. Where it fails because the content lacks a
            key or has another type, the file is damaged.
        hint: What a user can do about a damaged file.

    Raises:
        InputError: There is no such file, or it is damaged.
        RunError: The storage keeps failing.
    """
    text = read_text(path)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as e:
        problem = f"not valid JSON ({e})" if text.strip() else "the file is empty"
        raise InputError(f"{path}: damaged: {problem}; {hint}") from None
    try:
        return parse(tree)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        reason = f"the key {e} is missing" if isinstance(e, KeyError) else first_line(e)
        raise InputError(
            f"{path}: damaged: found {_describe_json(tree)}: {reason}; {hint}"
        ) from None


def json_object(tree: Any) -> dict[str, Any]:
    """Returns the tree of a JSON file that holds an object, for `read_json`."""
    if not isinstance(tree, dict):
        raise TypeError("expected an object (keys and values)")
    return tree


def _describe_json(tree: Any) -> str:
    """Returns what kind of JSON this is, for messages."""
    if isinstance(tree, dict):
        keys = ", ".join(map(repr, list(tree)[:4])) or "no keys"
        return f"an object with {keys}{', ...' if len(tree) > 4 else ''}"
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(tree), "a number")


def write_json(path: str, tree: Any) -> None:
    """Writes a tree of dicts and lists to a JSON file, as `to_json` does."""
    write(path, to_json(tree, indent=1))


def to_json(tree: Any, indent: int | None = None) -> str:
    """Returns JSON that every tool reads: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(tree), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
