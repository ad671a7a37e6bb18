"""The main path, as a person walks it: each job a process of its own with a Ray of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import refused, run_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sevenfold.cli import main
from sevenfold.engine import checkpoint as ckpt


def losses(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars("train/loss")}


def test_it_learnt_and_left_what_it_should(home: Path) -> None:
    run, said = home / "runs/whole", (home / "whole.log").read_text()
    assert "whole: step 60/60  loss" in said and "bits/byte" in said  # plain lines where there is no terminal
    found = losses(run)
    assert sorted(found) == list(range(1, 61)) and found[60] < found[1] - 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["validation/loss"] < found[1] - 1 and summary["steps"] == 60
    newest = ckpt.latest(str(run / "checkpoints"))
    assert newest is not None and newest.step == 60 and newest.world_size == 2 and newest.path == summary["checkpoint"]
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert "name: whole" in (run / "recipe.yaml").read_text()


def test_a_process_without_us_loads_the_model(home: Path) -> None:
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
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_name_means_one_recipe(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(home))
    recipe = str(home / "pretrain.yaml")
    assert main(["pretrain", recipe, "name=whole"]) == 0 and "finished before" in capsys.readouterr().out
    before = (home / "runs/whole/recipe.yaml").read_text()
    said = refused(capsys, "pretrain", recipe, "name=whole", "train.steps=61")
    assert "exists with another recipe (train.steps: 60 there, 61 here)" in said
    assert (home / "runs/whole/recipe.yaml").read_text() == before
    assert "finetune" in refused(capsys, "pretrain", str(home / "sft.yaml"))


def test_a_name_with_somebody_elses_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    for name in ("notes.md", "model/my-own.gguf", "checkpoints/theirs"):
        (tmp_path / "runs/thesis" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/thesis" / name).write_text("theirs")
    before = sorted(tmp_path.rglob("*"))
    said = refused(capsys, "pretrain", str(home / "pretrain.yaml"), "name=thesis")
    assert "runs/thesis: expected a new folder for this run, found checkpoints, model in it" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_too_few_cpus_are_said_and_nothing_is_written(
    home: Path, on_shared_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(home))
    many = ("data.curriculum=[]", "cluster.num_workers=64", "data.lanes=64", "train.global_batch=64")
    said = refused(capsys, "pretrain", str(home / "pretrain.yaml"), "name=wide", *many)
    assert "wide (64 workers) needs 80 CPU; this cluster has" in said and not (home / "runs/wide").exists()


def test_sweep_and_evaluate(home: Path) -> None:
    out = run_job("sweep", "sft.yaml", home=home)
    run = home / "runs/sft-sweep"
    trials = json.loads((run / "trials.json").read_text())
    assert len(trials) == 2 and len({json.dumps(t["config"]) for t in trials}) == 2
    assert [t["score"] for t in trials] == sorted(t["score"] for t in trials)
    assert all(t["step"] in (2, 4, 6) and "validation/rougeL" in t["metrics"] for t in trials)
    assert "trials, best first" in out and trials[0]["trial"] in out
    assert "2 trials ended; none left a placement group or a process" in out
    best = yaml.safe_load((run / "best.yaml").read_text())
    assert best["optimizer"]["learning_rate"] == trials[0]["config"]["optimizer.learning_rate"] and "search" not in best
    assert (run / "trials.csv").read_text().count("\n") == 3

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(home / "runs/whole/model")
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, run / "adapter")(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "model")(input_ids=ids).logits
    assert (adapted - merged).abs().max() < 1e-4 < (before - merged).abs().max()

    out = run_job("evaluate", "runs/sft-sweep", "--workers", "1", home=home)
    scored = json.loads((run / "metrics.json").read_text())
    assert scored["prompts"] == len((run / "predictions.jsonl").read_text().splitlines()) > 10
    assert "sft-sweep continues" in out and str(run / "model") in out


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_perplexity_beside_its_baselines(home: Path) -> None:
    out = run_job("evaluate", "runs/whole", home=home)
    measured = json.loads((home / "runs/whole/metrics.json").read_text())
    summary = json.loads((home / "runs/whole/summary.json").read_text())
    assert measured["bits_per_byte"] < measured["baselines"]["unigram of its tokens"]["bits_per_byte"]
    assert measured["bits_per_byte"] == pytest.approx(summary["metrics"]["validation/bits_per_byte"], rel=0.2)
    assert len((home / "runs/whole/predictions.jsonl").read_text().splitlines()) == 3 and "whole continues" in out


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_finetune_is_the_same_engine_and_starts_from_any_export(
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
