"""Search spaces, searchers, schedulers and their saved state, without running trials."""

import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RECIPE
from pydantic import ValidationError
from ray.tune.experiment import Trial

from sevenfold.cluster import lease
from sevenfold.errors import InputError
from sevenfold.recipe import Recipe, Sweep
from sevenfold.report import html
from sevenfold.run_folder import RunFolder
from sevenfold.sweep import schedulers, sweep
from sevenfold.sweep.callback import SweepCallback
from sevenfold.sweep.schedulers import TrialLimit
from sevenfold.sweep.searcher import Searcher

RATE = {"loguniform": [1e-4, 1e-1]}
SPACE: dict[str, Any] = {
    "optimizer.momentum": {"uniform": [0.5, 0.95], "when": {"optimizer.name": "muon"}},
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": RATE,
    "adapter.rank": {"integer": [2, 4]},
}


def settings(**changes: Any) -> Sweep:
    """Returns the settings of a sweep of 20 trials over SPACE, with changes."""
    return Sweep.model_validate({"trials": 20, "space": SPACE} | changes)


CONTINUOUS = {"optimizer.learning_rate": RATE}
WIDE = {"model.config.hidden_size": {"choice": [8]}}
CONDITIONAL = {"seed": {"choice": [1], "when": {"train.steps": 3}}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {"seed": {"integer": [3, 2]}}}, "the space is empty: 3 is above 2"),
        ({"space": {"seed": {"uniform": [1, 1]}}}, "the space is empty"),
        ({"space": {"seed": {"uniform": [1, math.inf]}}}, "the ends must be finite"),
        ({"space": {"seed": {"loguniform": [math.nan, 1]}}}, "the ends must be finite"),
        ({"space": {"seed": {}}}, "give exactly one of uniform, loguniform, integer, choice"),
        ({"space": CONDITIONAL}, "when: expected other keys of the space, found train.steps"),
        ({"trials": 0}, "greater than 0"),
        ({"trials": None}, "trials: required key is missing"),
        ({"algorithm": "grid"}, "optimizer.learning_rate has infinitely many values"),
        ({"scheduler": "bohb"}, "set sweep.algorithm=tpe"),
        ({"scheduler": "pbt", "space": WIDE}, "hidden_size cannot change while a trial trains"),
        (
            {"scheduler": "pbt", "algorithm": "tpe", "space": CONTINUOUS},
            "set sweep.algorithm to random or grid",
        ),
        ({"max_cost": 3}, "give both max_cost and worker_hour_cost"),
    ],
)
def test_invalid_settings(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as e:
        settings(**changes)
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"schedule.warmup_steps": {"uniform": [0, 40]}}, "schedule.warmup_steps"),
        ({"train.global_batch": {"integer": [64, 128]}}, "must be a multiple"),
        ({"train.steps": {"choice": [5, 6]}}, "'train.steps' must be the same for all trials"),
        ({"optimizer.learning_rate": {"uniform": [-1, 1]}}, "learning_rate"),
        # a corner of two keys, of which each is valid alone
        (
            {"train.global_batch": {"choice": [4, 8]}, "data.lanes": {"choice": [1, 8]}},
            "must be a multiple of data.lanes",
        ),
        # points of which no model can be made
        (
            {"model.config.num_attention_heads": {"choice": [3]}},
            "no trial with model.config.num_attention_heads=3 can be trained: ",
        ),
        (
            {
                "model.config.hidden_size": {"choice": [16, 24]},
                "model.config.num_attention_heads": {"choice": [2, 16]},
            },
            "hidden_size=24, model.config.num_attention_heads=16 can be trained: ",
        ),
        ({"model.config.intermediate_size": {"integer": [0, 8]}}, "expected 1 to"),
    ],
)
def test_every_kind_of_point_is_validated_beforehand(space: dict[str, Any], says: str) -> None:
    tree = json.loads(json.dumps(RECIPE))
    tree["data"]["sources"] = [{"path": "x"}]
    recipe = Recipe.model_validate(
        tree | {"sweep": {"trials": 4, "metric": "train/loss", "space": space}}
    )
    with pytest.raises(InputError, match=says):
        sweep.checked(recipe)


def test_a_small_space_is_counted() -> None:
    small = {"a": {"choice": [1, 2]}, "b": {"integer": [3, 5]}}
    assert settings(space=small).points == 6
    assert settings(space=CONTINUOUS).points is None and settings().points is None


