"""The order in which row groups are read: epochs, mixtures, curricula, lanes."""

import itertools
from collections import Counter

import numpy as np
import pytest

from sevenfold.data.manifest import Manifest
from sevenfold.data.order import DataOrder, LanePosition, chunks_of, lanes_of, shuffled
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
