"""Who makes the windows (Ray Data tasks or the reader itself), and how a rank draws the rows of a step from its lanes."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sevenfold.data.cache import TokenCache
from sevenfold.data.documents import Selection, Skipped, texts
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.order import LanePosition, Plan, lanes_of, shuffled, skipped, windows_of
from sevenfold.data.rows import Rows, Window, make_window, together
from sevenfold.errors import RunError

TASK_CPUS = 0.25  # logical: a data task of a worker is at work for a small part of the time
AHEAD = 2  # windows made ahead of those that are read
CHUNK_BYTES, CHUNK_WINDOWS = 128 * 2**20, 64  # most that one Ray Data execution makes rows of, but a window a lane


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
    labels: tuple[tuple[str, str], ...] = ()  # of the nodes that Ray Data's tasks run on

    def documents(self, shuffle: bool = False) -> Iterator[list[list[str]]]:
        """The texts of each row group, in the manifest's order or by the plan's seed: one list a field."""
        groups = len(self.plan.manifest)
        for group in shuffled(groups, self.plan.seed, 0x646F6373).tolist() if shuffle else range(groups):
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

    def windows(self, order: Iterator[int], lanes: int) -> Generator[Window, None, None] | _Ahead:
        """The windows of this order. lanes: how many take turns in it. Ray Data makes them ahead; inline they are made as
        they are needed: a thread beside the step would fight it for the GIL (a fifth more CPU, benchmarks/RESULTS.md)."""
        if self.executor == "inline":
            return (self.window(index) for index in order)
        size = int(3 * self.plan.tokens / self.plan.windows_per_epoch)
        return _Ahead(_by_ray(self, order, max(lanes, min(CHUNK_WINDOWS, CHUNK_BYTES // max(1, size)))))


@dataclass(frozen=True)
class Shard:
    """A worker's part of a stream: the lanes that its rank serves."""

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


@dataclass(slots=True)
class _Lane:
    number: int
    ordinal: int
    row: int
    waiting: deque[Window] = field(default_factory=deque)  # the first one is window `ordinal` of the lane

    def serve(self, end: int) -> None:
        """Its rows up to `end` of the first window have been given."""
        self.row = end
        if end == len(self.waiting[0].hashes):
            self.ordinal, self.row = self.ordinal + 1, 0
            self.waiting.popleft()


class LaneReader:
    """Iterates over a rank's rows of each step: `rows_per_lane` of each of its lanes, in lane order. It has no end of its
    own: a lane that is over (data.epochs) gives rows of padding, and a run stops where those of all ranks have `ended`.

    Attributes:
        complaints: what was wrong with bad documents that were left out, one a window.
    """

    def __init__(self, stream: Stream, lanes: tuple[int, ...], rows_per_lane: int, state: ReaderState, step: int = 0):
        positions = {lane: state.positions.get(lane, LanePosition()) for lane in lanes}
        self._draws: list[tuple[int, ...]] = []  # as Draw; plain, since there are many
        self.complaints: list[Skipped] = []
        self._stream, self._rows, self._end = stream, rows_per_lane, stream.plan.windows
        self._lanes = {lane: _Lane(lane, *at) for lane, at in positions.items()}
        self._expected = windows_of(positions, stream.plan.lanes, self._end)
        self._windows = stream.windows(windows_of(positions, stream.plan.lanes, self._end), len(lanes))
        self._served, self._data_step, self._skipped = step, state.data_step, state.skipped

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        while skipped(self._stream.skip, self._data_step):
            self._step(keep=False)
            self._data_step += 1
        parts = self._step(keep=True)
        self._data_step += 1
        self._served += 1
        return Rows.of(parts)

    @property
    def state(self) -> ReaderState:
        """After the rows served so far."""
        positions = {lane.number: LanePosition(lane.ordinal, lane.row) for lane in self._lanes.values()}
        return ReaderState(self._data_step, positions, self._skipped)

    @property
    def ended(self) -> bool:
        """Whether these lanes have no row left."""
        return all(self._over(lane) for lane in self._lanes.values())

    def take_draws(self) -> list[Draw]:
        """Of the rows served since they were taken last."""
        taken, self._draws = self._draws, []
        return [Draw(*d) for d in taken]

    def _over(self, lane: _Lane) -> bool:
        return self._end is not None and lane.ordinal * self._stream.plan.lanes + lane.number >= self._end

    def _step(self, keep: bool) -> list[tuple[Rows, int, int]]:
        """(rows, begin, end) of what each lane gives."""
        out: list[tuple[Rows, int, int]] = []
        for lane in self._lanes.values():
            need = self._rows
            while need:
                if not lane.waiting and self._over(lane):
                    out.append((Rows.empty(need, self._stream.sequence_length, self._stream.encoder.dtype), 0, need))
                    break
                while not lane.waiting:
                    self._receive()
                window, begin = lane.waiting[0], lane.row
                if not begin and window.skipped.count:  # not of a window that a resumed run makes again
                    self._skipped += window.skipped.count
                    self.complaints.append(window.skipped)
                end = min(begin + need, len(window.hashes))
                need -= end - begin
                out.append((window.rows, begin, end))
                if keep:
                    digest = together(window.hashes[begin:end])
                    at = (self._served + 1, lane.number, self._data_step + 1)
                    self._draws.append((*at, window.index, begin, end - begin, digest))
                lane.serve(end)
        return out

    def _receive(self) -> None:
        window = next(self._windows)
        expected = next(self._expected)
        if window.index != expected:
            raise RunError(
                f"the data stream delivered window {window.index} where {expected} was due: nothing was trained on it"
            )
        self._lanes[window.index % self._stream.plan.lanes].waiting.append(window)

    def close(self) -> None:
        self._windows.close()


