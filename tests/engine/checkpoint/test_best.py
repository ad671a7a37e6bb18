"""The best validation: how it is chosen, kept, restored, and unaffected by kills."""

import itertools
import os
import signal
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RANKS, rank_process, run_ranks

from sevenfold.engine import loop, optim
from sevenfold.engine.batch import micro_batches, to_batch
from sevenfold.engine.checkpoint import (
    CheckpointManager,
    checkpoint_paths,
    latest_checkpoint,
    load_checkpoint,
    verified_checkpoint,
)
from sevenfold.engine.checkpoint.best import BestTracker, UnknownMetricError
from sevenfold.engine.checkpoint.interval import Interval
from sevenfold.engine.guard import Guard
from sevenfold.engine.meter import Meter
from sevenfold.engine.objectives import Causal, SpecialTokens
from sevenfold.engine.signals import Signal
from sevenfold.engine.step import evaluate
from sevenfold.engine.step_plan import StepPlan
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Recipe, Validation

CPU = torch.device("cpu")


class Everything(Container[int]):
    def __contains__(self, _: object) -> bool:
        return True


def track(values: list[float], **settings: Any) -> tuple[BestTracker, list[bool]]:
    """Feeds one value per step to a tracker; returns it and what each update returned."""
    tracker = BestTracker(Validation(every=1, **settings), Everything)
    name = tracker.settings.metric
    return tracker, [
        tracker.update(step, {name: value})
        for step, value in enumerate(values, 1)
        if not tracker.exhausted
    ]


@pytest.mark.parametrize(
    ("metric", "mode", "best"),
    [
        ("validation/loss", None, 2),
        ("validation/bits_per_byte", None, 2),
        ("validation/rougeL", None, 3),
        ("validation/loss", "max", 3),
        ("validation/f1", "min", 2),
    ],
)
def test_lower_is_better_only_for_losses(metric: str, mode: Any, best: int) -> None:
    tracker, _ = track([3.0, 1.0, 4.0, 2.0], metric=metric, mode=mode, keep_best=True)
    assert tracker.best is not None and tracker.best.step == best


def test_patience_counts_validations_without_improvement() -> None:
    tracker, improved = track([3.0, 2.0, 2.0, 1.0, float("nan"), 2.0, 0.0], patience=2)
    assert improved == [True, True, False, True, False, False] and tracker.exhausted
    assert tracker.summary().startswith(
        "stopped early after step 6: no improvement in 2 validations; best "
        "validation/loss 1.0000 at step 4"
    )
    restored = BestTracker(tracker.settings, Everything)
    restored.load(tracker.state())
    # an earlier step is ignored
    assert restored == tracker and not restored.update(6, {"validation/loss": 0.0})
    tracker, improved = track([2.0, 1.0, 3.0])
    assert improved == [False] * 3 and tracker.best is None
    with pytest.raises(RunError, match="was not finite in 2 validations in a row, up to step 2"):
        track([float("nan"), float("inf")], patience=2)


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    tracker = BestTracker(Validation(every=1, keep_best=True, metric="validation/f1"), Everything)
    with pytest.raises(
        UnknownMetricError,
        match="'validation/f1'; this recipe reports: train/loss, validation/loss",
    ):
        tracker.update(1, {"validation/loss": 1.0, "train/loss": 1.0})


def test_a_best_step_without_a_checkpoint_is_dropped() -> None:
    committed = {1, 2}
    tracker = BestTracker(Validation(every=1, patience=2), lambda: committed)
    assert tracker.update(1, {"validation/loss": 3.0}) and tracker.update(
        2, {"validation/loss": 2.0}
    )
    committed.remove(2)
    # better than 3.0 of step 1: step 2 has no checkpoint any more
    assert (
        tracker.update(3, {"validation/loss": 2.5})
        and tracker.previous is not None
        and tracker.previous.step == 1
    )
    committed |= {3}
    assert (
        not tracker.update(4, {"validation/loss": 2.5})
        and not tracker.update(5, {"validation/loss": 2.5})
        and tracker.exhausted
    )
    committed.clear()
    assert (
        not tracker.update(5, {"validation/loss": 2.5})
        and tracker.best is None
        and not tracker.exhausted
    )


