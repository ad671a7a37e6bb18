import itertools

import numpy as np
import pytest

from sevenfold.data.manifest import Manifest, RowGroup
from sevenfold.data.order import LanePosition, Plan, lanes_of, shuffled, windows_of


def plan(groups: int, lanes: int, seed: int = 0) -> Plan:
    return Plan(Manifest((), tuple(RowGroup(0, i, 1, 1) for i in range(groups))), seed, lanes)


@pytest.mark.parametrize(("groups", "lanes"), [(1, 1), (7, 4), (100, 4), (1000, 8)])
def test_every_epoch_reads_every_group_once(groups: int, lanes: int) -> None:
    p = plan(groups, lanes)
    orders = []
    for epoch in range(3):
        windows = [p.window(epoch * p.windows_per_epoch + i) for i in range(p.windows_per_epoch)]
        orders.append([g.index for w in windows for g in w])
        assert sorted(orders[-1]) == list(range(groups))
    assert groups < 5 or orders[0] != orders[1] != orders[2]


def test_shuffled_is_pinned_for_ever() -> None:
    """A run that is resumed with another numpy must find its order again."""
    assert shuffled(8, 7, 0).tolist() == [1, 3, 2, 4, 7, 0, 6, 5]
    assert shuffled(8, 7, 1).tolist() != shuffled(8, 7, 0).tolist() != shuffled(8, 8, 0).tolist()
    spread = np.mean([shuffled(100, s)[:50].mean() for s in range(200)])
    assert abs(spread - 49.5) < 1.0


@pytest.mark.parametrize("world", range(1, 9))
def test_ranks_share_the_lanes(world: int) -> None:
    parts = [lanes_of(r, world, 8) for r in range(world)]
    assert [lane for part in parts for lane in part] == list(range(8))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_windows_are_needed_in_the_order_of_the_laggard() -> None:
    positions = {0: LanePosition(2, 5), 1: LanePosition(1, 0)}
    assert list(itertools.islice(windows_of(positions, 4), 5)) == [1 * 4 + 1, 2 * 4 + 0, 2 * 4 + 1, 3 * 4 + 0, 3 * 4 + 1]