def test_mode_follows_from_the_metric() -> None:
    for metric, best in (
        ("validation/accuracy", "max"),
        ("validation/bits_per_byte", "min"),
        ("train/loss", "min"),
    ):
        assert settings(metric=metric).best == best
    assert settings(metric="validation/rougeL", mode="min").best == "min"


def test_failed_trials_are_ranked_after_finished_ones(tmp_path: Path) -> None:
    trials: list[Any] = []
    for name, status, score in (
        ("a", Trial.ERROR, 0.1),
        ("b", Trial.TERMINATED, 0.5),
        ("c", Trial.TERMINATED, math.nan),
    ):
        trials.append(trial(name, status))
        trials[-1].run_metadata.last_result = {"validation/loss": score, "step": 4}
    (tmp_path / "trials/b").mkdir(parents=True)
    (tmp_path / "trials/b/whole").touch()
    job: Any = SimpleNamespace(folder=str(tmp_path), recipe=SimpleNamespace(steps=20))
    ranked = sweep.ranked(trials, job, settings())
    assert [(t["trial"], t["status"]) for t in ranked] == [
        ("b", "finished"),
        ("a", "failed"),
        ("c", "stopped early"),
    ]


def _hold_lease(folder: str, acquired: Any, end: Any) -> None:
    """Acquires the lease of a folder, and exits without releasing it when `end` is set."""
    lease.RENEW_SECONDS = 0.2
    lease.Lease(RunFolder(folder))
    acquired.set()
    end.wait()
    os._exit(9)


def test_one_driver_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    spawn = multiprocessing.get_context("spawn")
    acquired, end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold_lease, args=(str(tmp_path), acquired, end))
    other.start()
    assert acquired.wait(60)
    with pytest.raises(InputError, match=f"another driver works on it \\(process {other.pid} on "):
        lease.Lease(RunFolder(str(tmp_path)))
    end.set()
    other.join()
    # The lease is free at once, since the other process has ended.
    own = lease.Lease(RunFolder(str(tmp_path)))
    assert not own.lost
    own.close()
    assert not (tmp_path / "driver.json").exists()


def test_a_lease_is_renewed_after_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's disk does not answer for a while: a real folder that is away meanwhile."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    root = tmp_path / "sweep"
    root.mkdir()
    own = lease.Lease(RunFolder(str(root)))
    root.rename(tmp_path / "away")
    root.write_text("")  # nothing can be read or written below a file
    time.sleep(1)
    assert not own.lost
    root.unlink()
    (tmp_path / "away").rename(root)
    number = json.loads((root / "driver.json").read_text())["number"]
    deadline = time.monotonic() + 20
    while json.loads((root / "driver.json").read_text())["number"] == number:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # another driver has taken it: it is not removed
    held = json.loads((root / "driver.json").read_text())
    (root / "driver.json").write_text(json.dumps(held | {"token": "another"}))
    own.close()
    assert json.loads((root / "driver.json").read_text())["token"] == "another"


def test_a_grid_has_every_point_once() -> None:
    space = SPACE | {
        "optimizer.momentum": {"choice": [0.5, 0.9], "when": {"optimizer.name": "muon"}}
    }
    del space["optimizer.learning_rate"]
    sweep_settings = settings(algorithm="grid", trials=None, space=space)
    points = sweep_settings.grid()
    # adamw x 3 ranks, muon x 3 ranks x 2 momenta.
    assert len(points) == sweep_settings.number == 9
    assert all(("optimizer.momentum" in p) == (p["optimizer.name"] == "muon") for p in points)
    assert settings(algorithm="grid", trials=4, space=space).number == 4


def suggest(sweep_settings: Sweep, seed: int, count: int) -> list[dict[str, Any]]:
    """Returns the first `count` points that a new searcher suggests."""
    searcher = Searcher(sweep_settings, seed, lambda: 1)
    return [searcher.suggest(str(i)) for i in range(count)]


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_points_are_in_the_space_and_depend_on_the_seed(algorithm: str) -> None:
    points = suggest(settings(algorithm=algorithm), 7, 20)
    assert points == suggest(settings(algorithm=algorithm), 7, 20)
    assert points != suggest(settings(algorithm=algorithm), 8, 20)
    for p in points:
        assert ("optimizer.momentum" in p) == (p["optimizer.name"] == "muon")
        assert 1e-4 <= p["optimizer.learning_rate"] <= 1e-1 and p["adapter.rank"] in (2, 3, 4)
    assert {p["optimizer.name"] for p in points} == {"adamw", "muon"}


