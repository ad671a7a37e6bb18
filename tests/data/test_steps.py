"""A run with `data.epochs` reads every document that often, and knows when that will be."""

import functools
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sevenfold.data.encode import TextEncoder
from sevenfold.data.order import DataOrder
from sevenfold.data.reader import UNIT, ReaderState
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.stream import Stream
from sevenfold.data.tokenizer import train_tokenizer
from sevenfold.engine.step_plan import DataProgress, StepPlan
from sevenfold.recipe import Source

LENGTH = 64


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """Short and long documents in files of very different sizes: rows are filled unevenly."""
    folder = tmp_path_factory.mktemp("steps")
    rng = np.random.default_rng(0)
    for file in range(5):
        lines = [
            json.dumps({"text": f"{file}/{i} " + "word " * int(rng.choice([2, 30, 45, 170]))})
            for i in range(int(rng.integers(1, 60)))
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    manifest = scan([Source(path=str(folder))], "causal", 12)
    encoder = TextEncoder(train_tokenizer(manifest, Selection(), 400, 0.5, 0), LENGTH)
    return Stream(DataOrder(manifest, 3, 4), Selection(), encoder, LENGTH, "inline")


def pieces_read(stream: Stream, steps: int, world: int) -> tuple[Counter[tuple[int, ...]], bool]:
    """Reads this many steps with this many readers.

    Returns:
        How often each piece of a document (row group, document, first token) was read, and whether
        all readers have ended.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    chunk = functools.cache(stream.chunk)
    ended = True
    for rank in range(world):
        reader = stream.shard(rank, world).reader(2)
        for _ in range(steps):
            next(reader)
        for read in reader.take_read_ranges():
            pieces = chunk(read.chunk).pieces
            assert pieces is not None
            inside = (pieces.row >= read.row) & (pieces.row < read.row + read.rows)
            columns = (pieces.group[inside], pieces.origin[inside], pieces.start[inside])
            counts.update(zip(*(c.tolist() for c in columns), strict=True))
        ended = ended and reader.ended
        reader.close()
    return counts, ended


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize(("epochs", "lanes"), [(1, 4), (2, 4), (3, 2), (1, 12)])
def test_the_counted_steps_read_each_document_in_each_epoch(
    stream: Stream, packing: str, epochs: int, lanes: int
) -> None:
    order = replace(stream.order, epochs=epochs, lanes=lanes)
    limited = replace(stream, order=order, packing=packing)
    steps = limited.count_steps(rows_per_lane=2)
    expected = {
        (group, int(document))
        for group in range(len(order.manifest))
        for document in stream.selection.read(order.manifest, group).origin
    }
    for world in (1, 2):
        counts, ended = pieces_read(limited, steps, world)
        assert ended and set(counts.values()) == {epochs} if packing == "best_fit" else ended
        assert {piece[:2] for piece in counts} == expected
    assert not pieces_read(limited, steps - 1, 1)[1]


class Run:
    """The steps of a run whose estimate is wrong, without a model."""

    def __init__(self, stream: Stream, estimate: int):
        self.stream, self.estimate = stream, estimate

    def train(self, world: int, kill_at: int | None = None) -> list[int]:
        """Returns the planned number of steps after each step.

        Args:
            world: The number of readers.
            kill_at: The step from which the run resumes once, with another number of readers, from
                a state that has passed through JSON.
        """
        totals: list[int] = []
        state, saved_total = ReaderState(), None
        while True:
            readers = [
                self.stream.shard(r, world).reader(2, state, len(totals)) for r in range(world)
            ]
            plan = StepPlan(self.estimate, lambda: self.progress(readers))  # noqa: B023
            plan.restore(saved_total)
            for step in itertools.count(len(totals) + 1):
                if step > plan.total:
                    return totals
                rows = [next(reader) for reader in readers]
                if not any(r.used.any() for r in rows):
                    return totals  # as the training loop, which finds no targets
                plan.update(step)
                totals.append(plan.total)
                if step == kill_at:
                    state = ReaderState.together([reader.state for reader in readers], 0)
                    state = ReaderState.from_json(json.loads(json.dumps(state.to_json())))
                    saved_total, world, kill_at = plan.total, 3 - world, None
                    break

    def progress(self, readers: list) -> DataProgress:
        done = sum(reader.progress() for reader in readers)
        return DataProgress(done, UNIT * self.stream.order.lanes, readers[0].state.data_step)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.4, 3.0])
def test_a_wrong_estimate_is_corrected_alike_by_every_run(stream: Stream, factor: float) -> None:
    limited = replace(stream, order=replace(stream.order, epochs=2))
    exact = limited.count_steps(rows_per_lane=2)
    run = Run(limited, max(1, round(factor * exact)))
    whole = run.train(1)
    assert len(whole) == exact  # it ends with the data, wherever the estimate was
    assert whole[-1] == exact or factor > 1
    assert abs(whole[-2] - exact) <= 2 + exact // 20
    assert run.train(2) == whole
    for kill_at in (1, exact // 3, exact - 1):
        assert run.train(1, kill_at) == run.train(2, kill_at) == whole


def test_an_exact_number_of_steps_is_not_corrected() -> None:
    plan = StepPlan(10)
    plan.update(5)
    plan.restore(None)
    assert plan.total == 10 and plan.is_exact


def test_a_file_read_twice_is_not_read(stream: Stream, tmp_path: Path) -> None:
    """One epoch of a single document is one step."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word"}))
    manifest = scan([Source(path=str(tmp_path))], "causal")
    one = replace(stream, order=DataOrder(manifest, 0, 4, epochs=1))
    assert one.count_steps(2) == 1
