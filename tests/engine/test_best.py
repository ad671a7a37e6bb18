"""The best validation: judged, kept, gone back to, and the same after kills."""

import itertools
import os
import signal
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RANKS, rank_process, run_ranks

from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine import loop, optim
from sevenfold.engine.batch import micro_batches, to_batch
from sevenfold.engine.best import Best, UnknownMetricError
from sevenfold.engine.guard import Guard
from sevenfold.engine.interval import Interval
from sevenfold.engine.meter import Meter
from sevenfold.engine.notice import Notice
from sevenfold.engine.objectives import Causal, Words
from sevenfold.engine.step import evaluate
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Recipe, Validation

CPU = torch.device("cpu")


class Everything(Container[int]):
    def __contains__(self, _: object) -> bool:
        return True


def judged(values: list[float], **settings: Any) -> tuple[Best, list[bool]]:
    best = Best(Validation(every=1, **settings), Everything)
    name = best.settings.metric
    return best, [best.judge(i, {name: v}) for i, v in enumerate(values, 1) if not best.over]


@pytest.mark.parametrize(
    ("metric", "mode", "best"),
    [("validation/loss", None, 2), ("validation/bits_per_byte", None, 2), ("validation/rougeL", None, 3),
     ("validation/loss", "max", 3), ("validation/f1", "min", 2)],
)  # fmt: skip
def test_less_is_better_of_losses_alone(metric: str, mode: Any, best: int) -> None:
    found, _ = judged([3.0, 1.0, 4.0, 2.0], metric=metric, mode=mode, keep_best=True)
    assert found.mark is not None and found.mark.step == best


def test_patience_counts_validations_without_a_better_one() -> None:
    best, better = judged([3.0, 2.0, 2.0, 1.0, float("nan"), 2.0, 0.0], patience=2)
    assert better == [True, True, False, True, False, False] and best.over
    assert best.why().startswith(
        "stopped after step 6, 2 validations without a better one: best validation/loss 1.0000 at step 4"
    )
    again = Best(best.settings, Everything)
    again.load(best.state())
    assert again == best and not again.judge(6, {"validation/loss": 0.0})  # seen before
    best, better = judged([2.0, 1.0, 3.0])
    assert better == [False] * 3 and best.mark is None
    with pytest.raises(RunError, match="was not finite in 2 validations in a row, up to step 2"):
        judged([float("nan"), float("inf")], patience=2)


def test_an_unknown_metric_is_named_beside_those_there_are() -> None:
    best = Best(Validation(every=1, keep_best=True, metric="validation/f1"), Everything)
    with pytest.raises(UnknownMetricError, match="'validation/f1': this recipe reports train/loss, validation/loss"):
        best.judge(1, {"validation/loss": 1.0, "train/loss": 1.0})


def test_a_best_one_that_was_not_saved_is_none() -> None:
    there = {1, 2}
    best = Best(Validation(every=1, patience=2), lambda: there)
    assert best.judge(1, {"validation/loss": 3.0}) and best.judge(2, {"validation/loss": 2.0})
    there.remove(2)
    assert best.judge(3, {"validation/loss": 2.5}) and best.before is not None and best.before.step == 1  # of 3.0, not of 2.0
    there |= {3}
    assert not best.judge(4, {"validation/loss": 2.5}) and not best.judge(5, {"validation/loss": 2.5}) and best.over
    there.clear()
    assert not best.judge(5, {"validation/loss": 2.5}) and best.mark is None and not best.over


def test_what_it_needs(tree: dict[str, Any]) -> None:
    assert Recipe.model_validate(tree | {"validation": {"every": 1, "patience": 2}}).validation.keeps_best
    for changed in ({"validation": {"patience": 2}}, {"validation": {"keep_best": True}}):
        with pytest.raises(ValueError, match=r"need validation\.every, and held-out documents"):
            Recipe.model_validate(tree | changed)
    del tree["data"]["validation"]
    with pytest.raises(ValueError, match=r"need validation\.every, and held-out documents"):
        Recipe.model_validate(tree | {"validation": {"every": 1, "patience": 2}})
    plain = Recipe.model_validate(tree)
    with pytest.raises(InputError, match="patience"):
        plain.override({"validation.patience": 0})
    assert len({plain.override({f"validation.{k}": v}).hash() for k, v in (("metric", "x"), ("mode", "max"), ("rows", 2))}) == 3


