"""Ray's own door: `ray job submit` to a cluster that `ray start --head` made."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RAY, ROOT, running_head

from sevenfold.engine import checkpoint as ckpt


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell beside a running head."""
    with running_head(tmp_path, RAY_AUTH_MODE="disabled", RAY_JOB_STOP_WAIT_TIME_S="60") as env:  # as cluster.yaml has it
        yield env


def test_submit(head: dict[str, str], tree: dict[str, Any], texts: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for part in ("platform", "jobs"):
        shutil.copytree(ROOT / part, checkout / part)
    mark = checkout / "platform/sevenfold/__init__.py"
    mark.write_text(mark.read_text().replace('__version__ = "', '__version__ = "9.9.'))
    tree |= {"cluster": {"num_workers": 2, "cpus_per_worker": 0.75}}
    (checkout / "jobs/recipes/tiny.yaml").write_text(yaml.safe_dump(tree))
    pairs = [{"path": str(texts / "pairs")}]
    sft = {
        "name": "sft", "objective": "sft", "model": {"path": "runs/tiny"}, "adapter": {"rank": 2},
        "data": {"sources": pairs, "validation": pairs, "sequence_length": 64, "lanes": 2},
        "train": {"global_batch": 4, "micro_batch": 4, "steps": 2}, "cluster": {"cpus_per_worker": 0.75},
    }  # fmt: skip
    (checkout / "jobs/recipes/sft.yaml").write_text(yaml.safe_dump(sft))

    def submit(*command: str) -> subprocess.CompletedProcess[str]:
        whole = [RAY, "job", "submit", "--working-dir", ".", "--", "python", *command]
        return subprocess.run(whole, cwd=checkout, env=head, capture_output=True, text=True, timeout=300)

    done = submit("jobs/pretrain.py", "jobs/recipes/tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny: step 8/8  loss" in done.stdout  # its log is streamed
    run = Path(head["HOME"]) / "sevenfold/runs/tiny"
    newest = ckpt.latest(str(run / "checkpoints"))
    assert newest is not None and newest.extra["versions"]["sevenfold"].startswith("9.9.")  # workers had the checkout's library
    assert json.loads((run / "summary.json").read_text())["sevenfold"].startswith("9.9.")

    # a relative path means the same for the job and for its workers, which stand elsewhere
    tuned = submit("jobs/finetune.py", "jobs/recipes/sft.yaml")
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    assert (run.parent / "sft/adapter/adapter_model.safetensors").exists()
    measured = submit("jobs/evaluate.py", "runs/sft")
    assert measured.returncode == 0 and "sft continues" in measured.stdout, measured.stdout + measured.stderr

    failed = submit("jobs/pretrain.py", "jobs/recipes/tiny.yaml", "train.stepps=9")
    assert failed.returncode != 0 and "did you mean 'steps'" in failed.stdout + failed.stderr
