"""The token cache: the token ids of all documents, computed once and stored in Arrow IPC files.

A run that reads the cache gets the same rows in the same order as one that encodes the documents.

There is one file per data file ("shard"), with one record batch per row group. Its columns are
`tokens` (one list per document), `targets` (if not all tokens are targets) and `origin`. A file
appears under its name only when it is complete, so that a job that was killed resumes with the
missing ones. `cache.json` is written last and marks the cache as finished.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sevenfold import storage
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.manifest import Manifest
from sevenfold.data.sources.documents import Selection, Skipped
from sevenfold.errors import InputError, first_line

_INDEX = "cache.json"  # written when the cache is finished
_KEY = "key.json"  # written when the cache is begun


def _cache_key(
    manifest: Manifest, selection: Selection, encoder: TextEncoder | None
) -> dict[str, str | float]:
    """Returns what identifies the content of a cache; without the encoder if that is None."""
    key: dict[str, str | float] = {
        "manifest": manifest.hash(),
        "held_out": selection.held_out,
        "split": selection.split,
    }
    return key if encoder is None else {**key, "encoder": encoder.identity()}


def require_cache(
    folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder | None = None
) -> None:
    """Checks that a folder is a finished token cache of these documents.

    Args:
        folder: The folder.
        manifest: The manifest.
        selection: Which documents are read.
        encoder: The encoder that must have computed the ids. None: any.

    Raises:
        InputError: It is not.
    """
    index = storage.join(folder, _INDEX)
    if not storage.exists(index):
        raise InputError(
            f"{folder}: expected a finished token cache, found none: run jobs/tokenize.py first"
        )
    actual = storage.read_json(index, lambda tree: dict(tree["key"]))
    expected = _cache_key(manifest, selection, encoder)
    different = [name for name in expected if actual.get(name) != expected[name]]
    if different:
        raise InputError(
            f"{folder}: expected the token cache of this recipe's data, found one with another "
            f"{', '.join(different)}: set a new folder (data.cache) and run jobs/tokenize.py"
        )


@dataclass(frozen=True)
class TokenCache:
    """A finished token cache. Use `open` to create it.

    Attributes:
        folder: The folder.
        shard_of: int64 [row groups], the index of each row group's data file.
        first_of: int64 [data files], the index of the first row group of each file.
    """

    folder: str
    shard_of: np.ndarray
    first_of: np.ndarray

    @staticmethod
    def open(
        folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder
    ) -> TokenCache:
        """Opens the cache of these documents.

        Raises:
            InputError: The folder is not a finished token cache, or one of other data.
        """
        require_cache(folder, manifest, selection, encoder)
        shard_of = manifest.table[:, 0].copy()
        return TokenCache(
            folder, shard_of, np.searchsorted(shard_of, np.arange(len(manifest.shards)))
        )

    def read(self, group: int) -> Encoded:
        """Reads the token ids of a row group.

        Raises:
            InputError: The file is missing or damaged.
        """
        shard = int(self.shard_of[group])
        path = _shard_path(self.folder, shard)
        try:
            batch, raw_metadata = _file(path).get_batch_with_custom_metadata(
                group - int(self.first_of[shard])
            )
        except (pa.ArrowException, OSError) as e:
            raise _damaged(path, group, first_line(e)) from None
        tokens = batch.column("tokens")
        ids, offsets = tokens.flatten().to_numpy(), tokens.offsets.to_numpy().astype(np.int64)
        targets = None
        if "targets" in batch.schema.names:
            targets = batch.column("targets").flatten().to_numpy()
        origin = batch.column("origin").to_numpy()
        metadata = {name.decode(): value.decode() for name, value in raw_metadata.items()}
        if int(metadata["crc32"]) != _crc(ids, offsets, targets, origin):
            raise _damaged(path, group, "the checksum does not match")
        skipped = Skipped(int(metadata["skipped"]), metadata["complaint"])
        return Encoded(
            ids, offsets, None if targets is None else targets.view(bool), origin, skipped
        )


def _shard_path(folder: str, shard: int) -> str:
    return storage.join(folder, f"shard-{shard:05d}.arrow")


def write_shard(
    folder: str, shard: int, manifest: Manifest, selection: Selection, encoder: TextEncoder
) -> dict[str, int]:
    """Encodes the documents of a data file into its file of the cache, unless that exists already.

    Args:
        folder: The folder of the cache.
        shard: The index of the data file in the manifest.
        manifest: The manifest.
        selection: Which documents are read.
        encoder: The encoder.

    Returns:
        The numbers of "documents", "tokens" (with head and tail) and "skipped" documents.

    Raises:
        InputError: As `Selection.read`.
    """
    groups = np.flatnonzero(manifest.table[:, 0] == shard).tolist()
    if not groups:  # the data file could not be read and was left out
        return {"documents": 0, "tokens": 0, "skipped": 0}
    path = _shard_path(folder, shard)
    if not storage.exists(path):
        _encode_shard(folder, path, groups, manifest, selection, encoder)
    return _count(path, encoder)


def _encode_shard(
    folder: str,
    path: str,
    groups: list[int],
    manifest: Manifest,
    selection: Selection,
    encoder: TextEncoder,
) -> None:
    """Writes a file of the cache: first under another name, so that it appears complete."""
    is_url = storage.is_url(folder)
    with (
        tempfile.TemporaryDirectory()
        if is_url
        else storage.temporary_folder_beside(path) as temporary
    ):
        temporary_path = os.path.join(temporary, os.path.basename(path))
        with contextlib.ExitStack() as stack:
            writer = None
            for group in groups:
                (encoded,) = encoder.encode([selection.read(manifest, group)])
                batch, metadata = _batch(encoded, encoder.dtype)
                if writer is None:
                    writer = stack.enter_context(pa.ipc.new_file(temporary_path, batch.schema))
                writer.write_batch(batch, custom_metadata=metadata)
        if is_url:
            storage.upload(temporary, folder)
        else:
            os.replace(temporary_path, path)


def _count(path: str, encoder: TextEncoder) -> dict[str, int]:
    """Counts what a file of the cache holds, see `write_shard`."""
    counts = {"documents": 0, "tokens": 0, "skipped": 0}
    frame = sum(token is not None for token in (encoder.head, encoder.tail))
    file = _open(path)
    for i in range(file.num_record_batches):
        batch, metadata = file.get_batch_with_custom_metadata(i)
        counts["documents"] += len(batch)
        counts["tokens"] += len(batch.column("tokens").flatten()) + len(batch) * frame
        counts["skipped"] += int(metadata[b"skipped"])
    return counts


def require_usable_folder(folder: str) -> None:
    """Checks that a folder can become a token cache, so that no other files are mixed with it.

    Raises:
        InputError: The folder has files, and is not a finished or unfinished token cache.
    """
    # the tokenizer is written before the key, which depends on it
    names = set(storage.listdir(folder)) - {"tokenizer"}
    if names and _KEY not in names:
        found = ", ".join(sorted(names)[:3])
        raise InputError(
            f"{folder}: expected a new or empty folder, or a token cache, found {found}: "
            "set another folder (data.cache)"
        )


def begin(folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder) -> bool:
    """Begins the cache of these documents in a folder, or resumes it.

    Returns:
        Whether the cache is finished already.

    Raises:
        InputError: The folder is a cache of other documents or of another encoder.
    """
    path, key = storage.join(folder, _KEY), _cache_key(manifest, selection, encoder)
    if not storage.exists(path):
        storage.write(path, json.dumps(key))
    elif storage.read_json(path) != key:
        raise InputError(
            f"{folder}: expected a new folder or the token cache of this recipe's data, found the "
            "cache of other data or of another tokenizer: set another folder (data.cache)"
        )
    return storage.exists(storage.join(folder, _INDEX))


def finish(
    folder: str,
    manifest: Manifest,
    selection: Selection,
    encoder: TextEncoder,
    counts: dict[str, int],
) -> None:
    """Marks a cache as finished.

    Args:
        folder: The folder of the cache.
        manifest: The manifest.
        selection: Which documents were read.
        encoder: The encoder.
        counts: The sums of what `write_shard` returned.
    """
    index = {
        "key": _cache_key(manifest, selection, encoder),
        **counts,
        "shards": {
            _shard_path("", i).lstrip("/"): shard.path for i, shard in enumerate(manifest.shards)
        },
    }
    storage.write(storage.join(folder, _INDEX), json.dumps(index, indent=1))


def _batch(
    encoded: Encoded, dtype: type[np.unsignedinteger]
) -> tuple[pa.RecordBatch, dict[str, str]]:
    """Returns the record batch of a row group, and its metadata."""
    ids = encoded.ids.astype(dtype)
    targets = None if encoded.targets is None else encoded.targets.view(np.uint8)
    offsets = pa.array(encoded.offsets)
    columns: dict[str, Any] = {
        "tokens": pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
        "origin": pa.array(encoded.origin),
    }
    if targets is not None:
        columns["targets"] = pa.LargeListArray.from_arrays(offsets, pa.array(targets))
    metadata = {
        "crc32": str(_crc(ids, encoded.offsets, targets, encoded.origin)),
        "skipped": str(encoded.skipped.count),
        "complaint": encoded.skipped.first,
    }
    return pa.RecordBatch.from_pydict(columns), metadata


def _crc(*arrays: np.ndarray | None) -> int:
    value = 0
    for array in arrays:
        if array is not None:
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


@functools.lru_cache(maxsize=64)
def _file(path: str) -> pa.ipc.RecordBatchFileReader:
    """Opens a file of the cache and keeps it open for later calls."""
    return _open(path)


def _open(path: str) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(
        storage.open_read(path) if storage.is_url(path) else pa.memory_map(path)
    )


def _damaged(path: str, group: int, reason: str) -> InputError:
    return InputError(
        f"{path}: row group {group} of the token cache is damaged: {reason}: "
        "remove this file and run jobs/tokenize.py"
    )
