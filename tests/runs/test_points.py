"""What is tried, who may run, and what outlives a process: without trials."""

import json
import math
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RECIPE
from pydantic import ValidationError
from ray.tune.experiment import Trial

from sevenfold.errors import InputError
from sevenfold.recipe import Recipe, Search
from sevenfold.report import page
from sevenfold.runs import lease, schedule, sweep
from sevenfold.runs.schedule import Gate
from sevenfold.runs.suggest import Points
from sevenfold.storage import RunFolder

RATE = {"loguniform": [1e-4, 1e-1]}
SPACE: dict[str, Any] = {
    "optimizer.momentum": {"uniform": [0.5, 0.95], "when": {"optimizer.name": "muon"}},
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": RATE,
    "adapter.rank": {"integer": [2, 4]},
}


def search(**changes: Any) -> Search:
    return Search.model_validate({"trials": 20, "space": SPACE} | changes)


ENDLESS = {"optimizer.learning_rate": RATE}
WIDE = {"model.config.hidden_size": {"choice": [8]}}
HANGING = {"seed": {"choice": [1], "when": {"train.steps": 3}}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {"seed": {"integer": [3, 2]}}}, "the space has no point: 3 is not below 2"),
        ({"space": {"seed": {"uniform": [1, 1]}}}, "the space has no point"),
        ({"space": {"seed": {}}}, "give exactly one of uniform, loguniform, integer, choice"),
        ({"space": HANGING}, "when: expected other keys of the space, found train.steps"),
        ({"trials": 0}, "greater than 0"),
        ({"trials": None}, "trials: give their number"),
        ({"algorithm": "grid"}, "optimizer.learning_rate has endless values"),
        ({"scheduler": "bohb"}, "set search.algorithm=tpe"),
        ({"scheduler": "pbt", "space": WIDE}, "hidden_size cannot change while a trial trains"),
        ({"scheduler": "pbt", "algorithm": "tpe", "space": ENDLESS}, "set search.algorithm to random or grid"),
        ({"max_cost": 3}, "give both max_cost and worker_hour_cost"),
    ],
)
def test_what_makes_no_search(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as e:
        search(**changes)
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"schedule.warmup_steps": {"uniform": [0, 40]}}, "schedule.warmup_steps"),
        ({"train.global_batch": {"integer": [64, 128]}}, "must be a multiple"),
        ({"train.steps": {"choice": [5, 6]}}, "'train.steps' is the same for all trials"),
        ({"optimizer.learning_rate": {"uniform": [-1, 1]}}, "learning_rate"),
    ],
)
def test_every_kind_of_point_is_tried_beforehand(space: dict[str, Any], says: str) -> None:
    tree = json.loads(json.dumps(RECIPE))
    tree["data"]["sources"] = [{"path": "x"}]
    recipe = Recipe.model_validate(tree | {"search": {"trials": 4, "metric": "train/loss", "space": space}})
    with pytest.raises(InputError, match=says):
        sweep.checked(recipe)


def test_what_is_best_follows_from_the_metric() -> None:
    for metric, best in (("validation/accuracy", "max"), ("validation/bits_per_byte", "min"), ("train/loss", "min")):
        assert search(metric=metric).best == best
    assert search(metric="validation/rougeL", mode="min").best == "min"


def test_a_trial_that_failed_is_not_the_best(tmp_path: Path) -> None:
    trials: list[Any] = []
    for name, status, score in (("a", Trial.ERROR, 0.1), ("b", Trial.TERMINATED, 0.5), ("c", Trial.TERMINATED, math.nan)):
        made = trial(name, status)
        made.run_metadata.last_result = {"validation/loss": score, "step": 4}
        trials.append(made)
    (tmp_path / "trials/b").mkdir(parents=True)
    (tmp_path / "trials/b/whole").touch()
    job: Any = SimpleNamespace(folder=str(tmp_path), recipe=SimpleNamespace(steps=20))
    found = sweep.ranked(trials, job, search())
    assert [(t["trial"], t["status"]) for t in found] == [("b", "finished"), ("a", "failed"), ("c", "stopped early")]


def _holds(folder: str, taken: Any, end: Any) -> None:
    lease.RENEWED = 0.2
    lease.Lease(RunFolder(folder))
    taken.set()
    end.wait()
    os._exit(9)