def test_a_grid_is_suggested_in_order() -> None:
    sweep_settings = settings(
        algorithm="grid",
        trials=None,
        space={"seed": {"integer": [1, 3]}, "optimizer.beta": {"choice": [5, 6]}},
    )
    assert suggest(sweep_settings, 0, 6) == sweep_settings.grid()


def test_searcher_state_is_saved_and_restored(tmp_path: Path) -> None:
    sweep_settings = settings(algorithm="tpe", trials=30)

    def new_searcher() -> Searcher:
        return Searcher(sweep_settings, 3, lambda: 1)

    def step(searcher: Searcher, i: int) -> dict[str, Any]:
        point: dict[str, Any] = searcher.suggest(str(i))
        score = (point["optimizer.learning_rate"] - 0.01) ** 2
        searcher.on_trial_complete(str(i), {sweep_settings.metric: score})
        return point

    uninterrupted, first = new_searcher(), new_searcher()
    expected = [step(uninterrupted, i) for i in range(25)]
    assert [step(first, i) for i in range(15)] == expected[:15]
    first.save(str(tmp_path / "state"))
    second = new_searcher()
    second.restore(str(tmp_path / "state"))
    assert [step(second, i) for i in range(15, 25)] == expected[15:]
    # Without room for another trial, nothing is suggested.
    assert Searcher(sweep_settings, 3, lambda: 0).suggest("0") is None


class Controller:
    """The part of Tune's controller that schedulers use: the trials."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def get_trials(self) -> list[Trial]:
        return self.trials

    get_live_trials = get_trials


def trial(name: str, status: str = Trial.RUNNING) -> Trial:
    """Returns a trial of Tune that has only an ID and a status."""
    stub = Trial("x", trial_id=name, stub=True)
    stub.status = status
    return stub


def build(kind: str, limit: TrialLimit | None = None) -> Any:
    """Returns a scheduler for 100 steps with a report every 5 steps."""
    return schedulers.build_scheduler(
        settings(scheduler=kind, space=CONTINUOUS), 100, 5, 0, limit or TrialLimit(lambda: 9)
    )


def build_with_trials(kind: str, names: str) -> tuple[Any, Controller]:
    """Returns a scheduler to which running trials of these names were added."""
    scheduler, controller = build(kind), Controller()
    scheduler.set_search_properties("validation/loss", "min")
    for name in names:
        controller.trials.append(trial(name))
        scheduler.on_trial_add(controller, controller.trials[-1])
    return scheduler, controller


@pytest.mark.parametrize("kind", ["asha", "hyperband", "median", "pbt", "none"])
def test_scheduler_state_is_saved_and_restored(kind: str) -> None:
    def result(i: int, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "report": step // 20,
            "validation/loss": float(i),
            "training_iteration": step // 20,
            "time_total_s": 1.0,
        }

    first, controller = build_with_trials(kind, "abc")
    for i, t in enumerate(controller.trials):
        # After a second result, HyperBand would end trials, which needs Tune's own controller.
        if kind != "hyperband" or i < 1:
            first.on_trial_result(controller, t, result(i, 20))
    state = schedulers.dump_state(first)
    second, new_controller = build_with_trials(kind, "abc")
    schedulers.restore_state(second, state, new_controller.trials, second.limit, "/s")
    assert schedulers.dump_state(second) == state
    if kind == "asha":
        decision = first.on_trial_result(controller, controller.trials[2], result(9, 60))
        restored = second.on_trial_result(new_controller, new_controller.trials[2], result(9, 60))
        assert restored == decision
        assert second._trial_info.keys() == first._trial_info.keys()
    if kind == "pbt":
        assert {t.trial_id: s.last_score for t, s in second._trial_state.items()} == {
            "a": -0.0,
            "b": -1.0,
            "c": -2.0,
        }


def test_a_trial_that_only_tune_has_saved_continues() -> None:
    """Tune saves trials and the scheduler's state in two files; a kill may come in between."""
    for kind in ("asha", "hyperband", "median", "pbt"):
        first, _ = build_with_trials(kind, "ab")
        second, controller = build_with_trials(kind, "bc")
        state = schedulers.dump_state(first)
        schedulers.restore_state(second, state, controller.trials, second.limit, "/s")
        result = {
            "step": 20,
            "report": 1,
            "validation/loss": math.nan if kind == "asha" else 1.0,
            "training_iteration": 1,
            "time_total_s": 1.0,
        }
        decision = second.on_trial_result(controller, controller.trials[1], result)
        assert decision in ("CONTINUE", "PAUSE"), kind


