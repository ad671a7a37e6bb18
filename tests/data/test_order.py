import itertools
from collections import Counter

import numpy as np
import pytest

from sevenfold.data.manifest import Manifest
from sevenfold.data.order import LanePosition, Plan, lanes_of, shuffled, windows_of
from sevenfold.data.shards import Shard
from sevenfold.errors import InputError
from sevenfold.recipe import Source

SIZE = 1000  # bytes of a row group, and its tokens


def manifest(*groups: int) -> Manifest:
    """Sources of so many row groups, a shard each."""
    table = [(s, i, 0, 1, 1, SIZE) for s, n in enumerate(groups) for i in range(n)]
    shards = tuple(Shard(f"{s}.parquet", s, "parquet", None, "0-") for s in range(len(groups)))
    sources = tuple(Source(path=f"{s}.parquet") for s in range(len(groups)))
    return Manifest(sources, shards, np.array(table, np.int64), (), (1.0,) * len(groups))


@pytest.mark.parametrize(("groups", "lanes"), [((1,), 1), ((7,), 4), ((60, 40), 4), ((1000,), 8)])
def test_every_epoch_reads_every_group_once(groups: tuple[int, ...], lanes: int) -> None:
    p, n = Plan(manifest(*groups), 0, lanes), sum(groups)
    windows = itertools.chain.from_iterable(p.window(i) for i in range(3 * n // p.groups_per_window + 1))
    read = list(itertools.islice(windows, 3 * n))
    orders = [read[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 5 or orders[0] != orders[1] != orders[2]


def test_an_epoch_limit_ends_the_plan() -> None:
    p = Plan(manifest(30), 0, 2, epochs=2)
    assert p.windows is not None
    read = Counter(g for i in range(p.windows + 3) for g in p.window(i))
    assert read == dict.fromkeys(range(30), 2)


def test_weights_hold_everywhere_and_each_source_has_epochs_of_its_own() -> None:
    p = Plan(manifest(100, 40, 300), 3, 4, ((0, (0.5, 0.2, 0.3)),))
    read = [g for i in range(400) for g in p.window(i)]
    source = np.searchsorted([100, 140], read, side="right")
    for end in range(0, len(read), p.groups_per_window):  # windows up to any one keep the mixture
        assert np.abs(np.bincount(source[:end], minlength=3) - end * np.array([0.5, 0.2, 0.3])).max() <= 1.5
    own = [g for g in read if g < 100]
    assert len(own) > 300 and all(sorted(own[i : i + 100]) == list(range(100)) for i in (0, 100, 200))


def test_a_mixture_that_cannot_be_kept_ends() -> None:
    p = Plan(manifest(100, 10), 0, 2, ((0, (0.5, 0.5)),), epochs=1)
    assert p.windows is not None
    read = Counter(g for i in range(p.windows + 2) for g in p.window(i))
    assert max(read.values()) == 1 and sum(g >= 100 for g in read) == 10 and 9 <= sum(g < 100 for g in read) <= 11


def test_a_curriculum_changes_at_its_token() -> None:
    at = 400 * SIZE
    p = Plan(manifest(1000, 1000), 0, 4, ((0, (0.9, 0.1)), (at, (0.0, 1.0))))
    first = p.segments[1].first
    assert abs(first - 400) <= p.groups_per_window * 4 / 2 and first % (p.groups_per_window * 4) == 0
    read = [g for i in range(2 * first // p.groups_per_window) for g in p.window(i)]
    before, after = np.array(read[:first]) >= 1000, np.array(read[first:]) >= 1000
    assert abs(before.mean() - 0.1) < 0.01 and after.all()
    second = [g for g in read if g >= 1000]
    assert len(set(second[:1000])) == len(second[:1000])  # its epoch goes on through the change
    with pytest.raises(InputError, match="too short: a round of windows"):
        Plan(manifest(1000, 1000), 0, 4, ((0, (1.0, 1.0)), (1000, (0.0, 1.0)))).segments  # noqa: B018


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
    assert list(windows_of(positions, 4, end=10)) == [5, 8, 9]
