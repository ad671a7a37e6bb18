"""Reads the rows of a rank's steps, and keeps the position that a checkpoint stores.

The rows of a step come from all lanes, the same number from each. A rank reads the lanes that it
serves, so the rows of a step do not depend on the number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sevenfold.data.order import LanePosition, chunks_of, skipped
from sevenfold.data.rows import Chunk, Rows, combine_hashes
from sevenfold.data.sources.documents import Skipped
from sevenfold.errors import RunError

if TYPE_CHECKING:
    from sevenfold.data.stream import Stream


UNIT = 2**32  # of the progress in a lane, an integer so that sums do not depend on their order


@dataclass
class ReaderState:
    """The position of a reader, or of the readers of all ranks together.

    It consists of plain numbers. Merged over all ranks, it is the same for every number of ranks.

    Attributes:
        data_step: The number of steps for which data was read, skipped ones included.
        positions: The position of each lane. A lane that is missing is at its beginning.
        skipped: The number of bad documents that were left out so far, in all lanes.
    """

    data_step: int = 0
    positions: dict[int, LanePosition] = field(default_factory=dict)
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the state in the form that a checkpoint stores."""
        positions = {str(lane): [p.ordinal, p.row] for lane, p in self.positions.items()}
        return {"data_step": self.data_step, "positions": positions, "skipped": self.skipped}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> ReaderState:
        """Returns the state that `to_json` has converted."""
        positions = {int(lane): LanePosition(*p) for lane, p in tree["positions"].items()}
        return ReaderState(tree["data_step"], positions, tree["skipped"])

    @staticmethod
    def together(parts: Sequence[ReaderState], before: int) -> ReaderState:
        """Merges the states of all ranks.

        Args:
            parts: The state of each rank.
            before: `skipped` of the state from which all ranks started. Each rank's count includes
                it.
        """
        positions = {lane: p for part in parts for lane, p in part.positions.items()}
        return ReaderState(
            parts[0].data_step, positions, before + sum(part.skipped - before for part in parts)
        )


class ReadRange(NamedTuple):
    """The rows that a step read from one chunk of a lane, as the ledger stores them.

    Attributes:
        step: The training step, from 1.
        lane: The lane, from 0.
        data_step: The step that counts skipped data as well, from 1.
        chunk: The index of the chunk.
        row: The first of the rows, as an index in the chunk.
        rows: The number of rows.
        hash: The hash of the rows.
    """

    step: int
    lane: int
    data_step: int
    chunk: int
    row: int
    rows: int
    hash: int


@dataclass(frozen=True)
class StreamShard:
    """The part of a stream that one rank reads: the lanes that it serves."""

    stream: Stream
    lanes: tuple[int, ...]

    def reader(
        self, rows_per_lane: int, state: ReaderState | None = None, step: int = 0
    ) -> LaneReader:
        """Opens a reader.

        Args:
            rows_per_lane: The number of rows that a step reads from each lane.
            state: Where to start. None: at the beginning.
            step: The number of training steps that were done before.
        """
        return LaneReader(self.stream, self.lanes, rows_per_lane, state or ReaderState(), step)


@dataclass(slots=True)
class _Lane:
    """The position in a lane, and the chunks of the lane that have arrived.

    Attributes:
        index: The index of the lane.
        ordinal: The index of the current chunk among the lane's chunks.
        row: The next row to read in the current chunk.
        chunks: The chunks that have arrived, starting with the current one.
    """

    index: int
    ordinal: int
    row: int
    chunks: deque[Chunk] = field(default_factory=deque)

    def advance(self, row: int) -> None:
        """Moves to a row of the current chunk, or to the next chunk if `row` is the chunk's end."""
        self.row = row
        if row == len(self.chunks[0].hashes):
            self.ordinal, self.row = self.ordinal + 1, 0
            self.chunks.popleft()


