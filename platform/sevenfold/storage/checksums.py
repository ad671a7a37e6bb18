"""Checksums of the files in a folder, kept in one file beside them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from sevenfold.errors import InputError
from sevenfold.storage.files import json_object, open_read, read_json, size, to_json
from sevenfold.storage.filesystem import stat
from sevenfold.storage.listing import plain_name
from sevenfold.storage.paths import join

CHECKSUMS = "checksums.json"
_WEIGHTS = ".safetensors"
# Evaluations and people write into the card of a model later.
_NOT_COVERED = {CHECKSUMS, "README.md"}


def file_digest(path: str) -> dict[str, Any]:
    """Returns the size ("bytes") and the SHA-256 ("sha256") of a file."""
    with open_read(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write_checksums(folder: str) -> None:
    """Writes size and checksum of every file in a local folder to its CHECKSUMS.

    README.md is left out.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    digests = {
        p.relative_to(folder).as_posix(): file_digest(str(p))
        for p in files
        if p.name not in _NOT_COVERED
    }
    Path(folder, CHECKSUMS).write_text(to_json({"files": digests}, indent=1), encoding="utf-8")


@functools.cache
def verify_checksums(folder: str, *, weights: bool) -> None:
    """Compares the files in a folder with its CHECKSUMS, once per process.

    A folder without that file, such as one from elsewhere or an export of an earlier version, is
    not checked, nor are files that are not listed.

    Args:
        folder: The folder.
        weights: Whether to read the weights too, which may take a minute per 100 GB.

    Raises:
        InputError: A file is missing or was changed, or CHECKSUMS itself is damaged.
    """
    checksums = join(folder, CHECKSUMS)
    if not stat(checksums):
        return
    files = read_json(
        checksums,
        lambda tree: {
            plain_name(name, checksums): {
                "bytes": int(file["bytes"]),
                "sha256": str(file["sha256"]),
            }
            for name, file in json_object(json_object(tree)["files"]).items()
        },
    )
    for name, expected in files.items():
        if weights or not name.endswith(_WEIGHTS):
            _verify(join(folder, *name.split("/")), expected, checksums)


def _verify(path: str, expected: dict[str, Any], checksums: str) -> None:
    """Raises InputError if a file does not have the expected size and checksum."""
    kind = stat(path).get("type")
    if kind != "file":
        change = f"is {'a folder' if kind else 'missing'}, although {CHECKSUMS} lists it"
    elif (found := size(path)) != expected["bytes"]:
        change = f"was changed: expected {expected['bytes']:,} bytes, found {found:,}"
    elif (digest := file_digest(path)["sha256"]) != expected["sha256"]:
        change = (
            f"was changed: expected SHA-256 {expected['sha256'][:16]}..., found {digest[:16]}..."
        )
    else:
        return
    raise InputError(
        f"{path}: {change}: restore it (a run's model: by `sevenfold export RUN`), or, if the "
        f"change is intended, remove {checksums}"
    )
