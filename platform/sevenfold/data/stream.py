"""The data of a run as a function from the index of a chunk to packed rows.

The function is evaluated in the process that reads the rows, or in Ray Data tasks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np

from sevenfold.data import ray_chunks
from sevenfold.data.build_chunk import build_chunk, count_rows, framed_lengths
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.lanes import lanes_of
from sevenfold.data.order import DataOrder
from sevenfold.data.permutation import shuffled
from sevenfold.data.ray_chunks import TASK_CPUS, Prefetcher
from sevenfold.data.reader import LaneReader, ReaderState, ReadRange, StreamShard
from sevenfold.data.rows import Chunk, Rows
from sevenfold.data.sources.documents import Selection, texts
from sevenfold.data.token_cache import TokenCache

__all__ = ["TASK_CPUS", "LaneReader", "ReadRange", "ReaderState", "Stream", "StreamShard"]

_Ahead = Prefetcher  # the name that tests/data/test_stream.py uses
# "docs": makes this permutation differ from others with the same seed
_SHUFFLE_DOCUMENTS = 0x646F6373


@dataclass(frozen=True)
class Stream:
    """The data of a run.

    Attributes:
        order: Which row groups form which chunk.
        selection: Which documents of a row group are read.
        encoder: Turns documents into token ids.
        sequence_length: Tokens per row.
        executor: "ray": chunks are built in Ray Data tasks; "inline": in the process that reads
            them.
        packing: "best_fit" or "concatenate", see `pack`.
        skip: Ranges (first, last) of data steps that are skipped, counted from 1, both inclusive.
        cache: Token ids that were computed beforehand. None: documents are encoded when they are
            read.
        labels: (key, value) of the node labels that restrict where Ray Data's tasks run.
    """

    order: DataOrder
    selection: Selection
    encoder: TextEncoder
    sequence_length: int
    executor: str = "ray"
    packing: str = "best_fit"
    skip: tuple[tuple[int, int], ...] = ()
    cache: TokenCache | None = None
    labels: tuple[tuple[str, str], ...] = ()

    def documents(self, shuffle: bool = False) -> Iterator[list[list[str]]]:
        """Yields the documents of each row group: for each field, the texts of all documents.

        Args:
            shuffle: Takes the row groups in an order that depends on the seed, instead of the
                manifest's.
        """
        count = len(self.order.manifest)
        groups = (
            shuffled(count, self.order.seed, _SHUFFLE_DOCUMENTS).tolist()
            if shuffle
            else range(count)
        )
        for group in groups:
            yield texts(self.selection.read(self.order.manifest, group))

    def encoded(self, groups: list[int]) -> list[Encoded]:
        """Returns the token ids of row groups.

        They come from the token cache if there is one. Else the documents are encoded.
        """
        if self.cache is not None:
            return [self.cache.read(group) for group in groups]
        manifest = self.order.manifest
        return self.encoder.encode([self.selection.read(manifest, group) for group in groups])

    def chunk(self, index: int) -> Chunk:
        """Builds a chunk in this process."""
        return build_chunk(
            self.order, self.encoded, self.encoder, self.sequence_length, self.packing, index
        )

    def count_steps(self, rows_per_lane: int) -> int:
        """Returns the number of steps, those with skipped data included, until the data ends.

        All documents are encoded once. Needs the order's `epochs`.

        Args:
            rows_per_lane: The number of rows that a step reads from each lane.
        """
        lengths = []
        for group in range(len(self.order.manifest)):
            (encoded,) = self.encoded([group])
            lengths.append(framed_lengths(np.diff(encoded.offsets), self.encoder))
        rows = [0] * self.order.lanes
        for index in range(self.order.chunks or 0):
            together = np.concatenate([lengths[group] for group in self.order.chunk(index)])
            rows[index % self.order.lanes] += count_rows(
                together, self.sequence_length, self.packing
            )
        return max(-(-count // rows_per_lane) for count in rows)

    def epoch(self) -> Rows:
        """Returns the rows of the first epoch, in the order of the chunks."""
        once = replace(self, order=replace(self.order, epochs=1))
        return Rows.concatenate([once.chunk(i).rows for i in range(once.order.chunks or 0)])

    def shard(self, rank: int, world_size: int) -> StreamShard:
        """Returns the part of the data that a rank reads."""
        return StreamShard(self, tuple(lanes_of(rank, world_size, self.order.lanes)))

    def chunks(
        self, indices: Iterator[int], lanes: int
    ) -> Generator[Chunk, None, None] | Prefetcher:
        """Returns an iterator over chunks. Its `close` stops the computation of further chunks.

        Ray Data builds the chunks ahead of time. Inline, each chunk is built when it is needed: a
        background thread would compete with the training step for the GIL, which cost a fifth more
        CPU time (benchmarks/RESULTS.md).

        Args:
            indices: The indices of the chunks, in the order in which they are needed.
            lanes: The number of lanes that take turns in `indices`.
        """
        if self.executor == "inline":
            return (self.chunk(index) for index in indices)
        return ray_chunks.prefetch(self, indices, lanes)