class LaneReader:
    """Iterates over the rows that a rank reads for each step.

    They are `rows_per_lane` rows of each of its lanes, in the order of the lanes.

    The iterator does not end by itself. A lane without further rows (data.epochs) yields rows of
    padding, and a run stops when the readers of all ranks have `ended`.

    Args:
        stream: The data.
        lanes: The lanes to read.
        rows_per_lane: The number of rows that a step reads from each lane.
        state: Where to start.
        step: The number of training steps that were done before.

    Attributes:
        bad_documents: The bad documents that were left out, one entry per chunk that had any. The
            caller empties the list.
    """

    def __init__(
        self,
        stream: Stream,
        lanes: tuple[int, ...],
        rows_per_lane: int,
        state: ReaderState,
        step: int = 0,
    ):
        self.bad_documents: list[Skipped] = []
        self._stream, self._rows_per_lane = stream, rows_per_lane
        self._steps, self._data_step, self._skipped = step, state.data_step, state.skipped
        # The fields of ReadRanges. They are plain tuples, since there are many of them.
        self._read_ranges: list[tuple[int, ...]] = []
        positions = {lane: state.positions.get(lane, LanePosition()) for lane in lanes}
        self._lanes = {lane: _Lane(lane, *position) for lane, position in positions.items()}
        self._chunk_count = stream.order.chunks
        self._expected = chunks_of(positions, stream.order.lanes, self._chunk_count)
        self._chunks = stream.chunks(
            chunks_of(positions, stream.order.lanes, self._chunk_count), len(lanes)
        )

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        while skipped(self._stream.skip, self._data_step):
            self._read_step(record=False)
            self._data_step += 1
        parts = self._read_step(record=True)
        self._data_step += 1
        self._steps += 1
        return Rows.from_ranges(parts)

    @property
    def state(self) -> ReaderState:
        """The position after the rows that were read so far."""
        positions = {
            lane.index: LanePosition(lane.ordinal, lane.row) for lane in self._lanes.values()
        }
        return ReaderState(self._data_step, positions, self._skipped)

    @property
    def ended(self) -> bool:
        """Whether the lanes have no rows left."""
        return all(self._has_ended(lane) for lane in self._lanes.values())

    def progress(self) -> int:
        """Returns how much of each lane was read, summed over the lanes, in units of 1 / UNIT.

        Chunks count the same whatever their rows. Needs the order's `epochs`, and a step that was
        read.
        """
        total, lanes = 0, self._stream.order.lanes
        for lane in self._lanes.values():
            chunks = -(-((self._chunk_count or 0) - lane.index) // lanes)
            if self._has_ended(lane) or chunks <= 0:
                total += UNIT
                continue
            length = len(lane.chunks[0].hashes) if lane.row else 1
            total += UNIT * (lane.ordinal * length + lane.row) // (chunks * length)
        return total

    def take_read_ranges(self) -> list[ReadRange]:
        """Returns what was read since the last call, for the ledger."""
        read_ranges, self._read_ranges = self._read_ranges, []
        return [ReadRange(*fields) for fields in read_ranges]

    def _has_ended(self, lane: _Lane) -> bool:
        return (
            self._chunk_count is not None
            and lane.ordinal * self._stream.order.lanes + lane.index >= self._chunk_count
        )

    def _read_step(self, record: bool) -> list[tuple[Rows, int, int]]:
        """Reads the rows of a data step.

        Args:
            record: Whether to note the rows for the ledger. False for a skipped data step.

        Returns:
            (rows, start, stop) of each range, for `Rows.of`. A lane has several if its rows lie in
            several chunks.
        """
        ranges: list[tuple[Rows, int, int]] = []
        for lane in self._lanes.values():
            missing = self._rows_per_lane
            while missing:
                if not lane.chunks and self._has_ended(lane):
                    ranges.append((self._padding(missing), 0, missing))
                    break
                while not lane.chunks:
                    self._receive()
                chunk, start = lane.chunks[0], lane.row
                # A run that resumes in the middle of a chunk computes it again, but has counted its
                # bad documents before.
                if start == 0 and chunk.skipped.count:
                    self._skipped += chunk.skipped.count
                    self.bad_documents.append(chunk.skipped)
                stop = min(start + missing, len(chunk.hashes))
                missing -= stop - start
                ranges.append((chunk.rows, start, stop))
                if record:
                    combined = combine_hashes(chunk.hashes[start:stop])
                    step, data_step = self._steps + 1, self._data_step + 1
                    self._read_ranges.append(
                        (step, lane.index, data_step, chunk.index, start, stop - start, combined)
                    )
                lane.advance(stop)
        return ranges

    def _padding(self, rows: int) -> Rows:
        return Rows.empty(rows, self._stream.sequence_length, self._stream.encoder.dtype)

    def _receive(self) -> None:
        """Waits for the next chunk and appends it to its lane."""
        chunk = next(self._chunks)
        expected = next(self._expected)
        if chunk.index != expected:
            raise RunError(
                f"data stream: expected chunk {expected}, found chunk {chunk.index}; "
                "no step has used it"
            )
        self._lanes[chunk.index % self._stream.order.lanes].chunks.append(chunk)

    def close(self) -> None:
        """Stops the computation of further chunks."""
        self._chunks.close()
