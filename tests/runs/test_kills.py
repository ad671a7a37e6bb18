"""Exactness, proved by kills: SIGKILL at random steps, another number of workers each time, and one ledger in the end.

A seed takes minutes: 3 by default, 50 by SEVENFOLD_KILL_SEEDS=50 for the long proof.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import RECIPE, ROOT, run_job, start_job, stdlib_texts

from sevenfold.data.ledger import Ledger
from sevenfold.runs.faults import Run

STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of two sources, whose mixture changes twice in two epochs, and the unkilled run `whole`."""
    root = tmp_path_factory.mktemp("kills")
    texts = [t[:3000] for t in stdlib_texts() if len(t) > 300]
    for name, part in (("code.jsonl", texts[:40]), ("more.jsonl", texts[40:60])):
        (root / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    tree = json.loads(json.dumps(RECIPE))
    tree["data"] |= {
        "sources": [{"path": str(root / "code.jsonl"), "weight": 3}, {"path": str(root / "more.jsonl"), "weight": 1}],
        "curriculum": [
            {"at_tokens": 40_000, "weights": {"code.jsonl": 1, "more.jsonl": 1}},
            {"at_tokens": 80_000, "weights": {"code.jsonl": 4, "more.jsonl": 1}},
        ],
        "sequence_length": 128, "lanes": 4,
    }  # fmt: skip
    tree["train"] |= {"global_batch": 16, "micro_batch": 4, "steps": STEPS}
    tree |= {"checkpoint": {"every": 5}, "cluster": {"num_workers": 2}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run_job("pretrain", "recipe.yaml", "name=whole", home=root)
    return root


class Killed(Run):
    """A job under way on a Ray of its own."""

    def __init__(self, home: Path, name: str, workers: int):
        words = [
            sys.executable,
            str(ROOT / "jobs/pretrain.py"),
            "recipe.yaml",
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
    out = run_job("pretrain", "recipe.yaml", f"name={name}", "cluster.num_workers=4", home=home)
    assert "going on from step" in out
    return ", ".join(told)


def check(home: Path, seed: int) -> None:
    told = killed(home, seed)
    found, whole = ledger(home / f"runs/killed-{seed}"), ledger(home / "runs/whole")
    assert sorted(found) == list(range(1, STEPS + 1)), told
    assert found == whole, told
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("SEVENFOLD_KILL_SEEDS", "3"))))
def test_kills_do_not_show(home: Path, seed: int) -> None:
    check(home, seed)


@pytest.mark.slow
def test_the_token_cache_has_the_same_ledger(home: Path) -> None:
    words = ("recipe.yaml", f"data.cache={home / 'cache'}", "cluster.num_workers=1")
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


def test_the_ledger_tells_and_replays(home: Path) -> None:
    def sevenfold(*args: str, code: int = 0) -> str:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
        command = [sys.executable, "-m", "sevenfold.cli", "ledger", *args]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    said = sevenfold("runs/whole", "which", "--step", "30", "--out", "step.parquet")
    assert "code.jsonl" in said and "more.jsonl" in said
    import pyarrow.parquet as pq

    pieces = pq.read_table(home / "step.parquet").to_pylist()
    texts = [json.loads(line)["text"] for line in (home / "code.jsonl").read_text().splitlines()]
    from sevenfold.data.documents import document_hash

    known = {document_hash([t]) for t in texts}
    assert {p["hash"] for p in pieces if p["source"] == "code.jsonl"} <= known
    said = sevenfold("runs/whole", "replay", "--step", "30", "--out", "step.safetensors")
    assert "every hash is the ledger's" in said
    from safetensors.numpy import load_file

    batch = load_file(home / "step.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape == (16, 128) and batch["cu_seqlens"][-1] == 16 * 128
    assert "found steps 1 to 60" in sevenfold("runs/whole", "which", "--step", "61", code=2)


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe_is_refused(home: Path) -> None:
    shutil.copytree(home / "runs/whole/checkpoints", home / "runs/other/checkpoints")
    said = run_job("pretrain", "recipe.yaml", "name=other", "seed=4", "cluster.max_failures=0", home=home, code=1)
    assert "a checkpoint of another recipe than this run's: move it elsewhere" in said


@pytest.mark.slow
def test_of_two_starts_the_later_one_goes_on(home: Path) -> None:
    first = Killed(home, "twice", 2)
    first.reach(6)
    first.signal(signal.SIGSTOP)  # as if cut off: it knows of nothing, and goes on some time
    run_job("pretrain", "recipe.yaml", "name=twice", "cluster.num_workers=2", home=home)
    whole, there = ledger(home / "runs/whole"), sorted((home / "runs/twice/checkpoints").iterdir())
    first.signal(signal.SIGCONT)
    assert first.end() == 1 and any("was started once more" in line for line in first.lines), first.lines
    assert ledger(home / "runs/twice") == whole and sorted((home / "runs/twice/checkpoints").iterdir()) == there
