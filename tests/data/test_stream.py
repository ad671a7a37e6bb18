"""The stream: what a step reads does not hang on the number of workers, on a resumption, or on who makes the rows."""

from pathlib import Path

import numpy as np
import pytest
import ray
from conftest import write_shards

from sevenfold.data import rows as r
from sevenfold.data.manifest import scan
from sevenfold.data.order import Plan
from sevenfold.data.stream import Stream
from sevenfold.data.tokens import TextEncoder, train_tokenizer
from sevenfold.errors import RunError
from sevenfold.recipe import Source
from sevenfold.runs import cluster

STEPS = 60  # more than two epochs


@pytest.fixture(scope="module")
def stream(texts: Path) -> Stream:
    found = scan([Source(path=str(texts / "train"))], ("text",))
    encoder = TextEncoder(train_tokenizer(found, 600, 0.5, 0), 1024)
    return Stream(Plan(found, 5, 8), encoder, 1024, "inline")


def read(stream: Stream, world: int, steps: int, at: dict | None = None) -> tuple[list[bytes], dict]:
    readers = [stream.shard(rank, world).reader(2, at) for rank in range(world)]
    out = []
    for _ in range(steps):
        step = r.Rows.concatenate([next(reader) for reader in readers])
        assert len(step) == 16
        out.append(step.tokens.tobytes() + step.marks.tobytes())
    for reader in readers:
        reader.close()
    return out, {lane: p for reader in readers for lane, p in reader.positions.items()}


def test_rows(stream: Stream) -> None:
    window = stream.window(0)
    again = stream.window(0)
    assert np.array_equal(window.tokens, again.tokens) and window.tokens.dtype == np.uint16
    positions, labels = r.positions(window.marks), r.labels(window)
    starts = (window.marks & r.START) > 0
    assert (positions[starts] == 0).all() and starts[:, 0].all()
    assert (positions[:, 1:][~starts[:, 1:]] == positions[:, :-1][~starts[:, 1:]] + 1).all()
    wanted = labels >= 0
    assert np.array_equal(labels[:, :-1][wanted[:, :-1]], window.tokens[:, 1:][wanted[:, :-1]])
    assert not wanted[:, :-1][starts[:, 1:]].any() and not wanted[:, -1].any()  # never across a document's edge


def test_an_epoch_holds_every_token_once(stream: Stream) -> None:
    whole = stream.epoch()
    documents = [t for g in stream.plan.manifest.groups for t in stream.plan.manifest.read(g)[0].to_pylist()]
    expected = np.sort(np.concatenate([[0, *ids, 1] for ids in stream.encoder.ids(documents)]))  # type: ignore[attr-defined]
    real = (whole.marks & (r.START | r.TARGET)) > 0
    bare = (whole.marks == r.START) & (whole.tokens == 0)  # a document's first token, or padding's
    found = np.sort(whole.tokens[real])
    surplus = len(found) - len(expected)
    assert 0 <= surplus <= bare.sum() and np.array_equal(found[surplus:], expected)
    assert 1 - len(expected) / whole.tokens.size < 0.03


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_number_of_workers_does_not_show(stream: Stream, world: int) -> None:
    assert read(stream, world, STEPS)[0] == read(stream, 1, STEPS)[0]


def test_resume_anywhere_on_any_number(stream: Stream) -> None:
    whole, end = read(stream, 2, STEPS)
    done, at = read(stream, 2, 17)
    for world, steps in ((3, 20), (1, 11), (4, STEPS - 48)):
        more, at = read(stream, world, steps, at)
        done += more
    assert done == whole and at == end


def test_ray_data_makes_the_same_rows(stream: Stream) -> None:
    cluster.connect()
    try:
        by_ray = Stream(stream.plan, stream.encoder, stream.sequence_length, "ray")
        assert read(by_ray, 2, STEPS) == read(stream, 1, STEPS)
    finally:
        ray.shutdown()


def test_a_wrong_window_is_refused(stream: Stream) -> None:
    reader = stream.shard(0, 1).reader(2)
    reader.close()
    reader._windows = iter([(3, stream.window(3))])
    with pytest.raises(RunError, match="window 3 where 0 was due"):
        next(reader)


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_documents_without_text_are_rows_without_targets(stream: Stream, tmp_path: Path, executor: str) -> None:
    write_shards(tmp_path / "s", [{"text": ""}, {"text": "some text"}, {"text": ""}, {"text": ""}], shards=1, group=1)
    found = scan([Source(path=str(tmp_path / "s"))], ("text",))
    bare = Stream(Plan(found, 0, 1), stream.encoder, 32, executor)
    if executor == "ray":
        cluster.connect()
    try:
        reader = bare.shard(0, 1).reader(1)
        rows = [next(reader) for _ in range(4)]
        reader.close()
    finally:
        ray.shutdown()
    assert sum(bool((r.labels(one) >= 0).any()) for one in rows) == 1


def test_an_error_of_the_thread_arrives(stream: Stream, tmp_path: Path) -> None:
    class Broken:
        fields = ("text",)

        def __call__(self, columns: object) -> None:
            raise ValueError("broken encoder")

    reader = Stream(stream.plan, Broken(), 64, "inline").shard(0, 1).reader(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="broken encoder"):
        next(reader)