def test_one_driver_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED", 0.2)
    spawn = multiprocessing.get_context("spawn")
    taken, end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_holds, args=(str(tmp_path), taken, end))
    other.start()
    assert taken.wait(60)
    with pytest.raises(InputError, match=f"another driver works on it \\(process {other.pid} on "):
        lease.Lease(RunFolder(str(tmp_path)))
    end.set()
    other.join()
    mine = lease.Lease(RunFolder(str(tmp_path)))  # at once: that process is gone
    assert not mine.lost
    mine.close()
    assert not (tmp_path / "driver.json").exists()


def test_a_grid_has_every_point_once() -> None:
    space = SPACE | {"optimizer.momentum": {"choice": [0.5, 0.9], "when": {"optimizer.name": "muon"}}}
    del space["optimizer.learning_rate"]
    made = search(algorithm="grid", trials=None, space=space)
    points = made.grid()
    assert len(points) == made.number == 9  # adamw x 3 ranks, muon x 3 ranks x 2 momenta
    assert all(("optimizer.momentum" in p) == (p["optimizer.name"] == "muon") for p in points)
    assert search(algorithm="grid", trials=4, space=space).number == 4


def points(made: Search, seed: int, count: int) -> list[dict[str, Any]]:
    maker = Points(made, seed, lambda: 1)
    return [maker.suggest(str(i)) for i in range(count)]


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_points_are_in_their_space_and_the_seeds(algorithm: str) -> None:
    made = points(search(algorithm=algorithm), 7, 20)
    assert made == points(search(algorithm=algorithm), 7, 20) != points(search(algorithm=algorithm), 8, 20)
    for p in made:
        assert ("optimizer.momentum" in p) == (p["optimizer.name"] == "muon")
        assert 1e-4 <= p["optimizer.learning_rate"] <= 1e-1 and p["adapter.rank"] in (2, 3, 4)
    assert {p["optimizer.name"] for p in made} == {"adamw", "muon"}


def test_a_grid_is_suggested_as_it_is() -> None:
    made = search(algorithm="grid", trials=None, space={"seed": {"integer": [1, 3]}, "optimizer.beta": {"choice": [5, 6]}})
    assert points(made, 0, 6) == made.grid()


def test_what_a_searcher_saw_outlives_it(tmp_path: Path) -> None:
    made = search(algorithm="tpe", trials=30)

    def step(maker: Points, i: int) -> dict[str, Any]:
        point: dict[str, Any] = maker.suggest(str(i))
        maker.on_trial_complete(str(i), {made.metric: (point["optimizer.learning_rate"] - 0.01) ** 2})
        return point

    whole, first = Points(made, 3, lambda: 1), Points(made, 3, lambda: 1)
    expected = [step(whole, i) for i in range(25)]
    assert [step(first, i) for i in range(15)] == expected[:15]
    first.save(str(tmp_path / "state"))
    second = Points(made, 3, lambda: 1)
    second.restore(str(tmp_path / "state"))
    assert [step(second, i) for i in range(15, 25)] == expected[15:]
    assert Points(made, 3, lambda: 0).suggest("0") is None


