"""The main path of a user: pretrain, sweep, evaluate and export, each job in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import refused, run_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sevenfold.cli import main
from sevenfold.engine.checkpoint import latest_checkpoint


def losses(run: Path) -> dict[int, float]:
    """Returns the training loss of each step from TensorBoard's event file."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars("train/loss")}


def test_loss_falls_and_outputs_are_written(home: Path) -> None:
    run, output = home / "runs/whole", (home / "whole.log").read_text()
    # Plain lines, since the output is not a terminal.
    assert "whole: step 60/60  loss" in output and "bits/byte" in output
    by_step = losses(run)
    assert sorted(by_step) == list(range(1, 61)) and by_step[60] < by_step[1] - 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["validation/loss"] < by_step[1] - 1 and summary["steps"] == 60
    checkpoint = latest_checkpoint(str(run / "checkpoints"))
    assert checkpoint is not None and checkpoint.path == summary["checkpoint"]
    assert checkpoint.step == 60 and checkpoint.world_size == 2
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert "name: whole" in (run / "recipe.yaml").read_text()


def test_plain_transformers_loads_the_model(home: Path) -> None:
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(home / "runs/whole/model")!r})
model = AutoModelForCausalLM.from_pretrained({str(home / "runs/whole/model")!r})
ids = tokenizer("def main():", return_tensors="pt")["input_ids"]
assert ids[0, 0] == tokenizer.bos_token_id
out = model.generate(ids, max_new_tokens=8, do_sample=False)
assert out.shape[1] > ids.shape[1] and not [m for m in sys.modules if "sevenfold" in m]
loss = model(input_ids=ids, labels=ids).loss
assert torch.isfinite(loss) and loss < 6, loss
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr


def test_run_name_rejects_another_recipe(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(home))
    recipe = str(home / "pretrain.yaml")
    assert main(["pretrain", recipe, "name=whole"]) == 0
    assert "already finished" in capsys.readouterr().out
    before = (home / "runs/whole/recipe.yaml").read_text()
    error = refused(capsys, "pretrain", recipe, "name=whole", "train.steps=61")
    assert "exists with another recipe (train.steps: 60 in that run, 61 in this recipe)" in error
    assert (home / "runs/whole/recipe.yaml").read_text() == before
    assert "finetune" in refused(capsys, "pretrain", str(home / "sft.yaml"))


def test_folder_with_foreign_files_is_rejected(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    for name in ("notes.md", "model/my-own.gguf", "checkpoints/theirs"):
        (tmp_path / "runs/thesis" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/thesis" / name).write_text("theirs")
    before = sorted(tmp_path.rglob("*"))
    error = refused(capsys, "pretrain", str(home / "pretrain.yaml"), "name=thesis")
    expected = "runs/thesis: expected a new folder for this run, found checkpoints, model in it"
    assert expected in error
    assert sorted(tmp_path.rglob("*")) == before


def test_too_few_cpus_are_an_error_before_anything_is_written(
    home: Path,
    on_shared_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(home))
    overrides = ["data.curriculum=[]", "cluster.num_workers=64", "data.lanes=64"]
    overrides += ["train.global_batch=64"]
    error = refused(capsys, "pretrain", str(home / "pretrain.yaml"), "name=wide", *overrides)
    assert "wide (64 workers) needs 80 CPU; this cluster has" in error
    assert not (home / "runs/wide").exists()


def test_sweep_and_evaluate(home: Path) -> None:
    output = run_job("sweep", "sft.yaml", home=home)
    run = home / "runs/sft-sweep"
    trials = json.loads((run / "trials.json").read_text())
    assert len(trials) == 2 and len({json.dumps(t["config"]) for t in trials}) == 2
    assert [t["score"] for t in trials] == sorted(t["score"] for t in trials)
    assert all(t["step"] in (2, 4, 6) and "validation/rougeL" in t["metrics"] for t in trials)
    assert "trials, best first" in output and trials[0]["trial"] in output
    assert "2 trials finished; all resources released" in output
    best = yaml.safe_load((run / "best.yaml").read_text())
    assert best["optimizer"]["learning_rate"] == trials[0]["config"]["optimizer.learning_rate"]
    assert "sweep" not in best
    assert (run / "trials.csv").read_text().count("\n") == 3

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(home / "runs/whole/model")
    base_logits = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, run / "adapter")(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "model")(input_ids=ids).logits
    assert (adapted - merged).abs().max() < 1e-4 < (base_logits - merged).abs().max()

    output = run_job("evaluate", "runs/sft-sweep", "--workers", "1", home=home)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["prompts"] == len((run / "predictions.jsonl").read_text().splitlines()) > 10
    assert "completion by sft-sweep" in output and str(run / "model") in output


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_perplexity_beats_the_unigram_baseline(home: Path) -> None:
    output, run = run_job("evaluate", "runs/whole", home=home), home / "runs/whole"
    metrics = json.loads((run / "metrics.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    bits = metrics["bits_per_byte"]
    assert bits < metrics["baselines"]["unigram of its tokens"]["bits_per_byte"]
    assert bits == pytest.approx(summary["metrics"]["validation/bits_per_byte"], rel=0.2)
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 3
    assert "completion by whole" in output


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_finetune_from_an_exported_checkpoint(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(home))
    assert main(["export", str(home / "runs/whole"), "--step", "55", "--out", "old"]) == 0
    assert "whole, step 55: " in capsys.readouterr().out
    run_job("finetune", "sft.yaml", "name=plain", "model.path=old", "adapter=null", home=home)
    run = home / "runs/plain"
    assert (run / "model/model.safetensors").exists() and not (run / "adapter").exists()
    assert "validation/rougeL" in json.loads((run / "summary.json").read_text())["metrics"]
    assert "sft, from old" in (run / "model/README.md").read_text()
