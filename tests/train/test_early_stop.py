"""Early stopping end to end: a run that overfits ends with its best model, even after a kill."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, ROOT, once, run_job, start_job, stdlib_texts

from sevenfold.engine.checkpoint import checkpoint_paths
from sevenfold.faults.inject import Run


@pytest.fixture
def home(on_shared_ray: None) -> Path:
    """A working folder with a recipe on little text, and its finished run `whole`."""
    return once("early", _write_home)


def _write_home(root: Path) -> None:
    texts = [t[:1500] for t in stdlib_texts() if len(t) > 1500]
    for name, part in (("train", texts[:6]), ("held", texts[10:20])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {
        "sources": [{"path": str(root / "train.jsonl")}],
        "validation": [{"path": str(root / "held.jsonl")}],
    }
    tree["data"] |= {"executor": "inline"}
    tree["train"] |= {"steps": 400}
    tree |= {
        "validation": {"every": 10, "rows": 32, "patience": 2},
        "checkpoint": {"every": 7, "keep": 1},
    }
    tree |= {"schedule": {"name": "constant"}, "optimizer": {"learning_rate": 2e-2}}
    (root / "r.yaml").write_text(yaml.safe_dump(tree))
    (root / "output.log").write_text(run_job("pretrain", "r.yaml", "name=whole", home=root))


def results(run: Path) -> tuple[dict[int, float], dict[str, Any]]:
    """Returns validation losses by step, and the summary's metrics (checkpoint as its name)."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    metrics["checkpoint"] = Path(metrics["checkpoint"]).name
    return {m["step"]: m["validation/loss"] for m in logged if "validation/loss" in m}, metrics


@pytest.mark.slow
def test_the_best_checkpoint_becomes_the_final_model(home: Path) -> None:
    run, output = home / "runs/whole", (home / "output.log").read_text()
    losses, metrics = results(run)
    best = min(losses, key=lambda s: losses[s])
    assert list(losses) == list(range(10, best + 21, 10)) and best + 20 < 400
    assert output.count(f"stopped early after step {best + 20}: ") == 1
    assert f"best validation/loss {losses[best]:.4f} at step {best}, saved as the final" in output
    assert (metrics["best_step"], metrics["step"]) == (best, best + 20)
    assert metrics["validation/loss"] == losses[best]
    assert metrics["checkpoint"].startswith(f"step-{best:08d}")
    # The best checkpoint is kept in addition to the latest one (checkpoint.keep is 1).
    steps = list(checkpoint_paths(str(run / "checkpoints")))
    assert len(steps) == 2 and steps[0] == best < steps[1]
    assert f"| step | {best:,} (" in (run / "model/README.md").read_text()
    assert f"whole, step {best}: " in run_job("export", "runs/whole", "--out", "again", home=home)
    model = (run / "model/model.safetensors").read_bytes()
    assert (home / "again/model.safetensors").read_bytes() == model


@pytest.mark.nightly
def test_a_killed_run_has_the_same_result(home: Path) -> None:
    losses, metrics = results(home / "runs/whole")
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "r.yaml", "name=killed"]
    run = Run(command, {"SEVENFOLD_HOME": str(home)}, str(home))
    run.wait_for_step(metrics["best_step"] + 4)
    run.kill()
    assert "resuming from step" in run_job("pretrain", "r.yaml", "name=killed", home=home)
    assert results(home / "runs/killed") == (losses, metrics)


@pytest.mark.slow
def test_an_unknown_metric_is_an_error_at_the_first_validation(home: Path) -> None:
    error = run_job(
        "pretrain", "r.yaml", "name=other", "validation.metric=validation/f1", home=home, code=1
    )
    expected = (
        "unknown metric 'validation/f1'; this recipe reports: train/loss, "
        "validation/bits_per_byte, validation/loss"
    )
    assert expected in error
    assert "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param("", marks=pytest.mark.nightly),
        pytest.param("train/loss", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_at_a_validation_makes_it_when_it_resumes(
    home: Path, tmp_path: Path, metric: str
) -> None:
    """Every step is validated, so that the stop falls on a validation."""
    name = f"stopped{len(metric)}"
    words = ["pretrain", str(home / "r.yaml"), f"name={name}", "train.steps=40"]
    words += ["validation.every=1", "validation.patience=null", "checkpoint.every=50"]
    if metric:
        words += ["validation.keep_best=true", f"validation.metric={metric}"]
    process = start_job(*words, home=tmp_path)
    run = tmp_path / "runs" / name
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        log = run / "metrics.jsonl"
        if log.exists() and log.read_text().count("validation/loss") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 130 and "Checkpoint saved at step" in stderr, stderr
    output = run_job(*words, home=tmp_path)
    assert "resuming from step" in output
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [m["step"] for m in logged if "validation/loss" in m]
    assert validated == list(range(1, 41))


@pytest.mark.slow
def test_a_stop_does_not_wait_for_the_end_of_a_validation(home: Path) -> None:
    """The validation is left, the step is saved, and the resumed run makes the validation."""
    changes = ["name=long", "train.steps=4", "validation.every=2", "validation.patience=null"]
    changes += ["validation.rows=1500", f"data.validation=[{{path: {home / 'many.jsonl'}}}]"]
    text = (home / "held.jsonl").read_text()
    (home / "many.jsonl").write_text(
        "".join(text.replace('"text": "', f'"text": "{i} ') for i in range(30))
    )
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "r.yaml", *changes]
    run = Run(command, {"SEVENFOLD_HOME": str(home)}, str(home))
    run.wait_for_step(2)
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130, run.lines
    assert any("Stopped. Checkpoint saved at step 2" in line for line in run.lines), run.lines
    log = [json.loads(s) for s in (home / "runs/long/metrics.jsonl").read_text().splitlines()]
    assert not any("validation/loss" in line for line in log)
    assert "resuming from step 2" in run_job("pretrain", "r.yaml", *changes, home=home)
    losses, _ = results(home / "runs/long")
    assert list(losses) == [2, 4]
