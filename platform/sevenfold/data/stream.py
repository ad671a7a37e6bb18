"""Who makes the windows (Ray Data tasks or a thread), and how a rank draws the rows of a step from its lanes."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sevenfold.data.cache import TokenCache
from sevenfold.data.documents import Selection, Skipped, texts
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.order import LanePosition, Plan, lanes_of, skipped, windows_of
from sevenfold.data.rows import Rows, Window, make_window
from sevenfold.errors import RunError

TASK_CPUS = 0.25  # logical: a data task of a worker is at work for a small part of the time
AHEAD = 2  # windows made ahead of those that are read
CHUNK_BYTES, CHUNK_WINDOWS = 64 * 2**20, 64  # most that one Ray Data execution makes rows of, but a window a lane


@dataclass(frozen=True)
class Stream:
    """The data of a run: a function from (window) to rows, and who evaluates it."""

    plan: Plan
    selection: Selection
    encoder: TextEncoder
    sequence_length: int
    executor: str = "ray"
    packing: str = "best_fit"
    skip: tuple[tuple[int, int], ...] = ()  # data steps passed over, from 1, inclusive
    cache: TokenCache | None = None

    def documents(self) -> Iterator[list[list[str]]]:
        """The texts of each row group, in the manifest's order: one list a field."""
        for group in range(len(self.plan.manifest)):
            yield texts(self.selection.read(self.plan.manifest, group))

    def encoded(self, groups: list[int]) -> list[Encoded]:
        """The ids of the row groups' documents: from the token cache where there is one, else from their text."""
        if self.cache is not None:
            return [self.cache.read(g) for g in groups]
        return self.encoder.encode([self.selection.read(self.plan.manifest, g) for g in groups])

    def window(self, index: int) -> Window:
        return make_window(self.plan, self.encoded, self.encoder, self.sequence_length, self.packing, index)

    def epoch(self, limit: int | None = None) -> Rows:
        """The first `limit` rows of the first epoch (all of them without a limit), in the order of the windows."""
        once = replace(self, plan=replace(self.plan, epochs=1))
        parts: list[Rows] = []
        for index in range(once.plan.windows or 0):
            if limit is not None and sum(map(len, parts)) >= limit:
                break
            parts.append(once.window(index).rows)
        whole = Rows.concatenate(parts)
        return whole if limit is None else whole.part(0, min(limit, len(whole)))

    def shard(self, rank: int, world_size: int) -> Shard:
        return Shard(self, tuple(lanes_of(rank, world_size, self.plan.lanes)))

    def windows(self, order: Iterator[int], lanes: int) -> Iterator[Window]:
        """The windows of this order, made ahead. lanes: how many take turns in it."""
        if self.executor == "inline":
            return _ahead(self.window(index) for index in order)
        size = int(3 * self.plan.tokens / self.plan.windows_per_epoch)
        return _ahead(_by_ray(self, order, max(lanes, min(CHUNK_WINDOWS, CHUNK_BYTES // max(1, size)))))


@dataclass(frozen=True)
class Shard:
    """What Ray Train hands a worker: the lanes that its rank serves."""

    stream: Stream
    lanes: tuple[int, ...]

    def reader(self, rows_per_lane: int, state: ReaderState | None = None, step: int = 0) -> LaneReader:
        """step: how many steps were done before."""
        return LaneReader(self.stream, self.lanes, rows_per_lane, state or ReaderState(), step)


@dataclass
class ReaderState:
    """Where a reader stands: plain numbers, the same for every number of workers once the ranks' lanes are put together.

    Attributes:
        data_step: steps that the data was drawn for, skipped ones included.
        positions: by lane; one that is missing stands at its beginning.
        skipped: bad documents left out so far, by all lanes.
    """

    data_step: int = 0
    positions: dict[int, LanePosition] = field(default_factory=dict)
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        positions = {str(lane): [p.ordinal, p.row] for lane, p in self.positions.items()}
        return {"data_step": self.data_step, "positions": positions, "skipped": self.skipped}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> ReaderState:
        positions = {int(lane): LanePosition(*p) for lane, p in tree["positions"].items()}
        return ReaderState(tree["data_step"], positions, tree["skipped"])

    @staticmethod
    def together(parts: Sequence[ReaderState], before: int) -> ReaderState:
        """Of all ranks. before: bad documents that each of them began with."""
        positions = {lane: p for part in parts for lane, p in part.positions.items()}
        return ReaderState(parts[0].data_step, positions, before + sum(part.skipped - before for part in parts))


class Draw(NamedTuple):
    """What a lane gave to a step: `rows` rows of a window from `row` on. Steps and data steps count from 1."""

    step: int
    lane: int
    data_step: int
    window: int
    row: int
    rows: int
    hash: int


class LaneReader:
    """Iterates over a rank's rows of each step: `rows_per_lane` of each of its lanes, in lane order. Where the data ends
    (data.epochs) rows of padding fill up, and then StopIteration ends it.

    Attributes:
        state: after the rows served so far.
        draws: of the rows served since they were taken last (`take_draws`).
        complaints: what was wrong with bad documents that were left out, one a window.
    """

    def __init__(self, stream: Stream, lanes: tuple[int, ...], rows_per_lane: int, state: ReaderState, step: int = 0):
        positions = {lane: state.positions.get(lane, LanePosition()) for lane in lanes}
        self.state = ReaderState(state.data_step, positions, state.skipped)
        self.draws: list[Draw] = []
        self.complaints: list[Skipped] = []
        self._stream, self._rows, self._end = stream, rows_per_lane, stream.plan.windows
        self._lanes = stream.plan.lanes
        self._expected = windows_of(dict(positions), self._lanes, self._end)
        self._windows = stream.windows(windows_of(dict(positions), self._lanes, self._end), len(lanes))
        self._waiting: dict[int, list[Window]] = {lane: [] for lane in lanes}
        self._served = step

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        while skipped(self._stream.skip, self.state.data_step):
            self._step(keep=False)
        rows = self._step(keep=True)
        self._served += 1
        return rows

    @property
    def ended(self) -> bool:
        """Whether these lanes have no row left."""
        return self._end is not None and all(self._over(lane) for lane in self.state.positions)

    def take_draws(self) -> list[Draw]:
        taken, self.draws = self.draws, []
        return taken

    def _over(self, lane: int) -> bool:
        return self._end is not None and self.state.positions[lane].ordinal * self._lanes + lane >= self._end

    def _step(self, keep: bool) -> Rows:
        parts = [part for lane in self.state.positions for part in self._draw(lane, keep)]
        self.state.data_step += 1
        return Rows.concatenate(parts)

    def _draw(self, lane: int, keep: bool) -> list[Rows]:
        out: list[Rows] = []
        need = self._rows
        while need:
            if self._over(lane):
                out.append(Rows.empty(need, self._stream.sequence_length, self._stream.encoder.dtype))
                break
            while not self._waiting[lane]:
                self._receive()
            position, window = self.state.positions[lane], self._waiting[lane][0]
            if window.skipped.count and not position.row:  # not of a window that a resumed run makes again
                self.state.skipped += window.skipped.count
                self.complaints.append(window.skipped)
            part = window.rows.part(position.row, min(position.row + need, len(window.rows)))
            need -= len(part)
            out.append(part)
            if keep:
                self.draws.append(
                    Draw(self._served + 1, lane, self.state.data_step + 1, window.index, position.row, len(part), part.hash())
                )
            row = position.row + len(part)
            if row < len(window.rows):
                self.state.positions[lane] = LanePosition(position.ordinal, row)
            else:
                self.state.positions[lane] = LanePosition(position.ordinal + 1, 0)
                self._waiting[lane].pop(0)
        return out

    def _receive(self) -> None:
        window = next(self._windows)
        expected = next(self._expected)
        if window.index != expected:
            raise RunError(
                f"the data stream delivered window {window.index} where {expected} was due: nothing was trained on it"
            )
        self._waiting[window.index % self._lanes].append(window)

    def close(self) -> None:
        self._windows.close()  # type: ignore[attr-defined]


def _ahead(windows: Generator[Window, None, None]) -> Iterator[Window]:
    """Draws from an iterator in a background thread, a few windows ahead of who reads."""
    ready: queue.Queue[Window | BaseException | None] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: Window | BaseException | None) -> None:
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
            put(None)
        except BaseException as e:
            put(e)
        finally:
            windows.close()  # ends what Ray Data still executes

    thread = threading.Thread(target=work, name="sevenfold-data", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(60)  # Ray must not be shut down under it


def _by_ray(stream: Stream, order: Iterator[int], chunk: int) -> Generator[Window, None, None]:
    """Makes the windows in Ray Data tasks: one row a window descriptor, one block a window, blocks in order.

    A few windows an execution: one that is held back by its limits instead spins in this process (Ray 2.60: without an
    active task its loop has nothing to wait on) and took more than half of the step's speed (benchmarks/RESULTS.md).
    """
    import ray

    shared = [ray.put(stream)]  # in a list it is not fetched for each task, but once a process

    def make(batch: dict[str, np.ndarray]) -> pa.Table:
        (index,) = batch["window"].tolist()
        return _to_arrow(_stream_of(shared[0]).window(index))

    while wanted := [{"window": i} for i in itertools.islice(order, chunk)]:
        with ray.data.DataContext.current(_context()):
            windows = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
                make, batch_size=1, num_cpus=TASK_CPUS
            )
            for block in windows.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield _from_arrow(block.combine_chunks(), stream.sequence_length)


@functools.lru_cache(maxsize=2)
def _stream_of(reference: Any) -> Stream:
    import ray

    found: Stream = ray.get(reference)
    return found


def _to_arrow(window: Window) -> pa.Table:
    rows = window.rows

    def fixed(array: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])

    n = len(rows)
    columns = {
        "window": pa.array(np.full(n, window.index)),
        "tokens": fixed(rows.tokens),
        "starts": pa.ListArray.from_arrays(pa.array(rows.bounds.astype(np.int32)), pa.array(rows.starts)),
        "used": pa.array(rows.used),
        "skipped": pa.array(np.full(n, window.skipped.count)),
        "complaint": pa.array([window.skipped.first] * n).dictionary_encode(),
    }
    if rows.targets is not None:
        columns["targets"] = fixed(rows.targets.view(np.uint8))
    return pa.table(columns)


def _from_arrow(block: pa.Table, sequence_length: int) -> Window:
    def fixed(name: str) -> np.ndarray:
        return block[name].chunk(0).flatten().to_numpy().reshape(-1, sequence_length)

    starts = block["starts"].chunk(0)
    bounds = starts.offsets.to_numpy().astype(np.int64)
    targets = fixed("targets").view(bool) if "targets" in block.column_names else None
    rows = Rows(fixed("tokens"), starts.flatten().to_numpy(), bounds - bounds[0], block["used"].chunk(0).to_numpy(), targets)
    wrong = Skipped(block["skipped"][0].as_py(), block["complaint"][0].as_py())
    return Window(block["window"][0].as_py(), rows, wrong)


def _context() -> Any:
    """Blocks in order: without it nothing is reproducible. A task a CPU, and one at a time."""
    from ray.data import DataContext, ExecutionOptions, ExecutionResources

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=ExecutionResources.for_limits(cpu=1))
    return context
