"""The token cache: row groups encoded once, in Arrow IPC that any tool opens. Same plan, same rows as from the text.

One file a shard, one record batch a row group: `tokens` (a list a document), `targets` where not all are, `origin`. Each
file is written whole or not at all, so that a killed job goes on with those that are missing; `cache.json` comes last.
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
from sevenfold.data.documents import Selection, Skipped
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.manifest import Manifest
from sevenfold.errors import InputError

_INDEX = "cache.json"
_KEY = "key.json"


def key(manifest: Manifest, selection: Selection, encoder: TextEncoder | None) -> dict[str, str | float]:
    """What a cache must have been made from to stand for these documents; of all encoders where none is named."""
    what: dict[str, str | float] = {"manifest": manifest.hash(), "held_out": selection.held_out, "split": selection.split}
    return what if encoder is None else {**what, "encoder": encoder.identity()}


def check(folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder | None = None) -> None:
    """Raises InputError where the folder is not a finished cache of these documents; by any encoder where none is named."""
    index = storage.join(folder, _INDEX)
    if not storage.exists(index):
        raise InputError(f"{folder}: expected a token cache, found none that is finished: make it by jobs/tokenize.py")
    made, wanted = storage.read_json(index)["key"], key(manifest, selection, encoder)
    wrong = [k for k in wanted if made.get(k) != wanted[k]]
    if wrong:
        raise InputError(
            f"{folder}: a token cache of something else ({', '.join(wrong)} differ): make this recipe's own by "
            "jobs/tokenize.py with another data.cache"
        )


@dataclass(frozen=True)
class TokenCache:
    """The cache in a folder. Raises InputError where it is not there, or was made from something else."""

    folder: str
    shard_of: np.ndarray  # int64 [row groups]
    first_of: np.ndarray  # int64 [shards], the first row group of each

    @staticmethod
    def open(folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder) -> TokenCache:
        check(folder, manifest, selection, encoder)
        shard_of = manifest.table[:, 0].copy()
        return TokenCache(folder, shard_of, np.searchsorted(shard_of, np.arange(len(manifest.shards))))

    def read(self, group: int) -> Encoded:
        """Raises InputError where the file is gone or damaged; names it."""
        shard = int(self.shard_of[group])
        path = path_of(self.folder, shard)
        try:
            batch, metadata = _file(path).get_batch_with_custom_metadata(group - int(self.first_of[shard]))
        except (pa.ArrowException, OSError) as e:
            raise _damaged(path, group, str(e).splitlines()[0]) from None
        tokens = batch.column("tokens")
        ids, offsets = tokens.flatten().to_numpy(), tokens.offsets.to_numpy().astype(np.int64)
        targets = batch.column("targets").flatten().to_numpy() if "targets" in batch.schema.names else None
        origin = batch.column("origin").to_numpy()
        about = {k.decode(): v.decode() for k, v in metadata.items()}
        if int(about["crc32"]) != _crc(ids, offsets, targets, origin):
            raise _damaged(path, group, "its checksum is another")
        skipped = Skipped(int(about["skipped"]), about["complaint"])
        return Encoded(ids, offsets, None if targets is None else targets.view(bool), origin, skipped)


def path_of(folder: str, shard: int) -> str:
    return storage.join(folder, f"shard-{shard:05d}.arrow")


def write_shard(folder: str, shard: int, manifest: Manifest, selection: Selection, encoder: TextEncoder) -> dict[str, int]:
    """Encodes a shard's row groups into its file, unless that is there already. Returns {"documents", "tokens", "skipped"}.

    Raises:
        InputError: as Selection.read.
    """
    path = path_of(folder, shard)
    counts = {"documents": 0, "tokens": 0, "skipped": 0}
    groups = np.flatnonzero(manifest.table[:, 0] == shard).tolist()
    if not groups:  # a shard that was left out
        return counts
    if not storage.exists(path):
        with tempfile.TemporaryDirectory() if storage.is_url(folder) else storage.aside_of(path) as aside:
            made = os.path.join(aside, os.path.basename(path))
            with contextlib.ExitStack() as open_files:
                writer = None
                for group in groups:
                    batch, about = _batch(encoder.encode([selection.read(manifest, group)])[0], encoder.dtype)
                    writer = writer or open_files.enter_context(pa.ipc.new_file(made, batch.schema))
                    writer.write_batch(batch, custom_metadata=about)
            if storage.is_url(folder):
                storage.upload(aside, folder)
            else:
                os.replace(made, path)
    file = _open(path)
    for i in range(file.num_record_batches):
        batch, metadata = file.get_batch_with_custom_metadata(i)
        counts["documents"] += len(batch)
        counts["tokens"] += len(batch.column("tokens").flatten()) + len(batch) * sum(
            t is not None for t in (encoder.head, encoder.tail)
        )
        counts["skipped"] += int(metadata[b"skipped"])
    return counts


def require_room(folder: str) -> None:
    """Raises InputError where there is something in a folder, and no token cache, finished or not: nothing may be written
    between somebody's files."""
    names = set(storage.listdir(folder)) - {"tokenizer"}  # which is made before the cache's key is known
    if names and _KEY not in names:
        found = ", ".join(sorted(names)[:3])
        raise InputError(
            f"{folder}: expected a new or empty folder, or a token cache, found {found}: choose another (data.cache)"
        )


def begin(folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder) -> bool:
    """Makes a folder the cache of these documents, or finds that it is. Returns whether it is finished.

    Raises:
        InputError: a cache of something else lies there.
    """
    claim, wanted = storage.join(folder, _KEY), key(manifest, selection, encoder)
    if not storage.exists(claim):
        storage.write(claim, json.dumps(wanted))
    elif storage.read_json(claim) != wanted:
        raise InputError(f"{folder}: a token cache of something else is there: name another folder (data.cache)")
    return storage.exists(storage.join(folder, _INDEX))


def finish(folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder, counts: dict[str, int]) -> None:
    tree = {
        "key": key(manifest, selection, encoder),
        **counts,
        "shards": {path_of("", i).lstrip("/"): s.path for i, s in enumerate(manifest.shards)},
    }
    storage.write(storage.join(folder, _INDEX), json.dumps(tree, indent=1))


def _batch(encoded: Encoded, dtype: type[np.unsignedinteger]) -> tuple[pa.RecordBatch, dict[str, str]]:
    ids = encoded.ids.astype(dtype)
    targets = None if encoded.targets is None else encoded.targets.view(np.uint8)
    offsets = pa.array(encoded.offsets)
    columns: dict[str, Any] = {
        "tokens": pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
        "origin": pa.array(encoded.origin),
    }
    if targets is not None:
        columns["targets"] = pa.LargeListArray.from_arrays(offsets, pa.array(targets))
    crc = _crc(ids, encoded.offsets, targets, encoded.origin)
    about = {"crc32": str(crc), "skipped": str(encoded.skipped.count), "complaint": encoded.skipped.first}
    return pa.RecordBatch.from_pydict(columns), about


def _crc(*arrays: np.ndarray | None) -> int:
    value = 0
    for array in arrays:
        if array is not None:
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


@functools.lru_cache(maxsize=64)
def _file(path: str) -> pa.ipc.RecordBatchFileReader:
    return _open(path)


def _open(path: str) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(storage.open_read(path) if storage.is_url(path) else pa.memory_map(path))


def _damaged(path: str, group: int, why: str) -> InputError:
    return InputError(
        f"{path}: row group {group} of the token cache is damaged: {why}: remove this file and run jobs/tokenize.py"
    )