class Controller:
    """What a scheduler asks of Tune: the trials."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def get_trials(self) -> list[Trial]:
        return self.trials

    get_live_trials = get_trials


def trial(name: str, status: str = Trial.RUNNING) -> Trial:
    made = Trial("x", trial_id=name, stub=True)
    made.status = status
    return made


@pytest.mark.parametrize("kind", ["asha", "hyperband", "median", "pbt", "none"])
def test_what_a_scheduler_knows_outlives_it(kind: str) -> None:
    def made(names: str) -> tuple[Any, Controller]:
        one = schedule.scheduler(search(scheduler=kind, space=ENDLESS), 100, 5, 0, Gate(lambda: 9))
        one.set_search_properties("validation/loss", "min")
        controller = Controller()
        for name in names:
            controller.trials.append(trial(name))
            one.on_trial_add(controller, controller.trials[-1])
        return one, controller

    def result(i: int, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "report": step // 20,
            "validation/loss": float(i),
            "training_iteration": step // 20,
            "time_total_s": 1.0,
        }

    first, there = made("abc")
    for i, t in enumerate(there.trials):
        if kind != "hyperband" or i < 1:  # a second one would be judged, by way of Tune
            first.on_trial_result(there, t, result(i, 20))
    state = schedule.dumped(first)
    second, here = made("abc")
    schedule.restored(second, state, here.trials, second.gate)
    assert schedule.dumped(second) == state
    if kind == "asha":
        assert second.on_trial_result(here, here.trials[2], result(9, 60)) == first.on_trial_result(
            there, there.trials[2], result(9, 60)
        )
        assert second._trial_info.keys() == first._trial_info.keys()
    if kind == "pbt":
        assert {t.trial_id: s.last_score for t, s in second._trial_state.items()} == {"a": -0.0, "b": -1.0, "c": -2.0}


def test_a_trial_that_neither_tune_nor_the_scheduler_has_forgotten_goes_on() -> None:
    """Tune keeps them in two files; a kill may come between."""
    for kind in ("asha", "hyperband", "median", "pbt"):
        first: Any = schedule.scheduler(search(scheduler=kind, space=ENDLESS), 100, 5, 0, Gate(lambda: 9))
        second: Any = schedule.scheduler(search(scheduler=kind, space=ENDLESS), 100, 5, 0, Gate(lambda: 9))
        there, here = Controller(), Controller()
        for one, controller, names in ((first, there, "ab"), (second, here, "bc")):
            one.set_search_properties("validation/loss", "min")
            for name in names:
                controller.trials.append(trial(name))
                one.on_trial_add(controller, controller.trials[-1])
        schedule.restored(second, schedule.dumped(first), here.trials, second.gate)
        told = {
            "step": 20, "report": 1, "validation/loss": math.nan if kind == "asha" else 1.0, "training_iteration": 1,
            "time_total_s": 1.0,
        }  # fmt: skip
        assert second.on_trial_result(here, here.trials[1], told) in ("CONTINUE", "PAUSE"), kind


def test_a_trial_of_a_population_that_failed_is_tried_again_as_it_was() -> None:
    one: Any = schedule.scheduler(search(scheduler="pbt", space=ENDLESS), 100, 5, 0, Gate(lambda: 1))
    one.set_search_properties("validation/loss", "min")
    controller = Controller()
    controller.trials.append(trial("a", Trial.PENDING))
    one.on_trial_add(controller, controller.trials[0])
    known = one._trial_state[controller.trials[0]]
    one.on_trial_add(controller, controller.trials[0])  # as Tune does after a failure
    assert controller.trials[0].status == Trial.PENDING and one._trial_state[controller.trials[0]] is known


def test_no_more_run_than_there_is_room_for() -> None:
    gate = Gate(lambda: 2)
    one: Any = schedule.scheduler(search(scheduler="none", space=ENDLESS), 100, 5, 0, gate)
    controller = Controller()
    for name, status in (("a", Trial.RUNNING), ("b", Trial.PAUSED), ("c", Trial.PAUSED)):
        controller.trials.append(trial(name, status))
        one.on_trial_add(controller, controller.trials[-1])
    assert gate.room() == 1 and one.choose_trial_to_run(controller).trial_id == "b" and not gate.fits()
    controller.trials[1].status = Trial.RUNNING
    assert gate.room() == 0 and one.choose_trial_to_run(controller) is None


def test_the_page_shows_what_mattered(tmp_path: Path) -> None:
    made = search(trials=12)
    trials = []
    for i, point in enumerate(points(made, 1, 12)):
        score = abs(point["optimizer.learning_rate"] - 0.01) * 100
        name, steps = f"t{i}", 20 if i < 6 else 4
        (tmp_path / "trials" / name).mkdir(parents=True)
        rows = [{"step": s, made.metric: score + 20 - s} for s in range(4, steps + 1, 4)]
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
        {"trial": "bad", "config": point, "step": None, "score": None, "metrics": {}, "error": "loss <nan>", "status": "failed"}
    )
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    found = page.importance(trials[:-1], made)
    assert max(found, key=lambda k: found[k]) == "optimizer.learning_rate" and sum(found.values()) == pytest.approx(1)
    page.write(RunFolder(str(tmp_path)), made)
    text = (tmp_path / "report.html").read_text()
    for one in trials:
        one["config"] |= {"adapter.dropout": None}  # a choice that may be none, and always was
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    page.write(RunFolder(str(tmp_path)), search(trials=12, space=SPACE | {"adapter.dropout": {"choice": [None, 0.1]}}))
    assert text.count("<svg") == 3 and "loss &lt;nan&gt;" in text and "<nan>" not in text
