"""The stream: what a step reads does not hang on the number of workers, on a resumption, or on who makes the rows."""

import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from sevenfold.data import rows as r
from sevenfold.data.documents import Selection
from sevenfold.data.encode import TextEncoder
from sevenfold.data.manifest import scan
from sevenfold.data.order import Plan
from sevenfold.data.rows import Window
from sevenfold.data.stream import ReaderState, Stream, _Ahead
from sevenfold.data.tokens import train_tokenizer
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Source
from sevenfold.runs import cluster

STEPS = 60  # more than two epochs


@pytest.fixture(scope="module")
def stream(texts: Path) -> Stream:
    found = scan([Source(path=str(texts / "train"))], "causal", 32)
    encoder = TextEncoder(train_tokenizer(found, Selection(), 600, 0.5, 0), 1024, "gigatoken")
    return Stream(Plan(found, 5, 8), Selection(), encoder, 1024, "inline")


def read(stream: Stream, world: int, steps: int, at: ReaderState | None = None) -> tuple[list[int], ReaderState, list]:
    """(hash of each step's rows, where the reader stands, what it noted)."""
    readers = [stream.shard(rank, world).reader(2, at) for rank in range(world)]
    out = [r.Rows.concatenate([next(reader) for reader in readers]).hash() for _ in range(steps)]
    for reader in readers:
        reader.close()
    draws = sorted(d for reader in readers for d in reader.take_draws())
    return out, ReaderState.together([reader.state for reader in readers], at.skipped if at else 0), draws