class _Ahead:
    """Draws from an iterator in a background thread, from now on, a few windows ahead of who reads."""

    def __init__(self, windows: Generator[Window, None, None]):
        self._windows = windows
        self._ready: queue.Queue[Window | BaseException | None] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sevenfold-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Window]:
        return self

    def __next__(self) -> Window:
        item = self._ready.get()
        if item is None:
            self._put(None)  # for whoever asks again
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join(60)  # Ray must not be shut down under it

    def _put(self, item: Window | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            for item in self._windows:
                self._put(item)
                if self._stop.is_set():
                    return
            self._put(None)
        except BaseException as e:
            self._put(e)
        finally:
            self._windows.close()  # ends what Ray Data still executes


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
        with ray.data.DataContext.current(_context(dict(stream.labels))):
            windows = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
                make, batch_size=1, num_cpus=TASK_CPUS
            )
            # not iter_batches: it leaves a thread behind each time (Ray 2.60), which holds blocks and breaks Ray's end
            for bundle in windows.iter_internal_ref_bundles():
                for block in ray.get(list(bundle.block_refs)):
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
        "starts": pa.ListArray.from_arrays(pa.array(rows.bounds, pa.int32()), pa.array(rows.starts)),
        "used": pa.array(rows.used),
        "hash": pa.array(window.hashes),
        "skipped": pa.array(np.full(n, window.skipped.count)),
        "complaint": pa.array([window.skipped.first] * n).dictionary_encode(),
    }
    if rows.targets is not None:
        columns["targets"] = fixed(rows.targets.view(np.uint8))
    return pa.table(columns)


def _from_arrow(block: pa.Table, sequence_length: int) -> Window:
    def fixed(name: str) -> np.ndarray:
        return block[name].chunk(0).flatten().to_numpy().reshape(-1, sequence_length)

    targets = fixed("targets").view(bool) if "targets" in block.column_names else None
    rows = Rows(fixed("tokens"), block["starts"].chunk(0).flatten().to_numpy(), block["used"].chunk(0).to_numpy(), targets)
    wrong = Skipped(block["skipped"][0].as_py(), block["complaint"][0].as_py())
    return Window(block["window"][0].as_py(), rows, block["hash"].chunk(0).to_numpy(), wrong)


def _context(labels: dict[str, str]) -> Any:
    """Blocks in order: without it nothing is reproducible. One task at a time makes some 20 M tokens a second, and each
    more is a process that imports and warms its encoder for itself (benchmarks/RESULTS.md)."""
    from ray.data import DataContext, ExecutionOptions, ExecutionResources

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources.for_limits(cpu=TASK_CPUS), label_selector=labels or None
    )
    return context
