"""The order of the data: pure arithmetic of (manifest, seed). Nothing here knows how many workers there are.

Row groups are permuted anew each epoch and cut into windows, numbered without end. Lane l owns windows l, l + L,
l + 2L, ...; a global batch takes the same number of rows of each lane, and ranks serve slices of lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sevenfold.data.manifest import Manifest, RowGroup

MAX_GROUPS = 16  # row groups of a window
_WINDOWS_PER_LANE = 4  # an epoch gives each lane at least so many, where there are row groups enough


@dataclass(frozen=True)
class Plan:
    manifest: Manifest
    seed: int
    lanes: int

    @property
    def groups_per_window(self) -> int:
        return max(1, min(MAX_GROUPS, len(self.manifest.groups) // (self.lanes * _WINDOWS_PER_LANE)))

    @property
    def windows_per_epoch(self) -> int:
        return -(-len(self.manifest.groups) // self.groups_per_window)

    def window(self, index: int) -> list[RowGroup]:
        """The row groups of a window. index counts on through the epochs."""
        epoch, at = divmod(index, self.windows_per_epoch)
        order = shuffled(len(self.manifest.groups), self.seed, epoch)
        cut = order[at * self.groups_per_window : (at + 1) * self.groups_per_window]
        return [self.manifest.groups[i] for i in cut]


@dataclass(frozen=True)
class LanePosition:
    """Where a lane stands: the next row to serve is `row` of the lane's window number `ordinal`."""

    ordinal: int = 0
    row: int = 0


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that a rank serves: slices as even as can be, in lane order. Needs lanes >= world_size."""
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def most_rows(global_batch: int, world_size: int, lanes: int) -> int:
    """The most rows of a global batch that any rank serves: what decides the number of micro-batches of all."""
    return max(len(lanes_of(r, world_size, lanes)) for r in range(world_size)) * (global_batch // lanes)


def windows_of(positions: dict[int, LanePosition], lanes: int) -> Iterator[int]:
    """The windows that these lanes need from these positions on, without end, in the order in which they need them."""
    ordinal = min(p.ordinal for p in positions.values())
    while True:
        for lane, position in sorted(positions.items()):
            if ordinal >= position.ordinal:
                yield ordinal * lanes + lane
        ordinal += 1


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
