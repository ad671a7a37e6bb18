"""Sweeps, as a person starts them: a job with a Ray of its own, trials that are Ray Train runs, and kills."""

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import RECIPE, run_job, start_job

from sevenfold.engine import checkpoint as ckpt
from sevenfold.recipe import loads
from sevenfold.runs.nodes import LocalNodes

SPACE = {
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
    "optimizer.momentum": {"uniform": [0.5, 0.95], "when": {"optimizer.name": "muon"}},
}
STEPS, EVERY = 20, 4


@pytest.fixture
def home(apart: Path, on_shared_ray: None) -> Path:
    """The folder, for sweeps on the Ray of the test session."""
    return apart


@pytest.fixture
def apart(tree: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with a recipe, for sweeps on a Ray of their own."""
    made: dict[str, Any] = json.loads(json.dumps(RECIPE))
    made["data"] |= tree["data"] | {"executor": "inline"}
    made["train"] |= {"micro_batch": 8, "steps": STEPS}
    made |= {"validation": {"every": EVERY, "rows": 16}, "search": {"trials": 4, "max_concurrent": 1, "space": SPACE}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    return tmp_path


def told(home: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((home / f"runs/{name}-sweep/trials.json").read_text())
    return found


def reports(home: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """By folder of a trial."""
    root = home / f"runs/{name}-sweep/trials"
    return {p.parent.name: json.loads(p.read_text()) for p in root.glob("*/reports.json")}


def ranking(home: Path, name: str) -> list[tuple[dict[str, Any], int, float]]:
    return [(t["config"], t["step"], t["score"]) for t in told(home, name)]


@pytest.mark.slow
def test_killed_and_resubmitted_it_ends_as_if_nothing_had_been(home: Path) -> None:
    out = run_job("sweep", "r.yaml", "name=whole", home=home)
    assert "4 trials ended; none left a placement group or a process" in out
    assert any(t["step"] < STEPS for t in told(home, "whole"))  # the scheduler had something to remember
    process = start_job("sweep", "r.yaml", "name=killed", home=home)
    deadline = time.monotonic() + 200
    finished: set[str] = set()
    while time.monotonic() < deadline and process.poll() is None:
        found = reports(home, "killed")
        finished = {name for name, rows in found.items() if rows[-1]["step"] == STEPS}
        if finished and len(found) > len(finished):  # one is over, the next under way
            break
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {n: (home / f"runs/killed-sweep/trials/{n}/metrics.jsonl").read_text() for n in finished}
    assert before
    out = run_job("sweep", "r.yaml", "name=killed", home=home)
    assert "under way; going on" in out and "none left a placement group or a process" in out
    assert ranking(home, "killed") == ranking(home, "whole")
    for name, text in before.items():  # not run again
        assert (home / f"runs/killed-sweep/trials/{name}/metrics.jsonl").read_text() == text
    assert len(reports(home, "killed")) == 4
    assert "finished before" in run_job("sweep", "r.yaml", "name=killed", home=home)


@pytest.mark.slow
def test_stopped_by_hand_it_goes_on_when_asked_again(home: Path) -> None:
    words = ["sweep", "r.yaml", "name=stopped", "search.trials=2", "search.scheduler=none"]
    process = start_job(*words, home=home)
    deadline = time.monotonic() + 200
    while not reports(home, "stopped") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "run the same command again" in err
    assert not (home / "runs/stopped-sweep/summary.json").exists()
    assert "2 trials ended" in run_job(*words, home=home)
    assert {t["status"] for t in told(home, "stopped")} == {"finished"}


@pytest.mark.slow
def test_a_lost_node_takes_no_trial_with_it(apart: Path) -> None:
    nodes = LocalNodes(1, dashboard=True)
    try:
        nodes.ready(2)
        changes = [f"{k}={v}" for k, v in nodes.worker.items()]
        changes += ["search.trials=2", "search.max_concurrent=2", "search.scheduler=none"]
        changes += ["train.steps=100", "validation.every=10"]
        words = ["r.yaml", *changes]
        run_job("sweep", *words, "name=whole", home=apart)
        process = start_job("sweep", *words, "name=lost", home=apart)
        deadline = time.monotonic() + 200
        young: list[str] = []
        while not young and time.monotonic() < deadline and process.poll() is None:
            young = [n for n, rows in reports(apart, "lost").items() if rows[-1]["step"] < 50]
            time.sleep(0.2)
        trial = young[0]
        where = json.loads((apart / f"runs/lost-sweep/trials/{trial}/workers.json").read_text())[0]["node"]
        nodes.end(where)
        while where in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
            time.sleep(0.2)
        nodes.ready(2)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "none left a placement group or a process" in out
        assert ranking(apart, "lost") == ranking(apart, "whole")
        assert {t["step"] for t in told(apart, "lost")} == {100}
        assert json.loads((apart / f"runs/lost-sweep/trials/{trial}/workers.json").read_text())[0]["node"] != where
    finally:
        nodes.close()


@pytest.mark.slow
def test_pbt_goes_on_from_the_donors_weights(home: Path) -> None:
    rates = {"optimizer.learning_rate": {"choice": [1e-5, 1e-4, 1e-3, 1e-2]}, "optimizer.weight_decay": {"uniform": [0, 0.5]}}
    search = {"scheduler": "pbt", "trials": 3, "max_concurrent": 3, "quantile": 0.34, "space": rates}
    run_job("sweep", "r.yaml", "name=pbt", f"search={json.dumps(search)}", home=home)
    root = home / "runs/pbt-sweep"
    descents = sorted(root.glob("trials/*/descent.json"))
    assert descents, "nobody went on from another's weights"
    for path in descents:
        descent = json.loads(path.read_text())
        begun = ckpt.verified(descent["begins"])  # its files have the donor's sums
        donor = loads((Path(descent["folder"]) / "recipe.yaml").read_text(), "")
        mine = loads((path.parent / "recipe.yaml").read_text(), "")
        assert begun.extra["recipe"] == donor.hash() != mine.hash() and begun.step == descent["step"]
        assert mine.optimizer != donor.optimizer
        if Path(descent["checkpoint"]).exists():
            assert ckpt.read(descent["checkpoint"]).files == begun.files
        if (path.parent / "reports.json").exists():
            first = json.loads((path.parent / "reports.json").read_text())[0]
            assert first["step"] == begun.step + EVERY
            theirs = {
                r["step"]: r["validation/loss"] for r in json.loads((Path(descent["folder"]) / "reports.json").read_text())
            }
            assert first["validation/loss"] < theirs[begun.step] + 0.1
    assert all(t["step"] == STEPS and not t["error"] for t in told(home, "pbt"))


@pytest.mark.slow
def test_paused_trials_resume_at_their_step(home: Path) -> None:
    search = {"scheduler": "bohb", "algorithm": "tpe", "trials": 5, "max_concurrent": 2, "space": SPACE}
    out = run_job("sweep", "r.yaml", "name=hb", f"search={json.dumps(search)}", home=home)
    assert ": goes on" in out and "none left a placement group or a process" in out
    found = reports(home, "hb")
    for rows in found.values():
        assert [r["step"] for r in rows] == list(range(EVERY, rows[-1]["step"] + 1, EVERY))
    trials = told(home, "hb")
    assert trials[0]["step"] == STEPS and any(t["step"] == 2 * EVERY for t in trials)  # the first rung of 5 reports, eta 3


@pytest.mark.slow
def test_a_trial_that_fails_is_marked_and_the_sweep_goes_on(home: Path) -> None:
    space = {"optimizer.learning_rate": {"choice": [1e30, 1e-2]}}
    search = {"algorithm": "grid", "scheduler": "none", "max_failures": 0, "space": space}
    words = ["name=nan", f"search={json.dumps(search)}", "guard.max_skipped=2", "guard.max_rollbacks=0"]
    out = run_job("sweep", "r.yaml", *words, home=home)
    good, bad = told(home, "nan")
    assert good["step"] == STEPS and bad["config"]["optimizer.learning_rate"] == 1e30
    assert "was not finite" in bad["error"] and f"trial {bad['trial']} failed: " in out
    root = home / "runs/nan-sweep"
    with open(root / "trials.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["status"] for r in rows] == ["finished", "failed"] and rows[1]["error"] == bad["error"]
    page = (root / "report.html").read_text()
    assert page.count("<svg") == 2 and bad["trial"] in page
    best = loads((root / "best.yaml").read_text(), "")
    assert best.optimizer.learning_rate == 1e-2 and best.search is None
    assert list(root.glob(f"trials/{good['trial']}/tensorboard/events*"))
    # on the seat that the failed one left: nothing of that shows
    run_job("pretrain", str(root / "best.yaml"), "name=alone", home=home)
    alone = json.loads((home / "runs/alone/summary.json").read_text())
    assert alone["metrics"]["validation/loss"] == good["score"]


@pytest.mark.slow
def test_a_budget_ends_it_with_what_it_has(home: Path) -> None:
    budget = ["search.trials=40", "search.worker_hour_cost=2", "search.max_cost=0.012"]  # 22 s
    out = run_job("sweep", "r.yaml", "name=dear", *budget, home=home)
    assert "search.max_cost 0.012 is spent: the sweep ends with what it has" in out
    assert all((t["status"] == "finished") == (t["step"] == STEPS) for t in told(home, "dear") if t["score"] is not None)
    assert 0 < len([t for t in told(home, "dear") if t["score"] is not None]) < 40


@pytest.mark.nightly
def test_two_sweeps_on_one_host_do_not_meet(apart: Path) -> None:
    """Each has a Ray of its own; stopped trials are freed by asking the right one (ray#54305)."""
    both = [start_job("sweep", "r.yaml", f"name={name}", "search.max_concurrent=2", home=apart) for name in ("one", "other")]
    for process in both:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        assert "4 trials ended; none left a placement group or a process" in out
    assert ranking(apart, "one")[0] == ranking(apart, "other")[0]
    assert any(t["step"] < STEPS for t in told(apart, "one"))
