"""Runs that are killed at random steps and resumed read the same data as an undisturbed run.

Each restart has another number of workers; in the end, the ledgers must be identical. A seed takes
minutes: CI runs one, `make test-nightly` twenty.
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
from sevenfold.data.ledger import Ledger
from sevenfold.data.sources.documents import document_hash
from sevenfold.faults.inject import Run
from sevenfold.recipe import parse


class Killed(Run):
    """A pretraining job on its own Ray cluster, which the tests kill."""

    def __init__(self, home: Path, name: str, workers: int):
        command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "pretrain.yaml"]
        command += [f"name={name}", f"cluster.num_workers={workers}"]
        super().__init__(command, {"SEVENFOLD_HOME": str(home)}, str(home))

    def workers(self) -> list[psutil.Process]:
        """Returns the processes of its training workers."""
        return [
            p
            for p in psutil.Process(self.process.pid).children(recursive=True)
            if "TrainWorker" in " ".join(p.cmdline())
        ]

    def kill_worker(self, rng: random.Random) -> None:
        """Kills a random training worker."""
        rng.choice(self.workers()).send_signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Sends a signal to all training workers."""
        for p in self.workers():
            p.send_signal(number)

    def kill(self) -> None:
        """Kills the driver, and waits until its Ray cluster has ended too."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        super().kill()
        psutil.wait_procs(descendants, timeout=30)


def read_ledger(run: Path) -> dict[int, list[tuple[int, ...]]]:
    """Returns the draws of each step, each without its step."""
    draws: dict[int, list[tuple[int, ...]]] = {}
    for d in Ledger(str(run / "ledger")).read(1, STEPS):
        draws.setdefault(d.step, []).append(tuple(d[1:]))
    return draws


def losses(run: Path) -> list[float]:
    """Returns the loss of each step, and checks that each step was logged once, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    return [loss for _, loss in logged]


def run_with_kills(home: Path, seed: int) -> str:
    """Kills and resumes a run at the seed's steps, and returns a description of the kills."""
    rng, name, kills = random.Random(seed), f"killed-{seed}", []
    step = 0
    for workers in (2, 1):
        run = Killed(home, name, workers)
        if workers == 2:
            step = rng.randint(2, 12)
            run.wait_for_step(step)
            run.kill_worker(rng)
            kills.append(f"worker of 2 at {run.step}")
            # The job resumes by itself.
            while not run.failed and run.process.poll() is None:
                time.sleep(0.01)
            run.wait_for_step(1)
        step = rng.randint(step + 1, step + 14)
        run.wait_for_step(step)
        run.kill()
        kills.append(f"driver of {workers} at {run.step}")
    # also with smaller micro-batches, as after a worker that was out of memory
    overrides = (f"name={name}", "cluster.num_workers=3", "train.micro_batch=2")
    output = run_job("pretrain", "pretrain.yaml", *overrides, home=home)
    assert "resuming from step" in output
    return ", ".join(kills)


