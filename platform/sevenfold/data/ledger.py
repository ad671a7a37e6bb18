"""The ledger: which rows of which windows each step read, in parquet beside the run; and what is told from it."""

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
from sevenfold.data import shards
from sevenfold.data.documents import document_hash, texts
from sevenfold.data.rows import Rows, Window
from sevenfold.data.stream import Draw, Stream
from sevenfold.errors import InputError, RunError

_PART = re.compile(r"^steps-(\d{9})-(\d{9})\.parquet$")
_SCHEMA = pa.schema([(name, pa.int64()) for name in Draw._fields])


@dataclass(frozen=True)
class Ledger:
    """The parts in a folder: each holds the steps from one checkpoint to the next, written before that is committed."""

    folder: str

    def parts(self) -> list[tuple[int, int, str]]:
        """(first step, last step, path), in order."""
        found = ((_PART.match(name), name) for name in storage.listdir(self.folder))
        return sorted((int(m[1]), int(m[2]), storage.join(self.folder, name)) for m, name in found if m)

    def write(self, draws: Sequence[Draw]) -> None:
        """Adds a part, in the place of those with the same or later steps, of saves that failed; draws of all lanes, with
        steps counted from 1."""
        if not draws:
            return
        ordered = sorted(draws)
        self.cut(ordered[0].step - 1)
        table = pa.table({n: [getattr(d, n) for d in ordered] for n in Draw._fields}, schema=_SCHEMA)
        made = io.BytesIO()
        pq.write_table(table, made, compression="zstd")
        name = f"steps-{ordered[0].step:09d}-{ordered[-1].step:09d}.parquet"
        storage.write(storage.join(self.folder, name), made.getvalue())

    def cut(self, after: int) -> None:
        """Forgets the steps after one: a run that goes on from there makes them again."""
        for _, last, path in self.parts():
            if last > after:
                storage.remove(path)

    def read(self, first: int, last: int) -> list[Draw]:
        """The draws of steps first .. last, by step and lane; those there are."""
        out: list[Draw] = []
        for begin, end, path in self.parts():
            if begin <= last and end >= first:
                with storage.open_read(path) as f:
                    table = pq.read_table(f)
                rows = zip(*(table[n].to_pylist() for n in Draw._fields), strict=True)
                out += [d for d in map(Draw._make, rows) if first <= d.step <= last]
        return sorted(out)

    def step(self, step: int) -> list[Draw]:
        """Raises InputError where the ledger does not know the step."""
        found = self.read(step, step)
        if not found:
            parts = self.parts()
            known = f"steps {parts[0][0]} to {parts[-1][1]}" if parts else "no step: it is written with each checkpoint"
            raise InputError(f"{self.folder}: expected step {step}, found {known}")
        return found


class Replay:
    """Makes the rows of past steps again. Keeps the windows of a few lanes."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self._window = functools.lru_cache(maxsize=2)(stream.window)

    def rows(self, draws: Sequence[Draw]) -> Rows:
        """The rows of a step, in the order in which ranks hold them.

        Raises:
            RunError: they are not the rows that were trained on; names window and hashes.
        """
        parts = []
        for d in draws:
            part = self._window(d.window).rows.part(d.row, d.row + d.rows)
            if part.hash() != d.hash:
                raise RunError(
                    f"step {d.step}, lane {d.lane}: window {d.window}, rows {d.row}-{d.row + d.rows - 1}: hash "
                    f"{part.hash():016x} where the ledger has {d.hash:016x}: text, tokenizer or library are not the run's"
                )
            parts.append(part)
        return Rows.concatenate(parts)

    def documents(self, draws: Sequence[Draw]) -> list[dict[str, Any]]:
        """What lies in the rows of a step: for each piece its row of the step and offset, tokens, the document's source,
        shard, place, number and hash, and with which of its tokens it begins."""
        out: list[dict[str, Any]] = []
        before = 0
        for d in draws:
            window: Window = self._window(d.window)
            pieces = window.pieces
            if pieces is not None:
                here = np.flatnonzero((pieces.row >= d.row) & (pieces.row < d.row + d.rows))
                for i in here[np.lexsort((pieces.offset[here], pieces.row[here]))].tolist():
                    row, group = before + int(pieces.row[i]) - d.row, int(pieces.group[i])
                    out.append(
                        {"row": row, "offset": int(pieces.offset[i]), "tokens": int(pieces.length[i]), "window": d.window}
                        | self._document(group, int(pieces.origin[i])) | {"begins_at": int(pieces.start[i])}
                    )  # fmt: skip
            before += d.rows
        return out

    def _document(self, group: int, origin: int) -> dict[str, Any]:
        manifest = self.stream.plan.manifest
        about = manifest.group(group)
        shard = manifest.shards[about.shard]
        return {
            "source": manifest.sources[shard.source].name, "shard": shard.path, "place": shards.place(shard, about),
            "document": origin, "hash": self._hashes(group)[origin],
        }  # fmt: skip

    @functools.lru_cache(maxsize=64)  # noqa: B019 (lives as long as the command)
    def _hashes(self, group: int) -> dict[int, str]:
        found = self.stream.selection.read(self.stream.plan.manifest, group)
        return {int(i): document_hash(parts) for i, parts in zip(found.origin, zip(*texts(found), strict=True), strict=True)}
