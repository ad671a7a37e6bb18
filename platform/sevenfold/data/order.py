"""The order of the data: pure arithmetic of (manifest, mixture, seed). Nothing here knows how many workers there are.

Each source's row groups are permuted anew each epoch of that source; a fixed pattern of slots says whose turn it is, so
that the sources' tokens keep the mixture's proportions everywhere. Slots are cut into windows, numbered without end.
Lane l owns windows l, l + L, l + 2L, ...; a global batch takes the same number of rows of each lane, and ranks serve
slices of lanes. Without weights all sources are one pool, shuffled together.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sevenfold.data.manifest import Manifest
from sevenfold.errors import InputError
from sevenfold.recipe import Data

MAX_GROUPS = 16  # row groups of a window
WINDOWS_PER_LANE = 4  # an epoch, or a stage of the curriculum, gives each lane at least so many, where there is data enough
WINDOW_TOKENS = 4_000_000  # at most, and in all lanes together
LANES_TOKENS = 64_000_000  # ... so many: what a resumption makes again, and what waits in memory
_UNIT = 2**32  # shares are whole parts of this: the order is the same on every machine


@dataclass(frozen=True)
class _Segment:
    """Slots from `first` on, dealt out by `shares` (parts of _UNIT); `before`: how often each pool's turn had come."""

    first: int
    shares: tuple[int, ...]
    before: tuple[int, ...]

    def draws(self, slot: int) -> list[int]:
        """How often each pool's turn has come before this slot: each at its share, nowhere off by more than a turn or two."""
        left, rest, out = slot - self.first, _UNIT, []
        for share in self.shares[:-1]:
            took = min(left, (share * left + rest // 2) // rest) if rest else 0
            out.append(took)
            left, rest = left - took, rest - share
        return [b + d for b, d in zip(self.before, [*out, left], strict=True)]


@dataclass(frozen=True)
class Plan:
    """Attributes:
    stages: (token at which it begins, weight of each source), rising; () mixes by size.
    epochs: how often a row group is read at most; None is endless.
    """

    manifest: Manifest
    seed: int
    lanes: int
    stages: tuple[tuple[int, tuple[float, ...]], ...] = ()
    epochs: int | None = None

    @staticmethod
    def of(manifest: Manifest, data: Data, seed: int, lanes: int) -> Plan:
        stages: list[tuple[int, tuple[float, ...]]] = []
        if data.sources[0].weight is not None:
            stages.append((0, tuple(float(s.weight or 0) for s in data.sources)))
            stages += [(c.at_tokens, tuple(c.weights.get(s.name, 0.0) for s in data.sources)) for c in data.curriculum]
        return Plan(manifest, seed, lanes, tuple(stages), data.epochs)

    @functools.cached_property
    def pools(self) -> tuple[range, ...]:
        """Row groups that are shuffled together."""
        return self.manifest.spans if self.stages else (range(len(self.manifest)),)

    @functools.cached_property
    def tokens(self) -> float:
        """Of all sources, once; estimated."""
        return sum(self.manifest.tokens(s) for s in range(len(self.manifest.sources)))

    @functools.cached_property
    def groups_per_window(self) -> int:
        most = min(WINDOW_TOKENS, LANES_TOKENS // self.lanes)
        for (begin, _), (end, _) in zip(self.stages, self.stages[1:], strict=False):
            most = min(most, (end - begin) // (self.lanes * WINDOWS_PER_LANE))
        fit = int(most / max(1.0, self.tokens / len(self.manifest)))
        return max(1, min(MAX_GROUPS, len(self.manifest) // (self.lanes * WINDOWS_PER_LANE), fit))

    @functools.cached_property
    def windows_per_epoch(self) -> int:
        return -(-len(self.manifest) // self.groups_per_window)

    @functools.cached_property
    def segments(self) -> tuple[_Segment, ...]:
        """Raises InputError where a stage of the curriculum is shorter than a round of windows."""
        if not self.stages:
            return (_Segment(0, (_UNIT,), (0,)),)
        size = [max(1.0, self.manifest.tokens(s) / len(span)) for s, span in enumerate(self.pools)]
        out: list[_Segment] = []
        for i, (begin, weights) in enumerate(self.stages):
            turns = [w / sum(weights) / n for w, n in zip(weights, size, strict=True)]
            shares = [max(1, round(t / sum(turns) * _UNIT)) if t else 0 for t in turns]
            shares[int(np.argmax(shares))] += _UNIT - sum(shares)
            if not out:
                out.append(_Segment(0, tuple(shares), (0,) * len(shares)))
                continue
            round_slots = self.groups_per_window * self.lanes
            last = out[-1]
            per_slot = sum(s / _UNIT * n for s, n in zip(last.shares, size, strict=True))
            rounds = round((begin - self.stages[i - 1][0]) / (per_slot * round_slots))
            if not rounds:
                raise InputError(
                    f"data.curriculum: the stage before token {begin:,} is too short: a round of windows over "
                    f"{self.lanes} lanes is {per_slot * round_slots:,.0f} tokens: fewer data.lanes make it shorter"
                )
            first = last.first + rounds * round_slots
            out.append(_Segment(first, tuple(shares), tuple(last.draws(first))))
        return tuple(out)

    def draws(self, slot: int) -> list[int]:
        """How often each pool's turn has come before this slot."""
        return self.segments[bisect_right([s.first for s in self.segments], slot) - 1].draws(slot)

    @functools.cached_property
    def slots(self) -> int | None:
        """How many there are before a row group would be read once too often; None where the data is endless."""
        if self.epochs is None:
            return None
        limits = [self.epochs * len(pool) for pool in self.pools]

        def fits(slot: int) -> bool:
            return all(d <= limit for d, limit in zip(self.draws(slot), limits, strict=True))

        low, high = 0, 1 + sum(limits)  # fits(low), not fits(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    @property
    def windows(self) -> int | None:
        """How many there are; None where the data is endless."""
        return None if self.slots is None else -(-self.slots // self.groups_per_window)

    def window(self, index: int) -> list[int]:
        """The row groups of a window, by their numbers in the manifest. index counts on through the epochs."""
        begin, end = index * self.groups_per_window, (index + 1) * self.groups_per_window
        if self.slots is not None:
            begin, end = min(begin, self.slots), min(end, self.slots)
        out = []
        for number, (pool, a, b) in enumerate(zip(self.pools, self.draws(begin), self.draws(end), strict=True)):
            for draw in range(a, b):
                epoch, at = divmod(draw, len(pool))
                out.append(pool[int(shuffled(len(pool), self.seed, number, epoch)[at])])
        return out

    def estimated_steps(self, tokens_per_step: int) -> int:
        """Of a plan that ends; packing pads little."""
        assert self.slots is not None
        size = [self.manifest.tokens(s) / len(span) for s, span in enumerate(self.manifest.spans)]
        mean = [self.tokens / len(self.manifest)] if not self.stages else size
        return max(1, -(-int(sum(d * n for d, n in zip(self.draws(self.slots), mean, strict=True))) // tokens_per_step))


class LanePosition(NamedTuple):
    """Where a lane stands: the next row to serve is `row` of the lane's window number `ordinal`."""

    ordinal: int = 0
    row: int = 0


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that a rank serves: slices as even as can be, in lane order. Needs lanes >= world_size."""
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def most_rows(global_batch: int, world_size: int, lanes: int) -> int:
    """The most rows of a global batch that any rank serves: what decides the number of micro-batches of all."""
    return max(len(lanes_of(r, world_size, lanes)) for r in range(world_size)) * (global_batch // lanes)


def windows_of(positions: dict[int, LanePosition], lanes: int, end: int | None = None) -> Iterator[int]:
    """The windows below `end` that these lanes need from these positions on, in the order in which they need them."""
    ordinal = min(p.ordinal for p in positions.values())
    while end is None or ordinal * lanes < end:
        for lane, position in sorted(positions.items()):
            index = ordinal * lanes + lane
            if ordinal >= position.ordinal and (end is None or index < end):
                yield index
        ordinal += 1


def skipped(skip: Sequence[tuple[int, int]], data_step: int) -> bool:
    """Whether a data step (from 0) lies in the recipe's ranges (from 1, inclusive)."""
    return any(first <= data_step + 1 <= last for first, last in skip)


@functools.lru_cache(maxsize=4)
def _shuffled(n: int, key: tuple[int, ...]) -> np.ndarray:
    state = 0
    for part in key:
        state = int(_mix(np.array([(state ^ part) & (2**64 - 1)], np.uint64))[0])
    draws = _mix(np.arange(n, dtype=np.uint64) + np.uint64(state))
    return np.argsort(draws, kind="stable")


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) that depends on the key alone, on every machine and with every numpy."""
    return _shuffled(n, key)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
