"""Exactness, proved by kills: SIGKILL at random steps, another number of workers each time, and one ledger in the end.

A seed takes minutes: CI runs one, `make test-nightly` twenty.
"""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, STEPS, refused, run_job, start_job
from safetensors.numpy import load_file

from sevenfold.cli import main
from sevenfold.data.documents import document_hash
from sevenfold.data.ledger import Ledger
from sevenfold.recipe import parse
from sevenfold.runs.faults import Run


class Killed(Run):
    """A job under way on a Ray of its own."""

    def __init__(self, home: Path, name: str, workers: int):
        words = [
            sys.executable,
            str(ROOT / "jobs/pretrain.py"),
            "pretrain.yaml",
            f"name={name}",
            f"cluster.num_workers={workers}",
        ]
        super().__init__(words, {"SEVENFOLD_HOME": str(home)}, str(home))

    def workers(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if "TrainWorker" in " ".join(p.cmdline())]

    def kill_worker(self, rng: random.Random) -> None:
        rng.choice(self.workers()).send_signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        for p in self.workers():
            p.send_signal(number)

    def kill(self) -> None:
        """Its Ray notices and ends."""
        left = psutil.Process(self.process.pid).children(recursive=True)
        super().kill()
        psutil.wait_procs(left, timeout=30)


def ledger(run: Path) -> dict[int, list[tuple[int, ...]]]:
    out: dict[int, list[tuple[int, ...]]] = {}
    for d in Ledger(str(run / "ledger")).read(1, STEPS):
        out.setdefault(d.step, []).append(tuple(d[1:]))
    return out


def losses(run: Path) -> list[float]:
    """The loss of each step, in order; each step is there once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return [loss for _, loss in found]


def killed(home: Path, seed: int) -> str:
    """Kills and resumes a run as the seed says. Returns what was done."""
    rng, name, told = random.Random(seed), f"killed-{seed}", []
    at = 0
    for workers in (2, 3, 1):
        run = Killed(home, name, workers)
        if workers == 2:
            at = rng.randint(2, 12)
            run.reach(at)
            run.kill_worker(rng)
            told.append(f"worker of 2 at {run.step}")
            while not run.failed and run.process.poll() is None:  # it goes on by itself
                time.sleep(0.01)
            run.reach(1)
        at = rng.randint(at + 1, at + 14)
        run.reach(at)
        run.kill()
        told.append(f"driver of {workers} at {run.step}")
    out = run_job("pretrain", "pretrain.yaml", f"name={name}", "cluster.num_workers=4", home=home)
    assert "going on from step" in out
    return ", ".join(told)


def check(home: Path, seed: int) -> None:
    told = killed(home, seed)
    run, undisturbed = home / f"runs/killed-{seed}", home / "runs/whole"
    found, whole = ledger(run), ledger(undisturbed)
    assert sorted(found) == list(range(1, STEPS + 1)), told
    assert found == whole, told
    # another number of workers rounds otherwise, which this learning rate amplifies
    assert losses(run)[:30] == pytest.approx(losses(undisturbed)[:30], rel=1e-4), told
    print(f"seed {seed}: {told}: {sum(map(len, found.values()))} draws of {STEPS} steps as in the unkilled run")


def test_the_unkilled_run_reads_each_row_once_and_its_mixture_changes(home: Path) -> None:
    whole = ledger(home / "runs/whole")
    rows: dict[int, list[int]] = {}
    for step in sorted(whole):
        for _, _, window, row, count, _ in whole[step]:
            rows.setdefault(window, []).extend(range(row, row + count))
    assert all(found == list(range(len(found))) for found in rows.values())  # none twice, none missing, in order
    manifest: dict[str, Any] = json.loads((home / "runs/whole/manifest.json").read_text())["train"]
    assert len(rows) > 2 * len(manifest["row_groups"]["shard"]) or max(rows) > 16  # through two epochs


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.nightly if n else pytest.mark.slow) for n in range(20)])
def test_kills_do_not_show(home: Path, seed: int) -> None:
    check(home, seed)


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_the_token_cache_has_the_same_ledger(home: Path) -> None:
    words = ("pretrain.yaml", f"data.cache={home / 'cache'}", "cluster.num_workers=1")
    process = start_job("tokenize", *words, home=home)
    deadline = time.monotonic() + 200
    while not (home / "cache/key.json").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(left, timeout=30)
    said = run_job("pretrain", *words, "name=cached", home=home, code=2)
    assert "found none that is finished" in said and not (home / "runs/cached").exists()
    assert "2/2 shards" in run_job("tokenize", *words, home=home)
    assert "finished before" in run_job("tokenize", *words, home=home)
    run_job("pretrain", *words, "name=cached", home=home)
    assert ledger(home / "runs/cached") == ledger(home / "runs/whole")


def test_the_ledger_tells_and_replays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(home / "runs/whole")
    assert main(["ledger", run, "which", "--step", "30", "--out", "step.parquet"]) == 0
    said = capsys.readouterr().out
    assert "code.jsonl" in said and "more.jsonl" in said
    pieces = pq.read_table("step.parquet").to_pylist()
    known = {document_hash([json.loads(line)["text"]]) for line in (home / "code.jsonl").read_text().splitlines()}
    assert {p["hash"] for p in pieces if p["source"] == "code.jsonl"} <= known
    assert main(["ledger", run, "replay", "--step", "30", "--out", "step.safetensors"]) == 0
    assert "every hash is the ledger's" in capsys.readouterr().out
    batch = load_file("step.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape == (16, 128) and batch["cu_seqlens"][-1] == 16 * 128
    assert "found steps 1 to 60" in refused(capsys, "ledger", run, "which", "--step", "61")


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_a_checkpoint_of_another_recipe_is_refused(home: Path) -> None:
    other = parse(str(home / "pretrain.yaml"), ["name=other", "seed=4"])
    shutil.copytree(home / "runs/whole/checkpoints", home / "runs/other/checkpoints")
    (home / "runs/other/recipe.yaml").write_text(other.to_yaml())
    said = run_job("pretrain", "pretrain.yaml", "name=other", "seed=4", "cluster.max_failures=0", home=home, code=1)
    assert "a checkpoint of another recipe than this run's: move it elsewhere" in said


@pytest.mark.slow
def test_of_two_starts_the_later_one_goes_on(home: Path) -> None:
    first = Killed(home, "twice", 2)
    first.reach(6)
    first.signal(signal.SIGSTOP)  # as if cut off: it knows of nothing, and goes on some time
    run_job("pretrain", "pretrain.yaml", "name=twice", "cluster.num_workers=2", home=home)
    whole, there = ledger(home / "runs/whole"), sorted((home / "runs/twice/checkpoints").iterdir())
    first.signal(signal.SIGCONT)
    assert first.end() == 1 and any("was started once more" in line for line in first.lines), first.lines
    assert ledger(home / "runs/twice") == whole and sorted((home / "runs/twice/checkpoints").iterdir()) == there
