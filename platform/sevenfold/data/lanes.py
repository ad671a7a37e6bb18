"""How lanes are divided among ranks, and how evenly that divides the work.

The lanes are the parallel streams of the data's order, see `data.order`. They do not depend on the
number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable

# A run and its plan name better numbers if the ranks wait for the busiest one for more than the
# rest of each step.
ENOUGH = 0.95


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """Returns the lanes that a rank serves.

    The numbers of lanes of any two ranks differ by at most one. Needs lanes >= world_size.
    """
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def max_rows_per_rank(global_batch: int, world_size: int, lanes: int) -> int:
    """Returns the maximum number of rows of a global batch on any rank.

    It determines the number of micro-batches, which is the same on all ranks.
    """
    return -(-lanes // world_size) * (global_batch // lanes)


def share_used(global_batch: int, world_size: int, lanes: int) -> float:
    """Returns the share of the ranks' time in which they do not wait for the busiest rank."""
    return global_batch / (world_size * max_rows_per_rank(global_batch, world_size, lanes))


def best_lanes(global_batch: int, world_size: int) -> int | None:
    """Returns the number of lanes with which a number of ranks is used best.

    Args:
        global_batch: The rows of a step; the number of lanes divides it.
        world_size: The number of ranks.

    Returns:
        The smallest number that uses ENOUGH, or else the one that uses most. None if there is none.
    """
    divisors = [n for n in range(world_size, global_batch + 1) if global_batch % n == 0]
    used = {lanes: share_used(global_batch, world_size, lanes) for lanes in divisors}
    enough = (lanes for lanes in divisors if used[lanes] >= ENOUGH)
    return next(enough, max(divisors, key=lambda lanes: used[lanes], default=None))


def advice(global_batch: int, world_size: int, lanes: int, may_change: bool = True) -> str | None:
    """Returns a sentence on workers that wait, with better numbers; None if few of them do.

    Args:
        global_batch: The rows of a step.
        world_size: The number of workers that read different rows.
        lanes: The number of lanes.
        may_change: Whether the number of lanes can still be changed: it is part of the order, which
            a run that has started keeps.
    """
    used = share_used(global_batch, world_size, lanes)
    if used >= ENOUGH:
        return None

    def first(counts: Iterable[int]) -> list[str]:
        # only numbers of which no worker could be left out without slowing down the others
        tight = (n for n in counts if n == -(-lanes // -(-lanes // n)))
        shares = ((n, share_used(global_batch, n, lanes)) for n in tight)
        return next(([f"{n} ({share:.0%})"] for n, share in shares if share >= ENOUGH), [])

    fewer = first(range(world_size - 1, 0, -1))
    more = first(range(world_size + 1, lanes + 1))
    better = [f"{' or '.join(fewer + more)} workers"]
    best = best_lanes(global_batch, world_size) if may_change else None
    if best is not None and share_used(global_batch, world_size, best) > used:
        better.append(f"data.lanes={best} ({share_used(global_batch, world_size, best):.0%})")
    return (
        f"{world_size} workers are used for {used:.0%} of the time: of {global_batch} sequences "
        f"per step in {lanes} lanes, the busiest worker reads "
        f"{max_rows_per_rank(global_batch, world_size, lanes)}; better: {', or '.join(better)}"
    )
