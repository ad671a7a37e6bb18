"""The stream: what a step reads does not hang on the number of workers, on a resumption, or on who makes the rows."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_shards

from sevenfold.data import rows as r
from sevenfold.data.manifest import scan
from sevenfold.data.order import Plan
from sevenfold.data.stream import Stream
from sevenfold.data.tokens import TextEncoder, train_tokenizer
from sevenfold.errors import RunError
from sevenfold.recipe import Source

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


def by_ray(stream: Stream, folder: Path, worlds: tuple[int, ...], steps: int) -> list[tuple[list[bytes], dict]]:
    """What `read` gives through Ray Data. In a process of its own: one that was connected ends when its Ray has."""
    (folder / "in").write_bytes(pickle.dumps((replace(stream, executor="ray"), worlds, steps)))
    code = """
import pickle, sys, ray
from sevenfold.runs import cluster
from test_stream import read
stream, worlds, steps = pickle.load(open("in", "rb"))
cluster.connect()
pickle.dump([read(stream, world, steps) for world in worlds], open("out", "wb"))
ray.shutdown()
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT / "tests", ROOT / "tests/data")))}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return pickle.loads((folder / "out").read_bytes())


def test_ray_data_makes_the_same_rows(stream: Stream, tmp_path: Path) -> None:
    found = by_ray(stream, tmp_path, (2, 3), STEPS)
    assert all(len(step) == 16 * 1024 * 3 for step in found[0][0])  # uint16 tokens and uint8 marks of 16 rows
    assert found == [read(stream, 1, STEPS)] * 2


def test_documents_without_text_are_rows_without_targets(stream: Stream, tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [{"text": ""}, {"text": "some text"}, {"text": ""}, {"text": ""}], shards=1, group=1)
    found = scan([Source(path=str(tmp_path / "s"))], ("text",))
    bare = Stream(Plan(found, 0, 8), stream.encoder, 32, "inline")
    reader = bare.shard(0, 1).reader(1)
    rows = r.Rows.concatenate([next(reader) for _ in range(2)])
    reader.close()
    assert (r.labels(rows) >= 0).any(axis=1).sum() == 4  # two steps of eight lanes are four epochs of four windows
    assert by_ray(bare, tmp_path, (1,), 2) == [read(bare, 1, 2)]


def test_a_wrong_window_is_refused(stream: Stream) -> None:
    reader = stream.shard(0, 1).reader(2)
    reader.close()
    reader._windows = iter([(3, stream.window(3))])
    with pytest.raises(RunError, match="window 3 where 0 was due"):
        next(reader)


def test_an_error_of_the_thread_arrives(stream: Stream, tmp_path: Path) -> None:
    class Broken:
        fields = ("text",)

        def __call__(self, columns: object) -> None:
            raise ValueError("broken encoder")

    reader = Stream(stream.plan, Broken(), 64, "inline").shard(0, 1).reader(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="broken encoder"):
        next(reader)
