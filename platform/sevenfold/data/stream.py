"""Who makes the windows (Ray Data tasks or a thread), and how a rank draws the rows of a step from its lanes."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sevenfold.data.order import LanePosition, Plan, lanes_of, windows_of
from sevenfold.data.rows import Rows, make_window
from sevenfold.data.tokens import Encoder
from sevenfold.errors import RunError

TASK_CPUS = 0.25  # logical: a data task of a worker is at work for a small part of the time
AHEAD = 2  # windows made ahead of those that are read
CHUNK_BYTES, CHUNK_WINDOWS = 16 * 2**20, 64  # most that one Ray Data execution makes rows of, but a window a lane


@dataclass(frozen=True)
class Stream:
    """The data of a run: a function from (window) to rows, and who evaluates it. Pickles in a few kB + tokenizer."""

    plan: Plan
    encoder: Encoder
    sequence_length: int
    executor: str = "ray"

    def window(self, index: int) -> Rows:
        return make_window(self.plan, self.encoder, self.sequence_length, index)

    def epoch(self, limit: int | None = None) -> Rows:
        """The first `limit` rows of the first epoch (all of them without a limit), in the order of the windows."""
        parts: list[Rows] = []
        for index in range(self.plan.windows_per_epoch):
            if limit is not None and sum(map(len, parts)) >= limit:
                break
            parts.append(self.window(index))
        return Rows.concatenate(parts)[slice(0, limit)]

    def shard(self, rank: int, world_size: int) -> Shard:
        return Shard(self, tuple(lanes_of(rank, world_size, self.plan.lanes)))

    def windows(self, order: Iterator[int], lanes: int) -> Iterator[tuple[int, Rows]]:
        """(index, rows) of the windows of this order, made ahead. lanes: how many take turns in it."""
        if self.executor == "inline":
            return _ahead((index, self.window(index)) for index in order)
        window_bytes = self.plan.manifest.bytes // self.plan.windows_per_epoch
        return _ahead(_by_ray(self, order, max(lanes, min(CHUNK_WINDOWS, CHUNK_BYTES // max(1, window_bytes)))))


@dataclass(frozen=True)
class Shard:
    """What Ray Train hands a worker: the lanes that its rank serves."""

    stream: Stream
    lanes: tuple[int, ...]

    def reader(self, rows_per_lane: int, positions: dict[int, LanePosition] | None = None) -> LaneReader:
        return LaneReader(self.stream, self.lanes, rows_per_lane, positions or {})


class LaneReader:
    """Iterates over a rank's rows of each step: `rows_per_lane` of each of its lanes, in lane order.

    Attributes:
        positions: where each lane stands after the rows served so far.
    """

    def __init__(self, stream: Stream, lanes: tuple[int, ...], rows_per_lane: int, positions: dict[int, LanePosition]):
        self.positions = {lane: positions.get(lane, LanePosition()) for lane in lanes}
        self._lanes, self._rows = stream.plan.lanes, rows_per_lane
        self._expected = windows_of(dict(self.positions), self._lanes)
        self._windows = stream.windows(windows_of(dict(self.positions), self._lanes), len(lanes))
        self._waiting: dict[int, list[Rows]] = {lane: [] for lane in lanes}

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return Rows.concatenate([part for lane in self.positions for part in self._draw(lane)])

    def _draw(self, lane: int) -> list[Rows]:
        out: list[Rows] = []
        need = self._rows
        while need:
            while not self._waiting[lane]:
                self._receive()
            position, window = self.positions[lane], self._waiting[lane][0]
            part = window[slice(position.row, position.row + need)]
            need -= len(part)
            out.append(part)
            row = position.row + len(part)
            if row < len(window):
                self.positions[lane] = LanePosition(position.ordinal, row)
            else:
                self.positions[lane] = LanePosition(position.ordinal + 1, 0)
                self._waiting[lane].pop(0)
        return out

    def _receive(self) -> None:
        index, rows = next(self._windows)
        expected = next(self._expected)
        if index != expected:
            raise RunError(f"the data stream delivered window {index} where {expected} was due: nothing was trained on it")
        self._waiting[index % self._lanes].append(rows)

    def close(self) -> None:
        self._windows.close()  # type: ignore[attr-defined]


def _ahead(windows: Generator[tuple[int, Rows], None, None]) -> Iterator[tuple[int, Rows]]:
    """Draws from an iterator in a background thread, a few windows ahead of who reads."""
    ready: queue.Queue[tuple[int, Rows] | BaseException] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: tuple[int, Rows] | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in windows:
                put(item)
                if stop.is_set():
                    return
        except BaseException as e:
            put(e)
        finally:
            windows.close()  # ends what Ray Data still executes

    thread = threading.Thread(target=work, name="sevenfold-data", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(60)  # Ray must not be shut down under it


def _by_ray(stream: Stream, order: Iterator[int], chunk: int) -> Generator[tuple[int, Rows], None, None]:
    """Makes the windows in Ray Data tasks: one row a window descriptor, one block a window, blocks in order.

    A few windows an execution: one that is held back by its limits instead spins in this process (Ray 2.60: without an
    active task its loop has nothing to wait on) and took more than half of the step's speed (benchmarks/RESULTS.md).
    """
    import ray

    shape = (-1, stream.sequence_length)

    def make(batch: dict[str, np.ndarray]) -> pa.Table:
        (index,) = batch["window"].tolist()
        rows = stream.window(index)
        return pa.table(
            {
                "window": pa.array(np.full(len(rows), index)),
                "tokens": _fixed(rows.tokens),
                "marks": _fixed(rows.marks),
            }
        )

    while True:
        wanted = [{"window": i} for i in itertools.islice(order, chunk)]
        with ray.data.DataContext.current(_context()):
            windows = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
                make, batch_size=1, num_cpus=TASK_CPUS
            )
            block: Any
            for block in windows.iter_batches(batch_size=None, batch_format="pyarrow"):
                block = block.combine_chunks()
                index = block["window"][0].as_py()
                tokens, marks = (block[c].chunk(0).flatten().to_numpy().reshape(shape) for c in ("tokens", "marks"))
                yield index, Rows(tokens, marks)


def _fixed(rows: np.ndarray) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def _context() -> Any:
    """Blocks in order: without it nothing is reproducible. A task a CPU, and one at a time."""
    from ray.data import DataContext, ExecutionOptions, ExecutionResources

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=ExecutionResources.for_limits(cpu=1))
    return context
