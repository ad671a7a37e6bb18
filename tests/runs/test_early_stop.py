"""Early stopping end to end: a run that overfits ends with its best model, killed on the way or not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, ROOT, once, run_job, stdlib_texts

from sevenfold.engine import checkpoint as ckpt
from sevenfold.runs.faults import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def home(on_shared_ray: None) -> Path:
    """A folder with a recipe of little text, and the run `whole`."""
    return once("early", _write_home)


def _write_home(root: Path) -> None:
    texts = [t[:1500] for t in stdlib_texts() if len(t) > 1500]
    for name, part in (("train", texts[:6]), ("held", texts[10:20])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{"path": str(root / "train.jsonl")}], "validation": [{"path": str(root / "held.jsonl")}]}
    tree["data"] |= {"executor": "inline"}
    tree["train"] |= {"steps": 400}
    tree |= {"validation": {"every": 10, "rows": 32, "patience": 2}, "checkpoint": {"every": 7, "keep": 1}}
    tree |= {"schedule": {"name": "constant"}, "optimizer": {"learning_rate": 2e-2}}
    (root / "r.yaml").write_text(yaml.safe_dump(tree))
    (root / "said").write_text(run_job("pretrain", "r.yaml", "name=whole", home=root))


def ended(run: Path) -> tuple[dict[int, float], dict[str, Any]]:
    """Validation losses by step, and the summary's metrics without where the checkpoint lies."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    metrics["checkpoint"] = Path(metrics["checkpoint"]).name
    return {m["step"]: m["validation/loss"] for m in logged if "validation/loss" in m}, metrics


def test_the_best_is_the_runs_model(home: Path) -> None:
    run, said = home / "runs/whole", (home / "said").read_text()
    losses, metrics = ended(run)
    best = min(losses, key=lambda s: losses[s])
    assert list(losses) == list(range(10, best + 21, 10)) and best + 20 < 400
    told = f"stopped after step {best + 20}, 2 validations without a better one: best validation/loss {losses[best]:.4f} at"
    assert said.count(told) == 1
    assert (metrics["best_step"], metrics["step"], metrics["validation/loss"]) == (best, best + 20, losses[best])
    assert metrics["checkpoint"].startswith(f"step-{best:08d}")
    steps = list(ckpt.steps(str(run / "checkpoints")))
    assert len(steps) == 2 and steps[0] == best < steps[1]  # checkpoint.keep is 1
    assert f"| step | {best:,} (" in (run / "model/README.md").read_text()
    assert f"whole, step {best}: " in run_job("export", "runs/whole", "--out", "again", home=home)
    model = (run / "model/model.safetensors").read_bytes()
    assert (home / "again/model.safetensors").read_bytes() == model


def test_a_killed_run_ends_alike(home: Path) -> None:
    losses, metrics = ended(home / "runs/whole")
    words = [sys.executable, str(ROOT / "jobs/pretrain.py"), "r.yaml", "name=killed"]
    run = Run(words, {"SEVENFOLD_HOME": str(home)}, str(home))
    run.reach(metrics["best_step"] + 4)
    run.kill()
    assert "going on from step" in run_job("pretrain", "r.yaml", "name=killed", home=home)
    assert ended(home / "runs/killed") == (losses, metrics)


def test_an_unknown_metric_is_said_at_the_first_validation(home: Path) -> None:
    said = run_job("pretrain", "r.yaml", "name=other", "validation.metric=validation/f1", home=home, code=1)
    assert (
        "validation.metric 'validation/f1': this recipe reports train/loss, validation/bits_per_byte, validation/loss" in said
    )
    assert "Traceback" not in said and said.count("\n") == 1
