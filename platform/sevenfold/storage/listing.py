"""Lists folders behind URLs, whose names come from a server that may be hostile.

All names of remote files pass `plain_name`, whatever the storage is, and all listings are bounded.
"""

from __future__ import annotations

import html
import re
import time
import unicodedata
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import unquote

import fsspec

from sevenfold.errors import InputError
from sevenfold.storage.filesystem import filesystem, is_http
from sevenfold.storage.retry import with_retries

MAX_FILES = 1_000_000  # files and folders of one listing
MAX_DEPTH = 32  # folders within folders
MAX_PAGE_BYTES = 8 << 20  # of a web page that lists a folder
MAX_PAGE_SECONDS = 60.0
_MAX_PART_BYTES = 255  # the longest name of a file on a local disk
# Neither part matches "<", so that the time is linear in the length of the page.
_LINK = re.compile(r"""<a\s(?:[^<>]*?\s)?href\s*=\s*["']([^"'<>]+)""", re.IGNORECASE)


def plain_name(name: Any, where: str) -> str:
    """Returns a name that was read from a listing or a file, after a check.

    Args:
        name: A name relative to a folder; its parts are separated by "/".
        where: The listing or file that the name is from, for the error.

    Raises:
        InputError: The name could mean something outside the folder, or is no name of a file.
    """
    reason = _name_fault(name)
    if reason:
        raise InputError(
            f"{where}: expected names of files inside the folder, found {str(name)[:100]!r}, "
            f"{reason}"
        )
    return str(name)


def _name_fault(name: object) -> str:
    """Returns what is wrong with the name of a file inside a folder, or ""."""
    if not isinstance(name, str):
        return "which is not a string"
    parts = name.split("/")
    if name.startswith("/"):
        return "an absolute path"
    if not all(part.strip() for part in parts) or {".", ".."} & set(parts):
        return "with a part that is empty, . or .."
    is_plain = name.isascii() and name.isprintable()  # nearly all are, in listings of any length
    if "\\" in name or not (
        is_plain or all(unicodedata.category(c) not in ("Cc", "Cs") for c in name)
    ):
        return "with a backslash or control character"
    if max(len(part.encode()) for part in parts) > _MAX_PART_BYTES:
        return f"with a part of more than {_MAX_PART_BYTES} bytes"
    return ""


def remote_files(
    url: str, enter: Callable[[str], bool] = lambda name: True, most: int = MAX_FILES
) -> dict[str, dict[str, Any]]:
    """Returns the files in a remote folder at any depth.

    Args:
        url: The folder.
        enter: Whether to list a folder inside it, by its relative name.
        most: The maximum number of files and folders.

    Returns:
        fsspec's info about each file by its name relative to the folder.

    Raises:
        InputError: A name means something outside the folder, or there are too many names.
        RunError: The storage keeps failing.
    """
    fs, root = filesystem(url)
    files: dict[str, dict[str, Any]] = {}
    folders, seen = [""], 0
    while folders:
        folder = folders.pop()
        for name, info in _entries(fs, url, root, folder):
            seen += 1
            if seen > most:
                raise InputError(f"{url}: expected at most {most:,} files, found more")
            if info["type"] == "directory":
                if enter(name):
                    if name.count("/") >= MAX_DEPTH:
                        raise InputError(
                            f"{url}: expected at most {MAX_DEPTH} levels of folders, found more: "
                            f"{name[:100]}"
                        )
                    folders.append(name)
            elif name in files:
                raise InputError(f"{url}: expected each file once, found {name!r} twice")
            else:
                files[name] = info
    return dict(sorted(files.items()))


def _entries(
    fs: fsspec.AbstractFileSystem, url: str, root: str, folder: str
) -> list[tuple[str, dict[str, Any]]]:
    """Returns the relative names in one folder, with fsspec's info about each.

    Args:
        fs: The filesystem.
        url: The listed folder, for messages.
        root: Its path within the filesystem.
        folder: A folder inside it, relative; "" for itself.
    """
    start = f"{root.rstrip('/')}/"
    path = f"{start}{folder}".rstrip("/")
    if is_http(url):
        read = with_retries(url, "listed", lambda: _links(fs, f"{path}/"))
        infos: list[dict[str, Any]] = [
            {"name": name, "size": None, "type": "directory" if name.endswith("/") else "file"}
            for name in read
        ]
    else:
        infos = with_retries(
            url, "listed", lambda: cast(list[dict[str, Any]], fs.ls(path, detail=True))
        )
    entries = []
    for info in infos:
        listed = info["name"]
        if listed.rstrip("/") == path:  # of a file, or of the folder itself
            if info["type"] == "directory":
                continue
            return []
        # a name outside the folder is checked, and refused, as a whole
        name = listed[len(start) :] if listed.startswith(start) else f"/{listed}"
        if info["type"] == "directory":
            name = name.removesuffix("/")
        # a server decodes the names of a listing when it is asked for them
        entries.append((plain_name(unquote(name) if is_http(url) else name, url), info))
    return entries


def _links(fs: fsspec.AbstractFileSystem, url: str) -> list[str]:
    """Returns the links of a web page that lists a folder to what is below it, as URLs.

    As in fsspec's own listing, which reads pages of any length, links to other places are left out:
    pages have some to the folder above, to their own order, and to other sites.
    """
    end = time.monotonic() + MAX_PAGE_SECONDS
    page = b""
    with fs.open(url, "rb", block_size=0) as stream:
        while chunk := stream.read(1 << 20):
            page += chunk
            if len(page) > MAX_PAGE_BYTES or time.monotonic() > end:
                raise InputError(
                    f"{url}: expected a page that lists a folder, of at most "
                    f"{MAX_PAGE_BYTES >> 20} MiB and {MAX_PAGE_SECONDS:.0f} s, found more"
                )
    scheme, _, rest = url.partition("://")
    links: dict[str, None] = {}
    for match in _LINK.finditer(page.decode(errors="replace")):
        link = html.unescape(match[1])
        if link in (".", "./", "..", "../") or link.startswith(("?", "#")):
            continue
        if link.startswith("/"):
            link = f"{scheme}://{rest.partition('/')[0]}{link}"
        if not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", link):
            links[url + link] = None
        elif link.startswith(url):
            links[link] = None
    links.pop(url, None)
    return list(links)