def test_the_settings_that_patience_and_keep_best_need(tree: dict[str, Any]) -> None:
    assert Recipe.model_validate(
        tree | {"validation": {"every": 1, "patience": 2}}
    ).validation.keeps_best
    for changed in ({"validation": {"patience": 2}}, {"validation": {"keep_best": True}}):
        with pytest.raises(ValueError, match=r"need validation\.every, and held-out documents"):
            Recipe.model_validate(tree | changed)
    del tree["data"]["validation"]
    with pytest.raises(ValueError, match=r"need validation\.every, and held-out documents"):
        Recipe.model_validate(tree | {"validation": {"every": 1, "patience": 2}})
    plain = Recipe.model_validate(tree)
    with pytest.raises(InputError, match="patience"):
        plain.override({"validation.patience": 0})
    assert (
        len(
            {
                plain.override({f"validation.{key}": value}).hash()
                for key, value in (("metric", "x"), ("mode", "max"), ("rows", 2))
            }
        )
        == 3
    )


def fit_run(
    tree: dict[str, Any], folder: str, die_at: str = "", notice_at: int = 0
) -> tuple[int, dict[str, Any], list[tuple[int, str]], list[str]]:
    """Trains on rows that are unrelated to the held-out ones: validations get better, then worse.

    Kills itself at the event that `die_at` names. Returns the last step, the state of the tracker,
    the events (step, name), and the messages.
    """
    from helpers.training import ROWS, VOCAB, rows_of, sharded_model

    recipe = Recipe.model_validate(tree)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = sharded_model(recipe)
    optimizers = optim.build(model, recipe.optimizer)
    events, messages = list[tuple[int, str]](), list[str]()
    checkpoint = latest_checkpoint(folder)
    saver = CheckpointManager(folder, keep=1, say=messages.append, last=checkpoint)
    tracker, start = BestTracker(recipe.validation, saver.committed_paths), 0
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizers)
        tracker.load(checkpoint.extra["best"])
        start = checkpoint.step

    def rank_rows(step: int) -> Any:
        return rows_of(step).part(rank * ROWS // world, (rank + 1) * ROWS // world)

    def record(step: int, event: str) -> None:
        if f"{event} {step}" == die_at:
            saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        events.append((step, event))

    steps = itertools.count(start + 1)
    held_out = micro_batches(rank_rows(99), 4, -(-ROWS // world // 4), to_batch, CPU)

    def validate(step: int, between: Callable[[], None]) -> dict[str, float]:
        record(step, "validate")
        nats, targets, _ = evaluate(model, held_out, torch.arange(VOCAB))
        return {"validation/loss": nats / targets}

    def save(step: int) -> None:
        saver.wait()
        saver.pinned_steps = [tracker.best.step] if tracker.best else []
        saver.save(step, model, optimizers, {"best": tracker.state()})
        record(step, "save")

    hooks = loop.Hooks(
        signal=lambda: Signal(next(steps) == notice_at),
        roll_back=lambda *_: 0,
        log=lambda *_: None,
        say=messages.append,
        save=save,
        wait_for_save=saver.wait,
        validate=validate,
        report=lambda step, _: record(step, "report"),
    )
    trainer = loop.Trainer(
        recipe=recipe,
        plan=StepPlan(recipe.steps),
        model=model,
        optimizers=optimizers,
        objective=Causal(SpecialTokens(VOCAB), 0, 0.15, 3),
        rows=iter(rank_rows(i % 2) for i in range(start, 999)),
        rows_per_rank=-(-ROWS // world),
        device=CPU,
        meter=Meter(1.0, 1.0, world, CPU),
        guard=Guard(recipe.guard),
        interval=Interval(recipe.checkpoint, world, start, saver, messages.append),
        best=tracker,
    )
    last_step = loop.fit(trainer, hooks, start)
    saver.wait()
    saver.close()
    return last_step, tracker.state(), events, messages


def recipe_of(tree: dict[str, Any], workers: int = 1) -> dict[str, Any]:
    """The recipe of these runs, for this number of workers."""
    return tree | {
        "train": tree["train"] | {"steps": 60, "global_batch": 12},
        "optimizer": {"learning_rate": 2e-2},
        "validation": {"every": 5, "patience": 2},
        "checkpoint": {"every": 7, "keep": 1},
        "cluster": {"num_workers": workers},
    }


@pytest.fixture(scope="module")
def uninterrupted(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The result of an uninterrupted run, and its folder of checkpoints."""
    from conftest import RECIPE

    root = tmp_path_factory.mktemp("whole")
    data = RECIPE["data"] | {"sources": [{"path": "x"}], "held_out": 0.1}
    (result,) = run_ranks(
        1, root / "pg" / "store", fit_run, recipe_of(RECIPE | {"data": data}), str(root / "c")
    )
    return (*result, root / "c")


def test_a_run_stops_early_and_keeps_its_best_checkpoint(uninterrupted: tuple[Any, ...]) -> None:
    last_step, state, events, messages, folder = uninterrupted
    best = state["mark"]["step"]
    assert last_step == best + 10 == state["seen"] < 60 and state["stale"] == 2
    assert messages == [
        f"stopped early after step {last_step}: no improvement in 2 validations; best "
        f"validation/loss {state['mark']['value']:.4f} at step {best}, saved as the final model"
    ]
    validated, saved = (
        [step for step, event in events if event == name] for name in ("validate", "save")
    )
    assert validated == list(range(5, last_step + 1, 5))
    assert set(range(7, last_step + 1, 7)) | {best} <= set(saved) and last_step not in saved
    assert (
        events.index((best, "validate"))
        < events.index((best, "save"))
        < events.index((best, "report"))
    )
    assert list(checkpoint_paths(str(folder))) == sorted({best, max(saved)})  # checkpoint.keep is 1
    assert (
        verified_checkpoint(checkpoint_paths(str(folder))[best]).extra["best"]["mark"]["step"]
        == best
    )


def run_until_killed(tmp_path: Path, *args: Any) -> None:
    """Runs `fit_run` in a process until it kills itself."""
    results: Any = RANKS.Queue()
    process = rank_process(0, 1, tmp_path / "died", results, fit_run, *args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("where", "after"), [("save", 0), ("report", 5), ("report", 10)])
def test_a_killed_run_stops_at_the_same_step_with_the_same_best(
    uninterrupted: tuple[Any, ...], tree: dict[str, Any], tmp_path: Path, where: str, after: int
) -> None:
    last_step, state, *_ = uninterrupted
    run_until_killed(
        tmp_path, recipe_of(tree), str(tmp_path / "c"), f"{where} {state['mark']['step'] + after}"
    )
    (result,) = run_ranks(1, tmp_path / "pg" / "1", fit_run, recipe_of(tree), str(tmp_path / "c"))
    assert result[:2] == (last_step, state)
    assert state["mark"]["step"] in checkpoint_paths(str(tmp_path / "c"))


def test_a_step_saved_before_its_validation_is_validated_after_the_restart(
    uninterrupted: tuple[Any, ...], tree: dict[str, Any], tmp_path: Path
) -> None:
    """The validation of a step that was saved first is done after the restart.

    A stop signal saves at once, so the checkpoint does not contain the validation of its step. The
    run is killed during that validation.
    """
    last_step, state, *_ = uninterrupted
    run_until_killed(tmp_path, recipe_of(tree), str(tmp_path / "c"), "validate 10", 10)
    newest = latest_checkpoint(str(tmp_path / "c"))
    assert newest is not None and newest.step == 10 and newest.extra["best"]["seen"] == 5
    (result,) = run_ranks(1, tmp_path / "pg" / "2", fit_run, recipe_of(tree), str(tmp_path / "c"))
    assert (
        result[2][0] == (10, "validate")
        and result[0] == last_step
        and result[1]["mark"] == state["mark"]
    )


def test_two_ranks_choose_the_same_best_step(
    uninterrupted: tuple[Any, ...], tree: dict[str, Any], tmp_path: Path
) -> None:
    result, other_result = run_ranks(
        2, tmp_path / "pg" / "store", fit_run, recipe_of(tree, 2), str(tmp_path / "c")
    )
    assert result[:3] == other_result[:3] and result[3] == other_result[3]
    last_step, state, *_ = uninterrupted
    assert result[0] == last_step and result[1]["mark"]["step"] == state["mark"]["step"]
    assert result[1]["mark"]["value"] == pytest.approx(state["mark"]["value"], rel=1e-3)
