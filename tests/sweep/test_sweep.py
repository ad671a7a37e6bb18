"""Sweeps as jobs: results, kills, lost nodes, failing trials, budgets and schedulers."""

import csv
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import RECIPE, run_job, start_job
from hostile.runs import Bomb

from sevenfold.engine.checkpoint import read_manifest, verified_checkpoint
from sevenfold.faults.nodes import LocalNodes
from sevenfold.recipe import loads

SPACE = {
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
    "optimizer.momentum": {"uniform": [0.5, 0.95], "when": {"optimizer.name": "muon"}},
}
# Optimizer steps per trial, and steps between validations.
STEPS, EVERY = 20, 4


@pytest.fixture
def home(apart: Path, on_shared_ray: None) -> Path:
    """The folder of `apart`, for sweeps on the shared Ray cluster of the test session."""
    return apart


@pytest.fixture
def apart(tree: dict[str, Any], tmp_path: Path) -> Path:
    """A working folder with the recipe `r.yaml`, for sweeps that start their own Ray cluster."""
    recipe: dict[str, Any] = json.loads(json.dumps(RECIPE))
    recipe["data"] |= tree["data"] | {"executor": "inline"}
    recipe["train"] |= {"micro_batch": 8, "steps": STEPS}
    recipe |= {
        "validation": {"every": EVERY, "rows": 16},
        "sweep": {"trials": 4, "max_concurrent": 1, "space": SPACE},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def read_trials(home: Path, name: str) -> list[dict[str, Any]]:
    """Returns the trials of a sweep, the best first."""
    path = home / f"runs/{name}-sweep/trials.json"
    trials: list[dict[str, Any]] = json.loads(path.read_text())
    return trials


def read_reports(home: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the reports of each trial so far, by the name of its folder."""
    root = home / f"runs/{name}-sweep/trials"
    return {p.parent.name: json.loads(p.read_text()) for p in root.glob("*/reports.json")}


def ranking(home: Path, name: str) -> list[tuple[dict[str, Any], int, float]]:
    """Returns settings, last step and score of each trial, the best first."""
    return [(t["config"], t["step"], t["score"]) for t in read_trials(home, name)]


def node_of(home: Path, name: str, trial: str) -> str:
    """Returns the ID of the node on which a trial runs or ran last."""
    path = home / f"runs/{name}-sweep/trials/{trial}/workers.json"
    return str(json.loads(path.read_text())[0]["node"])


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_has_the_same_result(home: Path) -> None:
    output = run_job("sweep", "r.yaml", "name=whole", home=home)
    assert "4 trials finished; all resources released" in output
    # The scheduler stopped a trial early, so its state matters.
    assert any(t["step"] < STEPS for t in read_trials(home, "whole"))
    process = start_job("sweep", "r.yaml", "name=killed", home=home)
    deadline = time.monotonic() + 200
    finished: set[str] = set()
    while time.monotonic() < deadline and process.poll() is None:
        reports = read_reports(home, "killed")
        finished = {name for name, rows in reports.items() if rows[-1]["step"] == STEPS}
        # One trial has finished, and the next one runs.
        if finished and len(reports) > len(finished):
            break
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # A copy of the sweep continues, and the original is not changed. Pickles that somebody has put
    # beside its saved state are not read.
    original, copied = home / "runs/killed-sweep", home / "runs/copied-sweep"
    shutil.copytree(original, copied)
    for name in ("experiment_state-9.json", "searcher-state-9.pkl", "callback-states-9.pkl"):
        (copied / "ray/tune" / name).write_bytes(pickle.dumps(Bomb(str(home / "trace"))))

    def state() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in original.rglob("*") if p.is_file()}

    files = {}
    while files != state():  # the processes of a killed driver end some seconds after it
        files = state()
        time.sleep(15)
    root = copied / "trials"
    before = {name: (root / name / "metrics.jsonl").read_text() for name in finished}
    assert before
    output = run_job("sweep", "r.yaml", "name=copied", home=home)
    assert "resuming the sweep" in output and "all resources released" in output
    assert ranking(home, "copied") == ranking(home, "whole")
    assert files == state()
    assert not (home / "trace").exists()
    summary = json.loads((copied / "summary.json").read_text())
    assert summary["checkpoint"].startswith(str(copied))
    # The best trials keep their checkpoints (sweep.keep).
    kept = {p.parent.parent.name for p in root.glob("*/checkpoints/step-*")}
    assert kept == {t["trial"] for t in read_trials(home, "copied")[:3]}
    # Finished trials are not run again.
    for name, text in before.items():
        assert (root / name / "metrics.jsonl").read_text() == text
    assert len(read_reports(home, "copied")) == 4
    assert "already finished" in run_job("sweep", "r.yaml", "name=copied", home=home)
    # Killed after the last trial, before the results were written.
    (copied / "summary.json").unlink()
    output = run_job("sweep", "r.yaml", "name=copied", home=home)
    assert "all trials had ended" in output and (copied / "summary.json").exists()


@pytest.mark.nightly
def test_an_interrupted_sweep_resumes(home: Path) -> None:
    words = ["sweep", "r.yaml", "name=stopped", "sweep.trials=2", "sweep.scheduler=none"]
    process = start_job(*words, home=home)
    deadline = time.monotonic() + 200
    while (
        not read_reports(home, "stopped") and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130 and "run the same command to resume" in stderr
    assert not (home / "runs/stopped-sweep/summary.json").exists()
    assert "2 trials finished" in run_job(*words, home=home)
    assert {t["status"] for t in read_trials(home, "stopped")} == {"finished"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray_token")
def test_trials_of_a_lost_node_resume_on_another_one(apart: Path) -> None:
    nodes = LocalNodes(1, dashboard=True)
    try:
        nodes.set_count(2)
        changes = [f"{k}={v}" for k, v in nodes.recipe_overrides.items()]
        changes += ["sweep.trials=2", "sweep.max_concurrent=2", "sweep.scheduler=none"]
        changes += ["train.steps=100", "validation.every=10"]
        words = ["r.yaml", *changes]
        run_job("sweep", *words, "name=whole", home=apart)
        process = start_job("sweep", *words, "name=lost", home=apart)
        deadline = time.monotonic() + 200
        early: list[str] = []
        while not early and time.monotonic() < deadline and process.poll() is None:
            reports = read_reports(apart, "lost")
            early = [name for name, rows in reports.items() if rows[-1]["step"] < 50]
            time.sleep(0.2)
        trial = early[0]
        node = node_of(apart, "lost", trial)
        nodes.kill_node(node)
        while node in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
            time.sleep(0.2)
        nodes.set_count(2)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "all resources released" in stdout
        assert ranking(apart, "lost") == ranking(apart, "whole")
        assert {t["step"] for t in read_trials(apart, "lost")} == {100}
        assert node_of(apart, "lost", trial) != node
    finally:
        nodes.close()


@pytest.mark.slow
def test_pbt_trials_continue_from_the_donors_weights(home: Path) -> None:
    rates = {
        "optimizer.learning_rate": {"choice": [1e-5, 1e-4, 1e-3, 1e-2]},
        "optimizer.weight_decay": {"uniform": [0, 0.5]},
    }
    # One trial at a time: the trials take turns at each report, whatever the machine's speed.
    # Trials side by side can end before another one reports, and then none is replaced.
    search = {
        "scheduler": "pbt",
        "trials": 2,
        "max_concurrent": 1,
        "quantile": 0.5,
        "space": rates,
    }
    run_job("sweep", "r.yaml", "name=pbt", f"sweep={json.dumps(search)}", home=home)
    root = home / "runs/pbt-sweep"
    descents = sorted(root.glob("trials/*/descent.json"))
    assert descents, "no trial continued from another trial's weights"
    for path in descents:
        descent = json.loads(path.read_text())
        # Verifies that the files of the first checkpoint have the checksums of the donor's files.
        initial = verified_checkpoint(descent["begins"])
        donor_folder = Path(descent["folder"])
        donor = loads((donor_folder / "recipe.yaml").read_text(), "")
        recipe = loads((path.parent / "recipe.yaml").read_text(), "")
        assert initial.extra["recipe"] == donor.hash() != recipe.hash()
        assert initial.step == descent["step"]
        assert recipe.optimizer != donor.optimizer
        if Path(descent["checkpoint"]).exists():
            assert read_manifest(descent["checkpoint"]).files == initial.files
        if (path.parent / "reports.json").exists():
            first = json.loads((path.parent / "reports.json").read_text())[0]
            assert first["step"] == initial.step + EVERY
            donor_reports = json.loads((donor_folder / "reports.json").read_text())
            donor_losses = {r["step"]: r["validation/loss"] for r in donor_reports}
            assert first["validation/loss"] < donor_losses[initial.step] + 0.1
    assert all(t["step"] == STEPS and not t["error"] for t in read_trials(home, "pbt"))


@pytest.mark.nightly
def test_paused_trials_resume_at_their_step(home: Path) -> None:
    search = {
        "scheduler": "bohb",
        "algorithm": "tpe",
        "trials": 5,
        "max_concurrent": 2,
        "space": SPACE,
    }
    output = run_job("sweep", "r.yaml", "name=hb", f"sweep={json.dumps(search)}", home=home)
    assert "): resuming" in output and "all resources released" in output
    for rows in read_reports(home, "hb").values():
        assert [r["step"] for r in rows] == list(range(EVERY, rows[-1]["step"] + 1, EVERY))
    trials = read_trials(home, "hb")
    assert trials[0]["step"] == STEPS
    # With 5 reports and eta 3, the first rung is at the second report.
    assert any(t["step"] == 2 * EVERY for t in trials)


@pytest.mark.slow
def test_a_failed_trial_is_marked_and_the_sweep_continues(home: Path) -> None:
    space = {"optimizer.learning_rate": {"choice": [1e30, 1e-2]}}
    search = {"algorithm": "grid", "scheduler": "none", "max_failures": 0, "space": space}
    words = [
        "name=nan",
        f"sweep={json.dumps(search)}",
        "guard.max_skipped=2",
        "guard.max_rollbacks=0",
    ]
    output = run_job("sweep", "r.yaml", *words, home=home)
    good, bad = read_trials(home, "nan")
    assert good["step"] == STEPS and bad["config"]["optimizer.learning_rate"] == 1e30
    assert "was not finite" in bad["error"] and f"trial {bad['trial']} failed: " in output
    root = home / "runs/nan-sweep"
    with open(root / "trials.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["status"] for r in rows] == ["finished", "failed"]
    assert rows[1]["error"] == bad["error"]
    page = (root / "report.html").read_text()
    assert page.count("<svg") == 2 and bad["trial"] in page
    best = loads((root / "best.yaml").read_text(), "")
    assert best.optimizer.learning_rate == 1e-2 and best.sweep is None
    assert list(root.glob(f"trials/{good['trial']}/tensorboard/events*"))
    # The good trial used the resources of the failed one, which must not change its result.
    run_job("pretrain", str(root / "best.yaml"), "name=alone", home=home)
    alone = json.loads((home / "runs/alone/summary.json").read_text())
    assert alone["metrics"]["validation/loss"] == good["score"]


@pytest.mark.nightly
def test_a_sweep_stops_when_its_budget_is_used_up(home: Path) -> None:
    # A cost of 0.012 at 2 per worker hour is 22 s of one worker.
    budget = ["sweep.trials=40", "sweep.worker_hour_cost=2", "sweep.max_cost=0.012"]
    output = run_job("sweep", "r.yaml", "name=costly", *budget, home=home)
    assert "sweep.max_cost (0.012) is used up: stopping the sweep" in output
    scored = [t for t in read_trials(home, "costly") if t["score"] is not None]
    assert all((t["status"] == "finished") == (t["step"] == STEPS) for t in scored)
    assert 0 < len(scored) < 40


@pytest.mark.nightly
def test_two_sweeps_on_one_host_do_not_interfere(apart: Path) -> None:
    """Each has its own Ray cluster and must free stopped trials in that one (ray#54305)."""
    processes = [
        start_job("sweep", "r.yaml", f"name={name}", "sweep.max_concurrent=2", home=apart)
        for name in ("one", "other")
    ]
    for process in processes:
        stdout, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
        assert "4 trials finished; all resources released" in stdout
    assert ranking(apart, "one")[0] == ranking(apart, "other")[0]
    assert any(t["step"] < STEPS for t in read_trials(apart, "one"))