def test_pbt_keeps_the_state_of_a_trial_that_is_retried() -> None:
    scheduler = build("pbt", TrialLimit(lambda: 1))
    scheduler.set_search_properties("validation/loss", "min")
    controller = Controller()
    controller.trials.append(trial("a", Trial.PENDING))
    scheduler.on_trial_add(controller, controller.trials[0])
    state = scheduler._trial_state[controller.trials[0]]
    # After a failure, Tune adds the trial again.
    scheduler.on_trial_add(controller, controller.trials[0])
    assert controller.trials[0].status == Trial.PENDING
    assert scheduler._trial_state[controller.trials[0]] is state


def test_the_number_of_running_trials_is_limited() -> None:
    limit = TrialLimit(lambda: 2)
    scheduler = build("none", limit)
    controller = Controller()
    for name, status in (("a", Trial.RUNNING), ("b", Trial.PAUSED), ("c", Trial.PAUSED)):
        controller.trials.append(trial(name, status))
        scheduler.on_trial_add(controller, controller.trials[-1])
    assert limit.room() == 1
    assert scheduler.choose_trial_to_run(controller).trial_id == "b" and not limit.fits()
    controller.trials[1].status = Trial.RUNNING
    assert limit.room() == 0 and scheduler.choose_trial_to_run(controller) is None


def test_report_shows_the_importance_of_settings_and_escapes_errors(tmp_path: Path) -> None:
    sweep_settings = settings(trials=12)
    trials = []
    for i, point in enumerate(suggest(sweep_settings, 1, 12)):
        score = abs(point["optimizer.learning_rate"] - 0.01) * 100
        name, steps = f"t{i}", 20 if i < 6 else 4
        (tmp_path / "trials" / name).mkdir(parents=True)
        metric = sweep_settings.metric
        rows = [{"step": s, metric: score + 20 - s} for s in range(4, steps + 1, 4)]
        (tmp_path / "trials" / name / "reports.json").write_text(json.dumps(rows))
        trials.append(
            {
                "trial": name,
                "config": point,
                "step": steps,
                "score": score,
                "metrics": {},
                "error": None,
                "status": "finished" if steps == 20 else "stopped early",
            }
        )
    trials.append(
        {
            "trial": "bad",
            "config": point,
            "step": None,
            "score": None,
            "metrics": {},
            "error": "loss <nan>",
            "status": "failed",
        }
    )
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    importance = html.importance(trials[:-1], sweep_settings)
    assert max(importance, key=lambda k: importance[k]) == "optimizer.learning_rate"
    assert sum(importance.values()) == pytest.approx(1)
    html.write(RunFolder(str(tmp_path)), sweep_settings)
    text = (tmp_path / "report.html").read_text()
    # A setting that may be null, and is null in all trials, must not break the report.
    for entry in trials:
        entry["config"] |= {"adapter.dropout": None}
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    html.write(
        RunFolder(str(tmp_path)),
        settings(trials=12, space=SPACE | {"adapter.dropout": {"choice": [None, 0.1]}}),
    )
    assert text.count("<svg") == 3 and "loss &lt;nan&gt;" in text and "<nan>" not in text


def test_a_finished_trial_leaves_little_in_memory_and_in_the_saved_state() -> None:
    trial = Trial("x", trial_id="a", stub=True)
    for step in range(1, 21):
        metrics = {f"validation/metric_{i}": float(step * i) for i in range(20)}
        trial.update_last_result(metrics | {"step": step, "training_iteration": step})
    before, result = trial.get_json_state(), dict(trial.last_result)
    SweepCallback.on_trial_complete(None, 0, [trial], trial)  # type: ignore[arg-type]
    after = trial.get_json_state()
    assert sum(map(len, after)) < sum(map(len, before)) / 4
    restored = Trial("x", trial_id="b", stub=True)
    restored.restore_run_metadata(after[1])
    assert restored.last_result == result
