"""The order in which row groups are read: epochs, mixtures, curricula, lanes."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sevenfold.data.lanes import ENOUGH, advice, best_lanes, lanes_of, max_rows_per_rank, share_used
from sevenfold.data.manifest import Manifest
from sevenfold.data.order import FEISTEL, LISTED, DataOrder, LanePosition, chunks_of
from sevenfold.data.permutation import permuted, shuffled
from sevenfold.data.sources.shards import Shard
from sevenfold.errors import InputError
from sevenfold.recipe import Source

SIZE = 1000  # bytes per row group, and its number of tokens


def manifest(*groups: int) -> Manifest:
    """A manifest with one shard per source; `groups` gives each source's number of row groups."""
    table = [(s, i, 0, 1, 1, SIZE) for s, n in enumerate(groups) for i in range(n)]
    shards = tuple(Shard(f"{s}.parquet", s, "parquet", None, "0-") for s in range(len(groups)))
    sources = tuple(Source(path=f"{s}.parquet") for s in range(len(groups)))
    return Manifest(sources, shards, np.array(table, np.int64), (), (1.0,) * len(groups))


@pytest.mark.parametrize(("groups", "lanes"), [((1,), 1), ((7,), 4), ((60, 40), 4), ((1000,), 8)])
def test_every_epoch_reads_every_group_once(groups: tuple[int, ...], lanes: int) -> None:
    data_order, count = DataOrder(manifest(*groups), 0, lanes), sum(groups)
    chunks = itertools.chain.from_iterable(
        data_order.chunk(i) for i in range(3 * count // data_order.groups_per_chunk + 1)
    )
    read = list(itertools.islice(chunks, 3 * count))
    orders = [read[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 5 or orders[0] != orders[1] != orders[2]


def test_an_epoch_limit_ends_the_order() -> None:
    order = DataOrder(manifest(30), 0, 2, epochs=2)
    assert order.chunks is not None
    read = Counter(g for i in range(order.chunks + 3) for g in order.chunk(i))
    assert read == dict.fromkeys(range(30), 2)


def test_mixture_weights_hold_throughout_and_each_source_has_its_own_epochs() -> None:
    order = DataOrder(manifest(100, 40, 300), 3, 4, ((0, (0.5, 0.2, 0.3)),))
    read = [g for i in range(400) for g in order.chunk(i)]
    sources = np.searchsorted([100, 140], read, side="right")
    # the mixture holds after every number of chunks
    for stop in range(0, len(read), order.groups_per_chunk):
        assert (
            np.abs(
                np.bincount(sources[:stop], minlength=3) - stop * np.array([0.5, 0.2, 0.3])
            ).max()
            <= 1.5
        )
    first_source = [g for g in read if g < 100]
    assert len(first_source) > 300 and all(
        sorted(first_source[i : i + 100]) == list(range(100)) for i in (0, 100, 200)
    )


def test_the_order_ends_when_the_mixture_cannot_be_kept() -> None:
    order = DataOrder(manifest(100, 10), 0, 2, ((0, (0.5, 0.5)),), epochs=1)
    assert order.chunks is not None
    read = Counter(g for i in range(order.chunks + 2) for g in order.chunk(i))
    assert (
        max(read.values()) == 1
        and sum(g >= 100 for g in read) == 10
        and 9 <= sum(g < 100 for g in read) <= 11
    )


def test_a_curriculum_changes_at_its_token() -> None:
    change_at = 400 * SIZE
    order = DataOrder(manifest(1000, 1000), 0, 4, ((0, (0.9, 0.1)), (change_at, (0.0, 1.0))))
    first = order.segments[1].first
    assert (
        abs(first - 400) <= order.groups_per_chunk * 4 / 2
        and first % (order.groups_per_chunk * 4) == 0
    )
    read = [g for i in range(2 * first // order.groups_per_chunk) for g in order.chunk(i)]
    before, after = np.array(read[:first]) >= 1000, np.array(read[first:]) >= 1000
    assert abs(before.mean() - 0.1) < 0.01 and after.all()
    second = [g for g in read if g >= 1000]
    assert len(set(second[:1000])) == len(second[:1000])  # its epoch continues across the change
    with pytest.raises(InputError, match=r"data\.curriculum.*too short: expected at least"):
        _ = DataOrder(manifest(1000, 1000), 0, 4, ((0, (1.0, 1.0)), (1000, (0.0, 1.0)))).segments


def test_the_shuffled_order_never_changes() -> None:
    """The order must stay the same when a run is resumed with another version of numpy."""
    assert shuffled(8, 7, 0).tolist() == [1, 3, 2, 4, 7, 0, 6, 5]
    assert shuffled(8, 7, 1).tolist() != shuffled(8, 7, 0).tolist() != shuffled(8, 8, 0).tolist()
    spread = np.mean([shuffled(100, s)[:50].mean() for s in range(200)])
    assert abs(spread - 49.5) < 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 10, 64, 97, 1000, 4099])
def test_a_permutation_is_one(n: int) -> None:
    for seed in range(5):
        order = [permuted(i, n, seed, 3, 1) for i in range(n)]
        assert sorted(order) == list(range(n))
    if n > 4:
        assert len({tuple(permuted(i, n, seed) for i in range(n)) for seed in range(50)}) > 40


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 50])
def test_every_place_is_equally_likely(n: int) -> None:
    """A chi-squared test of each position, and of each pair of neighbours, over 4,000 seeds."""
    draws = np.array([[permuted(i, n, seed) for i in range(n)] for seed in range(4000)])
    for position in range(min(n, 10)):
        counts = np.bincount(draws[:, position], minlength=n)
        assert ((counts - 4000 / n) ** 2 / (4000 / n)).sum() < n + 6 * np.sqrt(2 * n) + 4
    # as often as not, the next element is the larger one
    assert abs((np.diff(draws, axis=1) > 0).mean() - 0.5) < 0.03


def test_a_permutation_never_changes() -> None:
    """The order must stay the same when a run is resumed with another version."""
    assert [permuted(i, 8, 7, 0) for i in range(8)] == [4, 0, 2, 1, 7, 5, 3, 6]
    assert permuted(123_456_789_012, 10**12, 7) == 121_615_943_721


def test_a_permutation_of_nothing_has_no_positions() -> None:
    with pytest.raises(ValueError, match="expected a position in a permutation of 0 elements"):
        permuted(0, 0, 1)


def test_a_run_of_an_earlier_version_keeps_its_order() -> None:
    """The row groups of each source are shuffled as a list, as they were before."""
    order = DataOrder(manifest(30, 50), 4, 2, ((0, (0.5, 0.5)),), version=LISTED)
    read = [g for i in range(40) for g in order.chunk(i)]
    assert [g for g in read if g < 30][:30] == shuffled(30, 4, 0, 0).tolist()
    assert [g - 30 for g in read if g >= 30][:50] == shuffled(50, 4, 1, 0).tolist()
    assert read != [g for i in range(40) for g in replace(order, version=FEISTEL).chunk(i)]


@pytest.mark.parametrize("batch", [1, 6, 7, 64, 100, 384, 512, 1000, 1024])
def test_the_share_of_used_time_is_that_of_the_lanes(batch: int) -> None:
    for world in range(1, min(batch, 200) + 1):
        lanes = best_lanes(batch, world)
        assert lanes is not None and lanes >= world and batch % lanes == 0
        rows = [len(lanes_of(rank, world, lanes)) * batch // lanes for rank in range(world)]
        assert max(rows) == max_rows_per_rank(batch, world, lanes) and sum(rows) == batch
        assert share_used(batch, world, lanes) == pytest.approx(batch / (world * max(rows)))
        # no number of lanes is better than one for each row
        if share_used(batch, world, lanes) < ENOUGH:
            assert share_used(batch, world, lanes) == share_used(batch, world, batch)
    assert best_lanes(batch, batch + 1) is None


def test_workers_that_wait_are_named_with_better_numbers() -> None:
    assert advice(512, 64, 64) is None
    assert advice(512, 48, 64) == (
        "48 workers are used for 67% of the time: of 512 sequences per step in 64 lanes, the "
        "busiest worker reads 16; better: 32 (100%) or 64 (100%) workers, or data.lanes=512 (97%)"
    )
    started = advice(512, 48, 64, may_change=False)
    assert started is not None and started.endswith("better: 32 (100%) or 64 (100%) workers")
    one_left = advice(10, 6, 10)
    assert one_left is not None and one_left.endswith("better: 5 (100%) or 10 (100%) workers")


@pytest.mark.parametrize("world", range(1, 9))
def test_ranks_share_the_lanes(world: int) -> None:
    parts = [lanes_of(rank, world, 8) for rank in range(world)]
    assert [lane for part in parts for lane in part] == list(range(8))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_chunks_are_ordered_by_the_slowest_lane() -> None:
    positions = {0: LanePosition(2, 5), 1: LanePosition(1, 0)}
    assert list(itertools.islice(chunks_of(positions, 4), 5)) == [
        1 * 4 + 1,
        2 * 4 + 0,
        2 * 4 + 1,
        3 * 4 + 0,
        3 * 4 + 1,
    ]
    assert list(chunks_of(positions, 4, end=10)) == [5, 8, 9]


@pytest.mark.parametrize("seed", range(30))
def test_the_slots_of_a_chunk_are_those_between_its_ends(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, rng.integers(1, 9)).tolist()

    def weights() -> tuple[float, ...]:
        drawn = rng.random(len(sizes)) * (rng.random(len(sizes)) < 0.7)
        return tuple((drawn + (drawn.sum() == 0)).tolist())

    order = DataOrder(
        manifest(*sizes),
        seed,
        2,
        ((0, weights()), (300 * SIZE, weights()), (700 * SIZE, weights())),
    )
    for begin, length in zip(range(0, 1500, 7), itertools.cycle((1, 3, 16)), strict=False):
        ends = zip(order.slots_before(begin), order.slots_before(begin + length), strict=True)
        expected = [(pool, *pair) for pool, pair in enumerate(ends) if pair[0] < pair[1]]
        filled = [item for item in order._filled(begin, begin + length) if item[1] < item[2]]
        assert filled == expected