def test_rows(stream: Stream) -> None:
    window = stream.window(0).rows
    assert stream.window(0).rows.hash() == window.hash() and window.tokens.dtype == np.uint16
    positions, labels, edges = r.positions(window), r.labels(window), window.edges
    starts = np.zeros(window.tokens.size, bool)
    starts[edges[:-1]] = True
    starts = starts.reshape(window.tokens.shape)
    assert edges[-1] == window.tokens.size and (np.diff(edges) > 0).all()
    assert (positions[starts] == 0).all() and starts[:, 0].all()
    assert (positions[:, 1:][~starts[:, 1:]] == positions[:, :-1][~starts[:, 1:]] + 1).all()
    wanted = labels >= 0
    assert np.array_equal(labels[:, :-1][wanted[:, :-1]], window.tokens[:, 1:][wanted[:, :-1]])
    assert not wanted[:, :-1][starts[:, 1:]].any() and not wanted[:, -1].any()  # never across a document's edge
    assert [len(window.part(i, i + 1).starts) for i in range(len(window))] == starts.sum(1).tolist()


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_an_epoch_holds_every_document_once(stream: Stream, packing: str) -> None:
    plan = replace(stream.plan, epochs=1)
    whole = replace(stream, plan=plan, packing=packing)
    pieces: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    padded = total = 0
    for index in range(plan.windows or 0):
        window = whole.window(index)
        p, tokens = window.pieces, window.rows.tokens
        assert p is not None
        padded, total = padded + tokens.size - int(window.rows.used.sum()), total + tokens.size
        for group, origin, start, row, offset, length in zip(*vars(p).values(), strict=True):
            pieces.setdefault((group, origin), []).append((start, tokens[row, offset : offset + length].tolist()))
    documents = {(g, i): t for g, (column,) in enumerate(stream.documents()) for i, t in enumerate(column)}
    assert pieces.keys() == documents.keys()
    for key, ids in zip(documents, stream.encoder.ids(list(documents.values())), strict=True):
        whole_document = [0, *ids, 1]
        assert [t for _, part in sorted(pieces[key]) for t in part] == whole_document
        assert packing == "concatenate" or len(pieces[key]) == -(-len(whole_document) // 1024)  # cut only where it must be
    assert padded / total < 0.05  # windows of a small corpus are small; tests/data/test_pack.py holds 0.6% to large ones


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_number_of_workers_does_not_show(stream: Stream, world: int) -> None:
    assert read(stream, world, STEPS)[0] == read(stream, 1, STEPS)[0]


def test_resume_anywhere_on_any_number(stream: Stream) -> None:
    whole, end, noted = read(stream, 2, STEPS)
    done, at, draws = read(stream, 2, 17)
    for world, steps in ((3, 20), (1, 11), (4, STEPS - 48)):
        more, at, drawn = read(stream, world, steps, ReaderState.from_json(at.to_json()))
        done, draws = done + more, draws + drawn
    assert done == whole and at == end
    assert [(d.data_step, *d[3:]) for d in draws] == [(d.data_step, *d[3:]) for d in noted]


def test_steps_of_data_are_skipped(stream: Stream) -> None:
    whole = read(stream, 1, 30)[0]
    bare = replace(stream, skip=((3, 5), (20, 20)))
    expected = whole[:2] + whole[5:19] + whole[20:]
    first, at, _ = read(bare, 2, 4)
    assert first + read(bare, 3, len(expected) - 4, at)[0] == expected


def test_an_epoch_limit_ends_the_stream_and_reads_all(stream: Stream) -> None:
    once = replace(stream, plan=replace(stream.plan, epochs=1))
    found = []
    for world in (1, 3):
        readers = [once.shard(rank, world).reader(2) for rank in range(world)]
        steps = [[next(reader) for reader in readers] for _ in range(200)]
        assert all(reader.ended for reader in readers)
        found.append(([r.Rows.concatenate(step).hash() for step in steps], sum(int(p.used.sum()) for s in steps for p in s)))
        for reader in readers:
            reader.close()
    assert found[0] == found[1]
    assert found[0][1] == sum(len(ids) + 2 for (c,) in stream.documents() for ids in stream.encoder.ids(c))


def by_ray(stream: Stream, worlds: tuple[int, ...], steps: int) -> list[tuple]:
    """What `read` gives through Ray Data."""
    cluster.connect()
    found, threads = [], []
    for world in worlds:
        found.append(read(replace(stream, executor="ray"), world, steps))
        threads.append(set(threading.enumerate()))
    assert threads[-1] <= threads[0], threads  # a long run makes thousands of executions
    return found


def test_ray_data_makes_the_same_rows(stream: Stream, on_shared_ray: None) -> None:
    found = by_ray(stream, (2, 3), STEPS)
    assert found == [read(stream, 1, STEPS)] * 2


def test_bad_documents_are_left_out_counted_and_named_once(stream: Stream, tmp_path: Path, on_shared_ray: None) -> None:
    write_shards(tmp_path / "s", [{"text": ""}, {"text": "some text"}, {"text": ""}, {"text": ""}], shards=1, group=1)
    found = scan([Source(path=str(tmp_path / "s"))], "causal")
    bare = Stream(Plan(found, 0, 8), Selection(on_bad="skip"), stream.encoder, 32, "inline")
    reader = bare.shard(0, 1).reader(1)
    rows = r.Rows.concatenate([next(reader) for _ in range(2)])
    reader.close()
    assert (r.labels(rows) >= 0).any(axis=1).sum() == 4  # two steps of eight lanes are four epochs of four windows
    assert reader.state.skipped == 12 and "shard-00000.parquet: row group" in reader.complaints[0].first
    assert by_ray(bare, (1,), 2) == [read(bare, 1, 2)]
    with pytest.raises(InputError, match=r"no text in 'text'.*on_bad_document=skip"):
        next(replace(bare, selection=Selection()).shard(0, 1).reader(1))


def test_a_wrong_window_is_refused(stream: Stream) -> None:
    reader = stream.shard(0, 1).reader(2)
    reader.close()
    reader._windows = iter([stream.window(3)])
    with pytest.raises(RunError, match="window 3 where 0 was due"):
        next(reader)


def test_an_error_of_the_thread_arrives(stream: Stream) -> None:
    def broken() -> Generator[Window, None, None]:
        yield stream.window(0)
        raise ValueError("broken")

    windows = _Ahead(broken())
    assert next(windows).index == 0
    with pytest.raises(ValueError, match="broken"):
        next(windows)
