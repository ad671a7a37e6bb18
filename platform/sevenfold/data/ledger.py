"""The ledger, parquet files in the run's folder that record which rows each step read.

From the ledger and the data, the rows of past steps are reproduced.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Ledger:
    """The ledger in a folder. Each of its files has the steps between two checkpoints.

    A file is written before the checkpoint at its end is committed.
    """

    folder: str

    def parts(self) -> list[tuple[int, int, str]]:
        """Returns (first step, last step, path) of each file, sorted."""
        matches = ((_PART.match(name), name) for name in storage.listdir(self.folder))
        return sorted(
            (int(m[1]), int(m[2]), storage.join(self.folder, name)) for m, name in matches if m
        )

    def write(self, draws: Sequence[ReadRange]) -> None:
        """Writes a file.

        It replaces files with the same or later steps, which belong to saves that failed.

        Args:
            draws: What all lanes read since the last checkpoint, in any order.
        """
        if not draws:
            return
        ordered = sorted(draws)
        self.cut(ordered[0].step - 1)
        columns = {
            column: [getattr(read, field) for read in ordered] for field, column in _COLUMNS.items()
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=_SCHEMA), buffer, compression="zstd")
        name = f"steps-{ordered[0].step:09d}-{ordered[-1].step:09d}.parquet"
        storage.write(storage.join(self.folder, name), buffer.getvalue())

    def cut(self, after: int) -> None:
        """Removes the files with steps after this one.

        A run that resumes from this step runs the later ones again.
        """
        for _, last, path in self.parts():
            if last > after:
                storage.remove(path)

    def read(self, first: int, last: int) -> list[ReadRange]:
        """Returns what the steps `first` to `last` (inclusive) read, sorted by step and lane.

        Steps that the ledger does not have are missing.
        """
        reads: list[ReadRange] = []
        for begin, end, path in self.parts():
            if begin > last or end < first:
                continue
            found = _read_part(path)
            reads += [read for read in found if first <= read.step <= last]
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


def _read_part(path: str) -> list[ReadRange]:
    """Returns what is in a file of the ledger.

    Raises:
        InputError: The file is damaged.
    """
    try:
        with storage.open_read(path) as f:
            table = pq.read_table(f)
        rows = zip(*(table[column].to_pylist() for column in _COLUMNS.values()), strict=True)
        return list(map(ReadRange._make, rows))
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
