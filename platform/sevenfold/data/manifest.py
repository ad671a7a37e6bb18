"""The manifest: the list of all shards of all sources, each split into row groups.

It is computed when a run starts for the first time; the run uses it unchanged from then on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from sevenfold import storage
from sevenfold.data.sources.shards import (
    CHANGED_HINT,
    RowGroup,
    Shard,
    content_hash,
    fingerprint,
)
from sevenfold.data.sources.source_files import CURRENT, EARLIER, find_files
from sevenfold.errors import InputError
from sevenfold.recipe import Source
from sevenfold.recipe.locations import STORED

# Local files up to this size together are hashed as a whole when a run is started.
HASHED_BYTES = 8 * 2**30
THREADS = 16
REMOTE_THREADS = 256  # each mostly waits for an answer
_ESTIMATED_TOKENS_PER_BYTE = 0.25  # before there is a tokenizer to measure it with

# The columns of Manifest.table.
COLUMNS = tuple(f.name for f in fields(RowGroup))
_SHARD, _DOCUMENTS, _BYTES = (COLUMNS.index(c) for c in ("shard", "documents", "bytes"))


@dataclass(frozen=True)
class Manifest(storage.CarriesSecrets):
    """The shards of some sources and their row groups, in the order of sources, shards and rows.

    Attributes:
        sources: The sources.
        shards: Their shards.
        table: int64 [row groups, 6], the fields of a RowGroup.
        skipped: An error message for each shard that was left out (on_bad_document: skip).
        tokens_per_byte: Tokens per byte of text of each source, measured on a sample; () as long
            as there is no tokenizer.
        version: The version of which files of a folder are read, see `sources.source_files`.
    """

    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    table: np.ndarray
    skipped: tuple[str, ...] = ()
    tokens_per_byte: tuple[float, ...] = ()
    version: int = CURRENT

    def __len__(self) -> int:
        return len(self.table)

    def group(self, index: int) -> RowGroup:
        """Returns a row group."""
        return RowGroup(*self.table[index].tolist())

    @functools.cached_property
    def bytes(self) -> int:
        """The total size of the text, uncompressed."""
        return int(self.table[:, _BYTES].sum())

    @property
    def documents(self) -> int | None:
        """The number of documents; None if it is unknown, because a text file was not read."""
        counts = self.table[:, _DOCUMENTS]
        return int(counts.sum()) if counts.all() else None

    @functools.cached_property
    def spans(self) -> tuple[range, ...]:
        """The indices of the row groups of each source."""
        source = np.array([s.source for s in self.shards])[self.table[:, _SHARD]]
        bounds = np.searchsorted(source, np.arange(len(self.sources) + 1))
        return tuple(range(int(start), int(stop)) for start, stop in itertools.pairwise(bounds))

    def tokens(self, source: int) -> float:
        """Returns the estimated number of tokens of a source."""
        span = self.spans[source]
        size = float(self.table[span.start : span.stop, _BYTES].sum())
        if not self.tokens_per_byte:
            return size * _ESTIMATED_TOKENS_PER_BYTE
        return size * self.tokens_per_byte[source]

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as a tree that can be stored as JSON."""
        # earlier versions wrote none
        version = {} if self.version == EARLIER else {"version": self.version}
        return version | {
            "sources": [s.to_json() for s in self.sources],
            "shards": [s.to_json() for s in self.shards],
            "row_groups": {c: self.table[:, i].tolist() for i, c in enumerate(COLUMNS)},
            "left_out": list(self.skipped),
            "tokens_per_byte": list(self.tokens_per_byte),
        }

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Manifest:
        """Returns the manifest that `to_json` converted; in earlier versions, URLs had secrets."""
        table = np.array([tree["row_groups"][c] for c in COLUMNS], np.int64).T
        return Manifest(
            tuple(Source.model_validate(s, context={STORED: True}) for s in tree["sources"]),
            tuple(
                Shard(**s | {"path": storage.keep_secrets(s["path"], stored=True)})
                for s in tree["shards"]
            ),
            np.ascontiguousarray(table),
            tuple(map(storage.hide_secrets, tree["left_out"])),
            tuple(tree["tokens_per_byte"]),
            int(tree.get("version", EARLIER)),
        )

    def hash(self) -> str:
        """Returns a hash of what is read: the sources, shards and row groups."""
        tree = self.to_json()
        del tree["left_out"], tree["tokens_per_byte"]
        tree.pop("version", None)
        for shard in tree["shards"]:  # a copy of the data is the same data
            shard.pop("version", None)
            shard.pop("content", None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    def measured(self, tokens_per_byte: Sequence[float]) -> Manifest:
        """Returns the manifest with the tokens per byte of its sources filled in."""
        return replace(self, tokens_per_byte=tuple(tokens_per_byte))

    def recorded(self) -> Manifest:
        """Returns the manifest with what tells later whether a copy of a file has the same content.

        That is the hash of the content of local files, if they have up to HASHED_BYTES together.
        """
        local = sum(s.file_bytes for s in self.shards if not storage.is_url(s.path))

        def record(shard: Shard) -> Shard:
            is_hashed = local <= HASHED_BYTES and not storage.is_url(shard.path)
            return replace(shard, content=content_hash(shard.path)) if is_hashed else shard

        with ThreadPoolExecutor(THREADS) as pool:
            return replace(self, shards=tuple(pool.map(record, self.shards)))

    def check_unchanged(self) -> None:
        """Checks that the sources still consist of the same files with the same content.

        A file is not read if its folder's listing says that it was not written since. Of one that
        was, such as a copy, the content is compared.

        Raises:
            InputError: A file is new, missing or has changed. Names the file.
        """
        recorded = {shard.path: shard for shard in self.shards}
        current = {
            file.path: file
            for source in self.sources
            for file in find_files(source, self.version).files
        }
        skipped = {message.partition(": ")[0] for message in self.skipped}
        for path in sorted(recorded.keys() | (current.keys() - skipped)):
            if path not in current:
                raise InputError(f"{path}: is gone since this run began: {CHANGED_HINT}")
            if path not in recorded:
                raise InputError(f"{path}: is new since this run began: {CHANGED_HINT}")
        unknown = [
            shard
            for path, shard in recorded.items()
            if not shard.version
            or (shard.version, shard.file_bytes) != (current[path].version, current[path].size)
        ]
        with reading_threads(current) as pool:
            for shard, has_changed in zip(unknown, pool.map(_has_changed, unknown), strict=True):
                if has_changed:
                    raise InputError(
                        f"{shard.path}: has changed since this run began: {CHANGED_HINT}"
                    )


def _has_changed(shard: Shard) -> bool:
    """Returns whether the content of a shard's file has changed since it was recorded."""
    if fingerprint(shard.path) != shard.fingerprint:
        return True
    return bool(shard.content) and content_hash(shard.path) != shard.content


def reading_threads(paths: Iterable[str]) -> ThreadPoolExecutor:
    """Returns the threads that read these files in parallel, since remote storage is slow."""
    is_remote = any(map(storage.is_url, paths))
    return ThreadPoolExecutor(REMOTE_THREADS if is_remote else THREADS)