def test_the_undisturbed_run_reads_each_row_once_for_two_epochs(home: Path) -> None:
    draws = read_ledger(home / "runs/whole")
    rows: dict[int, list[int]] = {}
    for step in sorted(draws):
        for _, _, chunk, row, count, _ in draws[step]:
            rows.setdefault(chunk, []).extend(range(row, row + count))
    # No row of a chunk is repeated or missing, and they are read in order.
    assert all(indices == list(range(len(indices))) for indices in rows.values())
    manifest: dict[str, Any] = json.loads((home / "runs/whole/manifest.json").read_text())["train"]
    # The run reads two epochs.
    assert len(rows) > 2 * len(manifest["row_groups"]["shard"]) or max(rows) > 16


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=pytest.mark.nightly if n else pytest.mark.slow) for n in range(20)],
)
@pytest.mark.timeout(1800)  # it starts four times, and a test beside it may keep a core busy
def test_a_killed_run_reads_the_same_data(home: Path, seed: int) -> None:
    kills = run_with_kills(home, seed)
    run, undisturbed = home / f"runs/killed-{seed}", home / "runs/whole"
    draws, expected = read_ledger(run), read_ledger(undisturbed)
    assert sorted(draws) == list(range(1, STEPS + 1)), kills
    assert draws == expected, kills
    # Another number of workers sums in another order; this learning rate amplifies the rounding
    # differences, so only the first losses are compared.
    assert losses(run)[:30] == pytest.approx(losses(undisturbed)[:30], rel=1e-4), kills
    count = sum(map(len, draws.values()))
    print(f"seed {seed}: {kills}: {count} draws of {STEPS} steps as in the undisturbed run")


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_a_run_on_the_token_cache_has_the_same_ledger(home: Path) -> None:
    words = ("pretrain.yaml", f"data.cache={home / 'cache'}", "cluster.num_workers=1")
    process = start_job("tokenize", *words, home=home)
    deadline = time.monotonic() + 200
    while not (home / "cache/key.json").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(descendants, timeout=30)
    error = run_job("pretrain", *words, "name=cached", home=home, code=2)
    assert "expected a finished token cache, found none" in error
    assert not (home / "runs/cached").exists()
    assert "2/2 files" in run_job("tokenize", *words, home=home)
    assert "already finished" in run_job("tokenize", *words, home=home)
    run_job("pretrain", *words, "name=cached", home=home)
    assert read_ledger(home / "runs/cached") == read_ledger(home / "runs/whole")


def test_ledger_command_lists_and_replays_a_step(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(home / "runs/whole")
    assert main(["ledger", run, "which", "--step", "30", "--out", "step.parquet"]) == 0
    output = capsys.readouterr().out
    assert "code.jsonl" in output and "more.jsonl" in output
    pieces = pq.read_table("step.parquet").to_pylist()
    hashes = {
        document_hash([json.loads(line)["text"]])
        for line in (home / "code.jsonl").read_text().splitlines()
    }
    assert {p["hash"] for p in pieces if p["source"] == "code.jsonl"} <= hashes
    assert main(["ledger", run, "replay", "--step", "30", "--out", "step.safetensors"]) == 0
    assert "hashes match the ledger" in capsys.readouterr().out
    batch = load_file("step.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape == (16, 128)
    assert batch["cu_seqlens"][-1] == 16 * 128
    assert "found steps 1 to 60" in refused(capsys, "ledger", run, "which", "--step", "61")


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_a_checkpoint_of_another_recipe_is_refused(home: Path) -> None:
    other = parse(str(home / "pretrain.yaml"), ["name=other", "seed=4"])
    for name in ("checkpoints", "tokenizer"):
        shutil.copytree(home / "runs/whole" / name, home / "runs/other" / name)
    shutil.copy(home / "runs/whole/manifest.json", home / "runs/other/manifest.json")
    (home / "runs/other/recipe.yaml").write_text(other.to_yaml())
    overrides = ("name=other", "seed=4", "cluster.max_failures=0")
    error = run_job("pretrain", "pretrain.yaml", *overrides, home=home, code=1)
    assert "found one of another recipe: move it elsewhere" in error


@pytest.mark.slow
def test_a_second_start_of_a_run_ends_the_first_one(home: Path) -> None:
    first = Killed(home, "twice", 2)
    first.wait_for_step(6)
    # As after a network partition: the first job does not notice the second one, and continues
    # later.
    first.signal(signal.SIGSTOP)
    run_job("pretrain", "pretrain.yaml", "name=twice", "cluster.num_workers=2", home=home)
    expected = read_ledger(home / "runs/whole")
    checkpoints = sorted((home / "runs/twice/checkpoints").iterdir())
    first.signal(signal.SIGCONT)
    assert first.wait() == 1, first.lines
    assert any("was started again" in line for line in first.lines), first.lines
    assert read_ledger(home / "runs/twice") == expected
    assert sorted((home / "runs/twice/checkpoints").iterdir()) == checkpoints
