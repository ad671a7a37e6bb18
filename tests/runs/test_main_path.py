"""The main path, as a person walks it: each job a process of its own with a Ray of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, run_job, start_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sevenfold.engine import checkpoint as ckpt


@pytest.fixture(scope="module")
def home(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes `pretrain.yaml` (two workers) and `sft.yaml`, and the finished run `whole`."""
    root = tmp_path_factory.mktemp("home")
    tree = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{"path": str(texts / "train")}], "validation": [{"path": str(texts / "heldout")}]}
    tree["train"] |= {"steps": 60}
    tree |= {"checkpoint": {"every": 10, "keep": 3}, "validation": {"every": 30, "rows": 16}, "cluster": {"num_workers": 2}}
    (root / "pretrain.yaml").write_text(yaml.safe_dump(tree))
    sft: dict[str, Any] = {
        "name": "sft", "seed": 1, "objective": "sft", "model": {"path": "runs/whole"}, "adapter": {"rank": 4},
        "data": {
            "sources": [{"path": str(texts / "pairs")}], "validation": [{"path": str(texts / "pairs" / "*1.parquet")}],
            "sequence_length": 64, "lanes": 2, "executor": "inline",
        },
        "train": {"global_batch": 4, "micro_batch": 4, "steps": 6, "log_every": 2},
        "validation": {"every": 2, "rows": 8, "generate": 4, "max_new_tokens": 5},
        "search": {
            "trials": 3, "metric": "validation/loss", "max_concurrent": 2,
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}, "adapter.rank": {"choice": [2, 4]}},
        },
    }  # fmt: skip
    (root / "sft.yaml").write_text(yaml.safe_dump(sft))
    out = run_job("pretrain", "pretrain.yaml", "name=whole", home=root)
    assert "whole: step 60/60  loss" in out and "bits/byte" in out  # plain lines where there is no terminal
    return root


def losses(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars("train/loss")}


def test_it_learnt_and_left_what_it_should(home: Path) -> None:
    run = home / "runs/whole"
    found = losses(run)
    assert sorted(found) == list(range(1, 61)) and found[60] < found[1] - 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["validation/loss"] < found[1] - 1 and summary["steps"] == 60
    newest = ckpt.latest(str(run / "checkpoints"))
    assert newest is not None and newest.step == 60 and newest.world_size == 2 and newest.path == summary["checkpoint"]
    assert len(list((run / "checkpoints").iterdir())) == 3
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


@pytest.mark.slow
def test_killed_and_resumed_on_another_number_of_workers(home: Path) -> None:
    process = start_job("pretrain", "pretrain.yaml", "name=killed", home=home)
    deadline = time.monotonic() + 200
    while not list((home / "runs/killed/checkpoints").glob("step-00000020.*/MANIFEST.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(5)  # its Ray notices and ends
    assert not (home / "runs/killed/summary.json").exists()
    run_job("pretrain", "pretrain.yaml", "name=killed", "cluster.num_workers=3", home=home)
    found, whole = losses(home / "runs/killed"), losses(home / "runs/whole")
    assert sorted(found) == sorted(whole)
    # another number of workers rounds otherwise, which this rate amplifies; that the rows are the same, test_kills shows
    assert [found[s] for s in range(1, 30)] == pytest.approx([whole[s] for s in range(1, 30)], rel=1e-5)
    assert [found[s] for s in range(30, 61)] == pytest.approx([whole[s] for s in range(30, 61)], abs=0.02)


def test_a_name_means_one_recipe(home: Path) -> None:
    assert "finished before" in run_job("pretrain", "pretrain.yaml", "name=whole", home=home)
    before = (home / "runs/whole/recipe.yaml").read_text()
    said = run_job("pretrain", "pretrain.yaml", "name=whole", "train.steps=61", home=home, code=2)
    assert "exists with another recipe (train.steps: 60 there, 61 here)" in said and said.count("\n") == 1
    assert (home / "runs/whole/recipe.yaml").read_text() == before


def test_too_few_cpus_are_said_and_nothing_is_written(home: Path) -> None:
    begin = time.monotonic()
    said = run_job(
        "pretrain", "pretrain.yaml", "name=wide", "cluster.num_workers=64", "data.lanes=64", "train.global_batch=64",
        home=home, code=2,
    )  # fmt: skip
    assert time.monotonic() - begin < 60
    assert "wide (64 workers) needs 80 CPU; this cluster has" in said and not (home / "runs/wide").exists()


def test_sweep_and_evaluate(home: Path) -> None:
    out = run_job("sweep", "sft.yaml", home=home)
    run = home / "runs/sft-sweep"
    trials = json.loads((run / "trials.json").read_text())
    assert len(trials) == 3 and len({json.dumps(t["config"]) for t in trials}) == 3
    assert [t["score"] for t in trials] == sorted(t["score"] for t in trials)
    assert all(t["step"] in (2, 4, 6) and "validation/rougeL" in t["metrics"] for t in trials)
    assert "trials, best first" in out and trials[0]["trial"] in out
    assert "3 trials ended; none left a placement group or a process" in out
    best = yaml.safe_load((run / "best.yaml").read_text())
    assert best["optimizer"]["learning_rate"] == trials[0]["config"]["optimizer.learning_rate"] and "search" not in best
    assert (run / "trials.csv").read_text().count("\n") == 4

    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(home / "runs/whole/model")!r})
ids = torch.arange(3, 40)[None]
before = base(input_ids=ids).logits
adapted = PeftModel.from_pretrained(base, {str(run / "adapter")!r})(input_ids=ids).logits
merged = AutoModelForCausalLM.from_pretrained({str(run / "model")!r})(input_ids=ids).logits
assert (adapted - merged).abs().max() < 1e-4 < (before - merged).abs().max()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    out = run_job("evaluate", "runs/whole", "runs/sft-sweep", home=home)
    measured = json.loads((home / "runs/whole/metrics.json").read_text())
    summary = json.loads((home / "runs/whole/summary.json").read_text())
    assert measured["bits_per_byte"] < measured["baselines"]["unigram of its tokens"]["bits_per_byte"]
    assert measured["bits_per_byte"] == pytest.approx(summary["metrics"]["validation/bits_per_byte"], rel=0.2)
    assert len((home / "runs/whole/predictions.jsonl").read_text().splitlines()) == 3
    scored = json.loads((run / "metrics.json").read_text())
    assert scored["prompts"] == len((run / "predictions.jsonl").read_text().splitlines()) > 10
    assert "whole continues" in out and str(run / "model") in out


def test_finetune_is_the_same_engine_and_starts_from_any_export(home: Path) -> None:
    assert "whole, step 50: " in run_job("export", "runs/whole", "--step", "50", "--out", "old", home=home)
    run_job("finetune", "sft.yaml", "name=plain", "model.path=old", "adapter=null", "cluster.num_workers=2", home=home)
    run = home / "runs/plain"
    assert (run / "model/model.safetensors").exists() and not (run / "adapter").exists()
    assert "validation/rougeL" in json.loads((run / "summary.json").read_text())["metrics"]
    assert "sft, from old" in (run / "model/README.md").read_text()
    assert "finetune" in run_job("pretrain", "sft.yaml", home=home, code=2)
