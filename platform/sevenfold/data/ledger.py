"""The ledger, parquet files in the run's folder that record which rows each step read.

From the ledger and the data, the rows of past steps are reproduced.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.data.reader import ReadRange
from sevenfold.data.rows import Chunk, Rows
from sevenfold.data.sources import shards
from sevenfold.data.sources.documents import document_hash, texts
from sevenfold.data.stream import Stream
from sevenfold.errors import InputError, RunError, first_line

_PART = re.compile(r"^steps-(\d{9})-(\d{9})\.parquet$")
# The column of each field of a ReadRange. Chunks were called windows when the first ledgers were
# written.
_COLUMNS = {name: "window" if name == "chunk" else name for name in ReadRange._fields}
_SCHEMA = pa.schema([(column, pa.int64()) for column in _COLUMNS.values()])


# As soon as there are this many files below FULL_BYTES, they are put together. A run of a million
# steps on 1,024 ranks has some hundred files instead of ten thousand.
MAX_SMALL_PARTS, FULL_BYTES = 50, 16 * 2**20
_GROUP_ROWS = 64 * 2**10  # what is read to find one step


class _Part(NamedTuple):
    """A file of the ledger: its first and its last step, its path, and its size in bytes."""

    first: int
    last: int
    path: str
    size: int


@dataclass(frozen=True)
class Ledger:
    """The ledger in a folder. A file has the steps between two or more checkpoints.

    The steps before a checkpoint are written before it is committed.
    """

    folder: str

    def parts(self) -> list[tuple[int, int, str]]:
        """Returns (first step, last step, path) of each file, sorted."""
        return [part[:3] for part in self._parts()]

    def _files(self) -> list[_Part]:
        """Returns all files, sorted by their first step; of equal ones the longest first."""
        if not storage.listdir(self.folder):
            return []
        files = storage.input_files(self.folder, (".parquet",))
        parts = []
        for file in files:
            match = _PART.match(file.path.rsplit("/", 1)[-1])
            if match:
                parts.append(_Part(int(match[1]), int(match[2]), file.path, file.size or 0))
        return sorted(parts, key=lambda part: (part.first, -part.last))

    def _parts(self) -> list[_Part]:
        """Returns the files without those that another one contains.

        A process that was killed may have left some that it had put together.
        """
        return _not_contained(self._files())

    def write(self, draws: Sequence[ReadRange]) -> None:
        """Writes a file, and puts many small ones together.

        It replaces what the ledger has of the same or later steps, which belongs to saves that
        failed.

        Args:
            draws: What all lanes read since the last checkpoint, in any order.
        """
        if not draws:
            return
        self.cut(min(read.step for read in draws) - 1)
        self._write(_table(sorted(draws)))
        self._compact()

    def _write(self, table: pa.Table) -> None:
        """Writes a table, sorted by step, as a file."""
        first, last = table["step"][0].as_py(), table["step"][-1].as_py()
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=_GROUP_ROWS)
        name = f"steps-{first:09d}-{last:09d}.parquet"
        storage.write(storage.join(self.folder, name), buffer.getvalue())

    def _compact(self) -> None:
        """Puts the last small files together, up to FULL_BYTES each, if there are many."""
        parts = self._parts()
        small = list(itertools.takewhile(lambda part: part.size < FULL_BYTES, reversed(parts)))
        if len(small) < MAX_SMALL_PARTS:
            return
        group: list[_Part] = []
        for part in reversed(small):
            group.append(part)
            if part is small[0] or sum(p.size for p in group) >= FULL_BYTES:
                self._join(group)
                group = []

    def _join(self, parts: Sequence[_Part]) -> None:
        """Replaces files that follow each other by one."""
        first, last = parts[0].first, parts[-1].last
        if len(parts) > 1:
            self._write(pa.concat_tables(_read_part(part.path) for part in parts))
        for part in self._files():
            if first <= part.first and part.last <= last and part[:2] != (first, last):
                storage.remove(part.path)

    def cut(self, after: int) -> None:
        """Removes what the ledger has of steps after this one.

        A run that resumes from this step runs the later ones again.
        """
        files = self._files()
        for part in _not_contained(files):
            if part.first <= after < part.last:  # put together from several
                self._write(_read_part(part.path, part.first, after))
        for part in files:
            if part.last > after:
                storage.remove(part.path)

    def read(self, first: int, last: int) -> list[ReadRange]:
        """Returns what the steps `first` to `last` (inclusive) read, sorted by step and lane.

        Steps that the ledger does not have are missing.
        """
        reads: list[ReadRange] = []
        for part in self._parts():
            if part.first > last or part.last < first:
                continue
            table = _read_part(part.path, first, last)
            columns = (table[column].to_pylist() for column in _COLUMNS.values())
            reads += map(ReadRange._make, zip(*columns, strict=True))
        return sorted(reads)

    def step(self, step: int) -> list[ReadRange]:
        """Returns what a step read, sorted by lane.

        Raises:
            InputError: The ledger does not have the step.
        """
        reads = self.read(step, step)
        if not reads:
            parts = self.parts()
            known = (
                f"steps {parts[0][0]} to {parts[-1][1]}"
                if parts
                else "no steps (the ledger is written with each checkpoint)"
            )
            raise InputError(f"{self.folder}: expected step {step}, found {known}")
        return reads


def _not_contained(files: Sequence[_Part]) -> list[_Part]:
    """Returns the files, which are sorted as by `_files`, without those that another contains."""
    parts: list[_Part] = []
    for part in files:
        if not parts or part.last > parts[-1].last:
            parts.append(part)
    return parts


def _table(draws: Sequence[ReadRange]) -> pa.Table:
    columns = {column: [getattr(read, name) for read in draws] for name, column in _COLUMNS.items()}
    return pa.table(columns, schema=_SCHEMA)


def _read_part(path: str, first: int = 0, last: int = 2**62) -> pa.Table:
    """Returns the rows of some steps in a file of the ledger.

    Raises:
        InputError: The file is damaged.
    """
    try:
        with storage.open_read(path) as f:
            # reads only the row groups that have some of these steps
            table = pq.read_table(f, filters=[("step", ">=", first), ("step", "<=", last)])
        return table.select(list(_COLUMNS.values())).cast(_SCHEMA)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(
            f"{path}: damaged: not a Parquet file of a ledger ({first_line(e)}); "
            f"{storage.DAMAGED_HINT}"
        ) from None


class Replay:
    """Reproduces the rows of past steps.

    Args:
        stream: The stream of the run. The chunks that were used last are kept in memory.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self._chunk = functools.lru_cache(maxsize=2)(stream.chunk)

    def rows(self, draws: Sequence[ReadRange]) -> Rows:
        """Returns the rows of a step, in the order of the ranks that read them.

        Raises:
            RunError: They are not the rows that were trained on.
        """
        parts = []
        for read in draws:
            part = self._chunk(read.chunk).rows.part(read.row, read.row + read.rows)
            if part.hash() != read.hash:
                raise RunError(
                    f"step {read.step}, lane {read.lane}: expected rows {read.row} to "
                    f"{read.row + read.rows - 1} of chunk {read.chunk} with the ledger's hash "
                    f"{read.hash:016x}, found {part.hash():016x}: the data, the tokenizer or a "
                    "library has changed since the run"
                )
            parts.append(part)
        return Rows.concatenate(parts)

    def documents(self, draws: Sequence[ReadRange]) -> list[dict[str, Any]]:
        """Returns the documents, or pieces of documents, in the rows of a step, in their order.

        Returns:
            For each piece: `row` of the step, `offset` in the row and number of `tokens`; `chunk`;
            the `source`, the file (`shard`) and the `place` in it, the `document`'s index in its
            row group and its `hash`; and the token of the document with which the piece starts
            (`begins_at`).
        """
        documents: list[dict[str, Any]] = []
        rows_before = 0
        for read in draws:
            chunk: Chunk = self._chunk(read.chunk)
            pieces = chunk.pieces
            if pieces is not None:
                stop = read.row + read.rows
                inside = np.flatnonzero((pieces.row >= read.row) & (pieces.row < stop))
                by_place = np.lexsort((pieces.offset[inside], pieces.row[inside]))
                for i in inside[by_place].tolist():
                    documents.append(
                        {
                            "row": rows_before + int(pieces.row[i]) - read.row,
                            "offset": int(pieces.offset[i]),
                            "tokens": int(pieces.length[i]),
                            "chunk": read.chunk,
                        }
                        | self._document(int(pieces.group[i]), int(pieces.origin[i]))
                        | {"begins_at": int(pieces.start[i])}
                    )
            rows_before += read.rows
        return documents

    def _document(self, group: int, origin: int) -> dict[str, Any]:
        manifest = self.stream.order.manifest
        row_group = manifest.group(group)
        shard = manifest.shards[row_group.shard]
        return {
            "source": manifest.sources[shard.source].name,
            "shard": shard.path,
            "place": shards.describe_location(shard, row_group),
            "document": origin,
            "hash": self._hashes(group)[origin],
        }

    @functools.lru_cache(maxsize=64)  # noqa: B019 (lives as long as the command)
    def _hashes(self, group: int) -> dict[int, str]:
        """Returns the hash of each document of a row group, by its index."""
        documents = self.stream.selection.read(self.stream.order.manifest, group)
        return {
            int(origin): document_hash(parts)
            for origin, parts in zip(
                documents.origin, zip(*texts(documents), strict=True), strict=True
            )
        }
