"""The manifest: every shard of every source, cut into row groups. A run keeps the one that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.recipe import Source

_TAIL = 64 * 1024


@dataclass(frozen=True)
class Shard:
    path: str
    columns: tuple[str, ...]  # those that a run reads, in the encoder's order
    fingerprint: str  # of size and tail (the parquet footer): changes when the file does


@dataclass(frozen=True)
class RowGroup:
    shard: int
    index: int  # of the row group within the shard
    documents: int
    bytes: int  # of text, uncompressed, as parquet counts


@dataclass(frozen=True)
class Manifest:
    shards: tuple[Shard, ...]
    groups: tuple[RowGroup, ...]

    @property
    def bytes(self) -> int:
        return sum(g.bytes for g in self.groups)

    @property
    def documents(self) -> int:
        return sum(g.documents for g in self.groups)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Manifest:
        return Manifest(
            tuple(Shard(s["path"], tuple(s["columns"]), s["fingerprint"]) for s in tree["shards"]),
            tuple(RowGroup(**g) for g in tree["groups"]),
        )

    def check_unchanged(self, now: Manifest) -> None:
        """Raises InputError, naming the file, where a source is no longer what this manifest says."""
        then, there = {s.path: s for s in self.shards}, {s.path: s for s in now.shards}
        for path in sorted(then.keys() | there.keys()):
            if then.get(path) != there.get(path):
                what = "is gone" if path not in there else "is new" if path not in then else "has changed"
                raise InputError(f"{path}: {what} since this run began: put it back as it was, or start a run of another name")

    def read(self, group: RowGroup) -> list[pa.ChunkedArray]:
        """The columns of one row group: string arrays, one a column. Raises InputError where the shard cannot be read."""
        shard = self.shards[group.shard]
        try:
            with storage.open_read(shard.path) as f:
                file = pq.ParquetFile(f, page_checksum_verification=True)
                table = file.read_row_group(group.index, columns=list(shard.columns), use_threads=False)
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{shard.path}: row group {group.index} cannot be read: {_line(e)}") from None
        return [table[c] for c in shard.columns]


def scan(sources: Sequence[Source], fields: Sequence[str]) -> Manifest:
    """Reads the shards' footers; no text.

    Args:
        fields: which of a source's columns are read: ("text",) or ("prompt", "completion").

    Raises:
        InputError: a path without shards, a shard that is no parquet or lacks a column, no document in all.
    """
    shards: list[Shard] = []
    groups: list[RowGroup] = []
    for source in sources:
        columns = tuple(getattr(source, f) for f in fields)
        for path in storage.files(storage.locate(source.path), ".parquet"):
            groups += _row_groups(path, columns, len(shards))
            shards.append(Shard(path, columns, _fingerprint(path)))
    if not groups:
        raise InputError(f"{', '.join(s.path for s in sources)}: expected documents, found shards without a single row")
    return Manifest(tuple(shards), tuple(groups))


def _row_groups(path: str, columns: tuple[str, ...], shard: int) -> list[RowGroup]:
    try:
        with storage.open_read(path) as f:
            metadata = pq.ParquetFile(f).metadata
            schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{path}: expected a parquet file, as its name says, found something else: {_line(e)}") from None
    for column in columns:
        if column not in schema.names:
            raise InputError(f"{path}: expected a column {column!r}, found {', '.join(schema.names)}: name it in the source")
        if not (pa.types.is_string(schema.field(column).type) or pa.types.is_large_string(schema.field(column).type)):
            raise InputError(f"{path}: column {column!r}: expected strings, found {schema.field(column).type}")
    at = {metadata.schema.column(j).path: j for j in range(metadata.num_columns)}
    out = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        if group.num_rows:
            size = sum(group.column(at[c]).total_uncompressed_size for c in columns)
            out.append(RowGroup(shard, i, group.num_rows, size))
    return out


def _fingerprint(path: str) -> str:
    size = storage.size(path)
    with storage.open_read(path) as f:
        f.seek(max(0, size - _TAIL))
        return f"{size}-{hashlib.sha256(f.read()).hexdigest()[:16]}"


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
