"""The order of the data: arithmetic on manifest, mixture and seed.

The order does not depend on the number of workers.

The row groups of each source are shuffled anew for each epoch of that source. A slot is a place in
the order that holds one row group, and a fixed pattern says which source fills each slot, so that
the tokens keep the mixture's proportions everywhere. Slots are cut into chunks, which are numbered
through all epochs. With L lanes, lane l owns the chunks l, l + L, l + 2L and so on. A global batch
takes the same number of rows from each lane, and each rank serves a contiguous range of lanes.
Without weights, all sources form one pool, which is shuffled as a whole.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sevenfold.data.manifest import Manifest
from sevenfold.data.permutation import permuted, shuffled
from sevenfold.errors import InputError
from sevenfold.recipe import Data

MAX_GROUPS_PER_CHUNK = 16  # row groups per chunk
# The minimum number of chunks that each lane gets in an epoch, or in a stage of the curriculum, if
# there is enough data.
CHUNKS_PER_LANE = 4
MAX_CHUNK_TOKENS = 4_000_000
# The maximum number of tokens in the current chunks of all lanes. These chunks are in memory, and
# a run that resumes builds them again.
MAX_LANES_TOKENS = 64_000_000
LANES_BYTES = 4 * MAX_LANES_TOKENS  # of text, with 4 bytes per token
# How the row groups of an epoch are permuted, by the version of the order that a run was started
# with: as a list (1), or by a Feistel network, whose elements are computed one by one (2).
LISTED, FEISTEL = 1, 2
# Shares are integers that sum to this, so that the order is the same on every machine.
_UNIT = 2**32


@dataclass(frozen=True)
class _Segment:
    """The slots from `first` on, up to the next segment, in which each pool has a constant share.

    Attributes:
        first: The first slot.
        shares: The share of the slots of each pool, in parts of _UNIT.
        before: The number of slots that each pool filled before `first`.
    """

    first: int
    shares: tuple[int, ...]
    before: tuple[int, ...]

    def slots_before(self, slot: int) -> list[int]:
        """Returns the number of slots before this one that each pool fills.

        Each number is within one or two of the pool's exact share.
        """
        remaining, remaining_shares = slot - self.first, _UNIT
        counts = []
        for share in self.shares[:-1]:
            count = 0
            if remaining_shares:
                rounded = (share * remaining + remaining_shares // 2) // remaining_shares
                count = min(remaining, rounded)
            counts.append(count)
            remaining, remaining_shares = remaining - count, remaining_shares - share
        counts.append(remaining)
        return [before + count for before, count in zip(self.before, counts, strict=True)]


@dataclass(frozen=True)
class DataOrder:
    """The order of the data of a run.

    Attributes:
        manifest: The files and their row groups.
        seed: The seed of the permutations.
        lanes: The number of lanes.
        stages: The mixture: (token at which the stage begins, weight of each source), sorted.
            Empty: sources are mixed in proportion to their sizes.
        epochs: The maximum number of times that a row group is read. None: no limit.
        version: How row groups are permuted, LISTED or FEISTEL.
    """

    manifest: Manifest
    seed: int
    lanes: int
    stages: tuple[tuple[int, tuple[float, ...]], ...] = ()
    epochs: int | None = None
    version: int = FEISTEL

    @staticmethod
    def from_manifest(
        manifest: Manifest, data: Data, seed: int, lanes: int, version: int = FEISTEL
    ) -> DataOrder:
        """Returns the order that a recipe's `data` section describes."""
        stages: list[tuple[int, tuple[float, ...]]] = []
        if data.sources[0].weight is not None:
            stages.append((0, tuple(float(source.weight or 0) for source in data.sources)))
            stages += [
                (stage.at_tokens, tuple(stage.weights.get(s.name, 0.0) for s in data.sources))
                for stage in data.curriculum
            ]
        return DataOrder(manifest, seed, lanes, tuple(stages), data.epochs, version)

    @functools.cached_property
    def pools(self) -> tuple[range, ...]:
        """The row groups that are shuffled together: a range per source, or one of all sources."""
        return self.manifest.spans if self.stages else (range(len(self.manifest)),)

    @functools.cached_property
    def tokens(self) -> float:
        """The estimated number of tokens of all sources, each counted once."""
        return sum(self.manifest.tokens(s) for s in range(len(self.manifest.sources)))

    @functools.cached_property
    def groups_per_chunk(self) -> int:
        """The number of row groups in each chunk."""
        max_tokens = min(MAX_CHUNK_TOKENS, MAX_LANES_TOKENS // self.lanes)
        for (begin, _), (end, _) in zip(self.stages, self.stages[1:], strict=False):
            max_tokens = min(max_tokens, (end - begin) // (self.lanes * CHUNKS_PER_LANE))
        by_tokens = int(max_tokens / max(1.0, self.tokens / len(self.manifest)))
        by_count = len(self.manifest) // (self.lanes * CHUNKS_PER_LANE)
        return max(1, min(MAX_GROUPS_PER_CHUNK, by_count, by_tokens))

    @functools.cached_property
    def chunks_per_epoch(self) -> int:
        """The number of chunks that hold all row groups once, rounded up."""
        return -(-len(self.manifest) // self.groups_per_chunk)

    @functools.cached_property
    def segments(self) -> tuple[_Segment, ...]:
        """The stages of the mixture, in slots.

        A stage consists of whole rounds of chunks. A round is one chunk for each lane.

        Raises:
            InputError: A stage of the curriculum is shorter than half a round of chunks.
        """
        if not self.stages:
            return (_Segment(0, (_UNIT,), (0,)),)
        group_tokens = [
            max(1.0, self.manifest.tokens(s) / len(span)) for s, span in enumerate(self.pools)
        ]
        segments: list[_Segment] = []
        for i, (begin, weights) in enumerate(self.stages):
            shares = _shares(weights, group_tokens)
            if not segments:
                segments.append(_Segment(0, shares, (0,) * len(shares)))
                continue
            round_slots = self.groups_per_chunk * self.lanes
            last = segments[-1]
            slot_tokens = sum(
                share / _UNIT * tokens
                for share, tokens in zip(last.shares, group_tokens, strict=True)
            )
            rounds = round((begin - self.stages[i - 1][0]) / (slot_tokens * round_slots))
            if not rounds:
                raise InputError(
                    f"data.curriculum: the stage before token {begin:,} is too short: expected at "
                    f"least {slot_tokens * round_slots:,.0f} tokens, one chunk for each of "
                    f"{self.lanes} lanes; make the stage longer, or set fewer data.lanes"
                )
            first = last.first + rounds * round_slots
            segments.append(_Segment(first, shares, tuple(last.slots_before(first))))
        return tuple(segments)

    def slots_before(self, slot: int) -> list[int]:
        """Returns the number of slots before this one that each pool fills.

        It is also the number of row groups that were read from the pool, through all epochs.
        """
        return self._segment(slot).slots_before(slot)

    @functools.cached_property
    def slots(self) -> int | None:
        """The number of slots; None if there is no limit.

        One more slot would read a row group more than `epochs` times.
        """
        if self.epochs is None:
            return None
        limits = [self.epochs * len(pool) for pool in self.pools]

        def fits(slot: int) -> bool:
            return all(
                count <= limit for count, limit in zip(self.slots_before(slot), limits, strict=True)
            )

        low, high = 0, 1 + sum(limits)  # fits(low), and not fits(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    @property
    def chunks(self) -> int | None:
        """The number of chunks. None: no limit."""
        return None if self.slots is None else -(-self.slots // self.groups_per_chunk)

    def chunk(self, index: int) -> list[int]:
        """Returns the row groups of a chunk, as indices in the manifest.

        Args:
            index: The index of the chunk. It continues through the epochs.
        """
        begin, end = index * self.groups_per_chunk, (index + 1) * self.groups_per_chunk
        if self.slots is not None:
            begin, end = min(begin, self.slots), min(end, self.slots)
        groups = []
        for pool_index, first, stop in self._filled(begin, end):
            pool = self.pools[pool_index]
            for count in range(first, stop):
                epoch, position = divmod(count, len(pool))
                groups.append(pool[self._permuted(position, pool_index, epoch)])
        return groups

    def _filled(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Returns which slots of a range each pool fills.

        It is what `slots_before` says of both ends, in one pass, since each chunk needs it.

        Returns:
            (pool, first slot, one past the last one), counted among the slots of that pool. Pools
            without a slot in the range may be missing.
        """
        segment = self._segment(begin)
        if len(segment.shares) == 1 or segment is not self._segment(end):
            ends = zip(self.slots_before(begin), self.slots_before(end), strict=True)
            return [(pool, first, stop) for pool, (first, stop) in enumerate(ends) if first < stop]
        filled = []
        first, stop, rest = begin - segment.first, end - segment.first, _UNIT
        for pool, (share, before) in enumerate(zip(segment.shares, segment.before, strict=True)):
            if share == rest:  # the last pool with a share
                filled.append((pool, before + first, before + stop))
                break
            if share:
                a = min(first, (share * first + rest // 2) // rest)
                b = min(stop, (share * stop + rest // 2) // rest)
                if a != b:
                    filled.append((pool, before + a, before + b))
                first, stop, rest = first - a, stop - b, rest - share
        return filled

    def _segment(self, slot: int) -> _Segment:
        if len(self.segments) == 1:
            return self.segments[0]
        firsts = [segment.first for segment in self.segments]
        return self.segments[bisect_right(firsts, slot) - 1]

    def _permuted(self, position: int, pool: int, epoch: int) -> int:
        """Returns which row group of a pool is at a position of an epoch."""
        n, key = len(self.pools[pool]), (self.seed, pool, epoch)
        if self.version == LISTED:
            return int(shuffled(n, *key)[position])
        return permuted(position, n, *key)

    def estimated_steps(self, tokens_per_step: int) -> int:
        """Returns the estimated number of steps until the data ends. Needs `epochs`.

        The little padding that packing adds is neglected.
        """
        assert self.slots is not None
        if self.stages:
            group_tokens = [
                self.manifest.tokens(s) / len(span) for s, span in enumerate(self.manifest.spans)
            ]
        else:
            group_tokens = [self.tokens / len(self.manifest)]
        counts = zip(self.slots_before(self.slots), group_tokens, strict=True)
        total = int(sum(count * tokens for count, tokens in counts))
        return max(1, -(-total // tokens_per_step))


def _shares(weights: Sequence[float], group_tokens: Sequence[float]) -> tuple[int, ...]:
    """Converts the sources' shares of tokens to shares of slots, in parts of _UNIT.

    Args:
        weights: The weight of each source.
        group_tokens: The mean number of tokens in a row group of each source.
    """
    slots = [w / sum(weights) / tokens for w, tokens in zip(weights, group_tokens, strict=True)]
    shares = [max(1, round(s / sum(slots) * _UNIT)) if s else 0 for s in slots]
    shares[int(np.argmax(shares))] += _UNIT - sum(shares)  # what rounding left over
    return tuple(shares)


class LanePosition(NamedTuple):
    """The position in a lane.

    Attributes:
        ordinal: The index of the current chunk among the lane's chunks.
        row: The next row to read in that chunk.
    """

    ordinal: int = 0
    row: int = 0


def chunks_of(
    positions: dict[int, LanePosition], lanes: int, end: int | None = None
) -> Iterator[int]:
    """Yields the indices of the chunks that lanes read, in the order in which they need them.

    Args:
        positions: The position of each lane that is read.
        lanes: The number of all lanes.
        end: The number of chunks. None: no limit.
    """
    ordinal = min(position.ordinal for position in positions.values())
    while end is None or ordinal * lanes < end:
        for lane, position in sorted(positions.items()):
            index = ordinal * lanes + lane
            if ordinal >= position.ordinal and (end is None or index < end):
                yield index
        ordinal += 1


def skipped(skip: Sequence[tuple[int, int]], data_step: int) -> bool:
    """Returns whether a data step is skipped.

    Args:
        skip: The recipe's ranges (first, last), counted from 1, both inclusive.
        data_step: The step, counted from 0.
    """
    return any(first <= data_step + 1 <= last for first, last in skip)
