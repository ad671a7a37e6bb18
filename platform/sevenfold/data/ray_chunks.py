"""Builds chunks in Ray Data tasks, ahead of the step that needs them."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sevenfold.data.rows import Chunk, Rows
from sevenfold.data.sources.documents import Skipped
from sevenfold.errors import InputError, RunError

if TYPE_CHECKING:
    from sevenfold.data.stream import Stream

# Logical CPUs of a data task. It is less than one because the data task of a worker is busy only a
# small part of the time.
TASK_CPUS = 0.25
PREFETCHED_CHUNKS = 2  # chunks that wait in the training process
# Limits of one Ray Data execution; it has at least one chunk per lane, however.
EXECUTION_BYTES = 128 * 2**20
EXECUTION_CHUNKS = 64
_BYTES_PER_TOKEN = 3  # of packed rows, roughly


def prefetch(stream: Stream, indices: Iterator[int], lanes: int) -> Prefetcher:
    """Starts to build chunks in Ray Data tasks.

    Args:
        stream: The data.
        indices: The indices of the chunks, in the order in which they are needed.
        lanes: The number of lanes that take turns in `indices`.
    """
    chunk_bytes = int(_BYTES_PER_TOKEN * stream.order.tokens / stream.order.chunks_per_epoch)
    per_execution = min(EXECUTION_CHUNKS, EXECUTION_BYTES // max(1, chunk_bytes))
    return Prefetcher(_build(stream, indices, max(lanes, per_execution)))


class Prefetcher:
    """Iterates over chunks that a background thread receives a few chunks ahead of the reader.

    Args:
        chunks: The chunks. The thread starts to consume them immediately.
    """

    def __init__(self, chunks: Generator[Chunk, None, None]):
        self._chunks = chunks
        self._ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(PREFETCHED_CHUNKS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="sevenfold-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        item = self._ready.get()
        if item is None:
            self._put(None)  # so that a further call ends as well
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread and waits for it: Ray must not be shut down while the thread uses it."""
        self._stop.set()
        self._thread.join(60)

    def _put(self, item: Chunk | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _receive(self) -> None:
        """Runs in the thread. An error is passed to the reader, and None marks the end."""
        try:
            for chunk in self._chunks:
                self._put(chunk)
                if self._stop.is_set():
                    return
            self._put(None)
        except BaseException as e:
            self._put(e)
        finally:
            self._chunks.close()  # ends the Ray Data execution that still runs


def _build(
    stream: Stream, indices: Iterator[int], per_execution: int
) -> Generator[Chunk, None, None]:
    """Builds chunks in Ray Data tasks. Each chunk is one block, and the blocks come in order.

    An execution has only a few chunks. If it had all of them and its limits held it back, it would
    spin in this process (Ray 2.60: without an active task, its loop has nothing to wait on), which
    took more than half of the training speed (benchmarks/RESULTS.md).
    """
    import ray

    # in a list, the reference is not resolved for each task; each process fetches the stream once
    shared = [ray.put(stream)]

    def build(batch: dict[str, np.ndarray]) -> pa.Table:
        (index,) = batch["chunk"].tolist()
        try:
            return _to_arrow(_stream_of(shared[0]).chunk(index))
        except (InputError, RunError) as e:
            # as data: Ray Data would wrap the error in others, and lose what it is
            return pa.table({"wrong_input": [isinstance(e, InputError)], "error": [str(e)]})

    while inputs := [{"chunk": index} for index in itertools.islice(indices, per_execution)]:
        with ray.data.DataContext.current(_context(dict(stream.labels))):
            chunks = ray.data.from_items(inputs, override_num_blocks=len(inputs)).map_batches(
                build, batch_size=1, num_cpus=TASK_CPUS
            )
            # Not iter_batches: each call leaves a thread behind (Ray 2.60), which holds blocks and
            # breaks Ray's shutdown.
            for bundle in chunks.iter_internal_ref_bundles():
                for block in ray.get(list(bundle.block_refs)):
                    if "error" in block.column_names:
                        error = InputError if block["wrong_input"][0].as_py() else RunError
                        raise error(block["error"][0].as_py())
                    yield _from_arrow(block.combine_chunks(), stream.sequence_length)


@functools.lru_cache(maxsize=2)
def _stream_of(reference: Any) -> Stream:
    """Fetches the stream from Ray's object store, once per process."""
    import ray

    stream: Stream = ray.get(reference)
    return stream


def _context(labels: dict[str, str]) -> Any:
    """Returns the settings of an execution.

    Blocks keep their order, without which nothing would be reproducible. One task runs at a time:
    it builds about 20 M tokens per second, and each further task is a process that has to import
    and warm up its own encoder (benchmarks/RESULTS.md).

    Args:
        labels: The labels of the nodes that the tasks run on. Empty: all nodes.
    """
    from ray.data import DataContext, ExecutionOptions, ExecutionResources

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources.for_limits(cpu=TASK_CPUS),
        label_selector=labels or None,
    )
    return context


def _to_arrow(chunk: Chunk) -> pa.Table:
    """Converts a chunk to a block of Ray Data, one row per packed row, without `pieces`."""
    rows = chunk.rows

    def fixed(array: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])

    count = len(rows)
    columns = {
        "chunk": pa.array(np.full(count, chunk.index)),
        "tokens": fixed(rows.tokens),
        "starts": pa.ListArray.from_arrays(
            pa.array(rows.bounds, pa.int32()), pa.array(rows.starts)
        ),
        "used": pa.array(rows.used),
        "hash": pa.array(chunk.hashes),
        "skipped": pa.array(np.full(count, chunk.skipped.count)),
        "complaint": pa.array([chunk.skipped.first] * count).dictionary_encode(),
    }
    if rows.targets is not None:
        columns["targets"] = fixed(rows.targets.view(np.uint8))
    return pa.table(columns)


def _from_arrow(block: pa.Table, sequence_length: int) -> Chunk:
    """Converts a block back to its chunk, without copying the arrays."""

    def fixed(name: str) -> np.ndarray:
        return block[name].chunk(0).flatten().to_numpy().reshape(-1, sequence_length)

    rows = Rows(
        fixed("tokens"),
        block["starts"].chunk(0).flatten().to_numpy(),
        block["used"].chunk(0).to_numpy(),
        fixed("targets").view(bool) if "targets" in block.column_names else None,
    )
    skipped = Skipped(block["skipped"][0].as_py(), block["complaint"][0].as_py())
    return Chunk(block["chunk"][0].as_py(), rows, block["hash"].chunk(0).to_numpy(), skipped)
