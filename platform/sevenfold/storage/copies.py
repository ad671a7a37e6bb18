"""Private copies of remote model directories on this machine."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import stat as file_modes
import tempfile
from typing import Any

import filelock

from sevenfold.errors import InputError, RunError
from sevenfold.storage.checksums import file_digest
from sevenfold.storage.files import json_object, open_read, read_json, remove, write_json
from sevenfold.storage.filesystem import VERSION_KEYS, filesystem, is_http, stat
from sevenfold.storage.listing import remote_files
from sevenfold.storage.paths import is_url
from sevenfold.storage.private import require_private, user_folder

MAX_FILES = 10_000  # of a model directory; the largest models have some hundred
# What describes a model and its tokenizer, the code of those that have some, and weights. Other
# files are not copied, whatever a server lists.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_SMALL = "json|jinja|txt|model|tiktoken|py"
_MODEL_FILE = re.compile(
    # further chat templates; the modules of sentence-transformers
    rf"[^/]+\.({_SMALL}|safetensors|bin)|additional_chat_templates/[^/]+\.jinja|\d_\w+/[^/]+\.json"
)
_MODEL_FOLDER = re.compile(r"additional_chat_templates|\d_\w+")
# The content of larger files, which are weights, is not read again by each process.
_SMALL_BYTES = 64 << 20

log = logging.getLogger(__name__)


def user_temporary_folder() -> str:
    """Creates and returns a folder for this user's copies and locks on this machine.

    Raises:
        InputError: Something else has its name. Others can write to the temporary folder, and know
            the name: what they put there must not be taken for a copy of this user.
    """
    folder = user_folder(tempfile.gettempdir())
    require_private(folder)
    return folder


@functools.cache
def local_copy(folder: str) -> str:
    """Returns a local folder with the files of a Hugging Face directory.

    A local folder is returned as it is. Of a remote one, the files of a model or tokenizer are
    copied to this user's temporary folder, once per machine: the first process that calls this
    copies it, all others use the copy. It is copied again only if its files have changed, or the
    copy has.

    Raises:
        InputError: The storage lists names outside the folder, or too many; there is not enough
            space; or another user has made the temporary folder.
        RunError: The storage keeps failing.
    """
    if not is_url(folder):
        return folder
    infos = _model_files(folder)
    versions = sorted(
        (name, *(str(info.get(key)) for key in ("size", *VERSION_KEYS)))
        for name, info in infos.items()
    )
    digest = hashlib.sha256(json.dumps([folder, versions]).encode()).hexdigest()[:24]
    copy = os.path.join(user_temporary_folder(), digest)
    with filelock.FileLock(f"{copy}.lock"):
        if not _is_whole(copy):
            for leftover in (copy, f"{copy}.part"):  # changed; of a process that was killed
                remove(leftover)
            _download(folder, infos, copy)
    return copy


def _model_files(url: str) -> dict[str, dict[str, Any]]:
    """Returns fsspec's info about each file of a model in a remote folder, by its relative name."""
    files = remote_files(url, lambda name: bool(_MODEL_FOLDER.fullmatch(name)), MAX_FILES)
    names = [name for name in files if _MODEL_FILE.fullmatch(name)]
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if not name.endswith(".bin")]
    # pages that list a folder say neither the size of a file nor when it was written
    return {
        name: files[name] | (stat(_url(url, files[name])) if is_http(url) else {}) for name in names
    }


def _url(folder: str, info: dict[str, Any]) -> str:
    """Returns the URL of a listed file."""
    return str(filesystem(folder)[0].unstrip_protocol(info["name"]))


def _download(folder: str, infos: dict[str, dict[str, Any]], copy: str) -> None:
    """Copies files to a new local folder, and records beside it what was received.

    Args:
        folder: The remote folder.
        infos: Its files.
        copy: The local folder.
    """
    part = f"{copy}.part"
    os.mkdir(part, 0o700)
    for name, info in infos.items():
        path = os.path.join(part, *name.split("/"))
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open_read(_url(folder, info)) as source:
            free = shutil.disk_usage(part).free
            if source.size > free:
                raise InputError(
                    f"{folder}/{name}: expected at most the {free:,} bytes that are free in "
                    f"{part}, found {source.size:,}: free space, or set TMPDIR to another disk"
                )
            if info.get("size") not in (None, source.size):
                raise RunError(
                    f"{folder}/{name}: expected {info['size']:,} bytes as listed, found "
                    f"{source.size:,}: the file is being written; try again later"
                )
            # a new file, which only this user can read; the source raises if it ends early
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as target:
                shutil.copyfileobj(source, target, 4 << 20)
    write_json(f"{copy}.json", _states(part))
    os.rename(part, copy)


def _is_whole(copy: str) -> bool:
    """Returns whether a copy exists, and is what was received when it was made.

    Cleaners of temporary folders remove single files that were not read for some days.
    """
    if not os.path.isdir(copy):
        return False
    try:
        recorded = read_json(f"{copy}.json", json_object)
    except InputError:
        recorded = {}
    found = _states(copy)
    changed = sorted(n for n in recorded.keys() | found if recorded.get(n) != found.get(n))
    if changed:
        log.warning("%s: copied again, since %s has changed", copy, changed[0])
    return not changed


def _states(folder: str) -> dict[str, dict[str, Any]]:
    """Returns what tells whether the files in a copy have changed, by their relative names.

    All have a size and a time of the last write; small ones a checksum too. Reading 15 GB of
    weights would take each process of a run many seconds, and only this user can write to the
    folder; who exports a model with checksums has them verified besides (`verify_checksums`).
    """
    states: dict[str, dict[str, Any]] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            found = os.lstat(path)
            state: dict[str, Any] = {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
            if file_modes.S_ISREG(found.st_mode) and found.st_size <= _SMALL_BYTES:
                state = file_digest(path) | state
            states[os.path.relpath(path, folder)] = state
    return states