def fitted(
    tree: dict[str, Any], folder: str, die_at: str = "", notice_at: int = 0
) -> tuple[int, dict[str, Any], list[tuple[int, str]], list[str]]:
    """Trains on rows that say nothing of those held out: validations get better, then worse. Dies where `die_at` says.
    Returns the steps done, the state of the best, what was validated and saved, and what was told."""
    from test_step import ROWS, VOCAB, rows_of, sharded

    recipe, rank, world = Recipe.model_validate(tree), torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = sharded(recipe)
    optimizers = optim.build(model, recipe.optimizer)
    events, told = list[tuple[int, str]](), list[str]()
    found = ckpt.latest(folder)
    saver = ckpt.Saver(folder, 1, None, told.append, found)
    best, start = Best(recipe.validation, saver.committed), 0
    if found:
        ckpt.load(found, model, optimizers)
        best.load(found.extra["best"])
        start = found.step

    def mine(step: int) -> Any:
        return rows_of(step).part(rank * ROWS // world, (rank + 1) * ROWS // world)

    def seen(step: int, what: str) -> None:
        if f"{what} {step}" == die_at:
            saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        events.append((step, what))

    steps = itertools.count(start + 1)
    held = micro_batches(mine(99), 4, -(-ROWS // world // 4), to_batch, CPU)

    def validate(step: int) -> dict[str, float]:
        seen(step, "validate")
        nats, targets, _ = evaluate(model, held, torch.arange(VOCAB))
        return {"validation/loss": nats / targets}

    def save(step: int) -> None:
        saver.wait()
        saver.spared = [best.mark.step] if best.mark else []
        saver.save(step, model, optimizers, {"best": best.state()})
        seen(step, "save")

    hooks = loop.Hooks(
        lambda *_: None, validate, save, lambda: Notice(next(steps) == notice_at), saver.wait,
        lambda step, _: seen(step, "report"), told.append, lambda *_: 0,
    )  # fmt: skip
    trainer = loop.Trainer(
        recipe, model, optimizers, Causal(Words(VOCAB), 0, 0.15, 3), iter(mine(i % 2) for i in range(start, 999)),
        -(-ROWS // world), CPU, Meter(1.0, 1.0, world, CPU), Guard(recipe.guard),
        Interval(recipe.checkpoint, world, start, saver, told.append), best,
    )  # fmt: skip
    at = loop.fit(trainer, hooks, start)
    saver.wait()
    saver.close()
    return at, best.state(), events, told


def recipe_of(tree: dict[str, Any], workers: int = 1) -> dict[str, Any]:
    return tree | {
        "train": tree["train"] | {"steps": 60, "global_batch": 12}, "optimizer": {"learning_rate": 2e-2},
        "validation": {"every": 5, "patience": 2}, "checkpoint": {"every": 7, "keep": 1},
        "cluster": {"num_workers": workers},
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    from conftest import RECIPE

    root = tmp_path_factory.mktemp("whole")
    data = RECIPE["data"] | {"sources": [{"path": "x"}], "held_out": 0.1}
    (found,) = run_ranks(1, root / "pg" / "store", fitted, recipe_of(RECIPE | {"data": data}), str(root / "c"))
    return (*found, root / "c")


def test_a_run_ends_when_it_gets_no_better_and_keeps_its_best(whole: tuple[Any, ...]) -> None:
    at, state, events, told, folder = whole
    best = state["mark"]["step"]
    assert at == best + 10 == state["seen"] < 60 and state["stale"] == 2
    assert told == [f"stopped after step {at}, 2 validations without a better one: best validation/loss "
                    f"{state['mark']['value']:.4f} at step {best}, whose model this is"]  # fmt: skip
    validated, saved = ([s for s, what in events if what == name] for name in ("validate", "save"))
    assert validated == list(range(5, at + 1, 5))
    assert set(range(7, at + 1, 7)) | {best} <= set(saved) and at not in saved
    assert events.index((best, "validate")) < events.index((best, "save")) < events.index((best, "report"))
    assert list(ckpt.steps(str(folder))) == sorted({best, max(saved)})  # checkpoint.keep is 1
    assert ckpt.verified(ckpt.steps(str(folder))[best]).extra["best"]["mark"]["step"] == best


def killed(tmp_path: Path, *args: Any) -> None:
    """Runs `fitted` until it kills itself."""
    results: Any = RANKS.Queue()
    died = rank_process(0, 1, tmp_path / "died", results, fitted, *args)
    died.start()
    died.join(120)
    assert died.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("where", "after"), [("save", 0), ("report", 5), ("report", 10)])
def test_a_killed_run_stops_at_the_same_step_with_the_same_best(
    whole: tuple[Any, ...], tree: dict[str, Any], tmp_path: Path, where: str, after: int
) -> None:
    at, state, *_ = whole
    killed(tmp_path, recipe_of(tree), str(tmp_path / "c"), f"{where} {state['mark']['step'] + after}")
    (found,) = run_ranks(1, tmp_path / "pg" / "1", fitted, recipe_of(tree), str(tmp_path / "c"))
    assert found[:2] == (at, state)
    assert state["mark"]["step"] in ckpt.steps(str(tmp_path / "c"))


def test_a_save_before_its_validation_is_made_up_for(whole: tuple[Any, ...], tree: dict[str, Any], tmp_path: Path) -> None:
    """A notice saves at once: the checkpoint knows nothing of its step's validation, at which the run is killed."""
    at, state, *_ = whole
    killed(tmp_path, recipe_of(tree), str(tmp_path / "c"), "validate 10", 10)
    newest = ckpt.latest(str(tmp_path / "c"))
    assert newest is not None and newest.step == 10 and newest.extra["best"]["seen"] == 5
    (found,) = run_ranks(1, tmp_path / "pg" / "2", fitted, recipe_of(tree), str(tmp_path / "c"))
    assert found[2][0] == (10, "validate") and found[0] == at and found[1]["mark"] == state["mark"]


def test_two_ranks_judge_alike(whole: tuple[Any, ...], tree: dict[str, Any], tmp_path: Path) -> None:
    found, other = run_ranks(2, tmp_path / "pg" / "store", fitted, recipe_of(tree, 2), str(tmp_path / "c"))
    assert found[:3] == other[:3] and found[3] == other[3]
    at, state, *_ = whole
    assert found[0] == at and found[1]["mark"]["step"] == state["mark"]["step"]
    assert found[1]["mark"]["value"] == pytest.approx(state["mark"]["value"], rel=1e-3)
