"""Runs with NaN in the gradient of one rank.

The guard skips such steps, rolls back after several in a row, and stops the run if that does not
help; the latest checkpoint is then a good one.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, run_job

from sevenfold.data.ledger import Ledger
from sevenfold.engine.checkpoint import latest_checkpoint

# Python imports this (as sitecustomize.py) at the start of each process, also in Ray's workers. It
# makes gradients of rank 1 NaN in the calls of `train_step` whose numbers the environment variable
# POISON gives, as a Python expression.
SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, sys

class Poison(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "sevenfold.engine.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            step, calls = module.train_step, []
            def poisoned(model, *args, **kwargs):
                import torch
                calls.append(1)
                hooks = []
                if torch.distributed.get_rank() == 1 and len(calls) in eval(os.environ["POISON"]):
                    weight = model.get_output_embeddings().weight
                    hooks = [model.model.layers[1].mlp.register_full_backward_hook(
                        lambda m, i, o: tuple(None if g is None else g * float("nan") for g in i))]
                try:
                    return step(model, *args, **kwargs)
                finally:
                    for h in hooks:
                        h.remove()
            module.train_step = poisoned
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Poison())
"""


@pytest.fixture
def home(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the recipe `r.yaml`; jobs that run here import SITECUSTOMIZE."""
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{"path": str(texts / "train")}]}
    tree["train"] |= {"steps": 24}
    tree |= {
        "checkpoint": {"every": 5, "keep": 9},
        "cluster": {"num_workers": 2, "max_failures": 0},
    }
    tree |= {"guard": {"max_skipped": 3, "max_rollbacks": 1}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv(
        "PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    return tmp_path


def losses(run: Path) -> dict[int, float]:
    """Returns the training loss of each step."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m["train/loss"] for m in logged if "train/loss" in m}


@pytest.mark.slow
def test_bad_steps_and_their_data_are_skipped(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A single bad step is skipped; after three in a row, the run rolls back to step 5.
    monkeypatch.setenv("POISON", "(3, 8, 9, 10)")
    output = run_job("pretrain", "r.yaml", home=home)
    assert "step 3 skipped: loss" in output and "gradient norm nan" in output
    assert "step 10 skipped" in output and "resuming from step 5" in output
    assert "data steps 8 to 10 are skipped from now on" in output
    run = home / "runs/tiny"
    data_steps = {d.step: d.data_step for d in Ledger(str(run / "ledger")).read(1, 24)}
    assert data_steps == {s: s if s <= 7 else s + 3 for s in range(1, 25)}
    bad = losses(run)
    assert sorted(bad) == list(range(1, 25)) and all(v == v for v in bad.values())

    # The loss of step 3 is computed before its bad gradient, so the runs differ from step 4 on.
    monkeypatch.setenv("POISON", "()")
    run_job("pretrain", "r.yaml", "name=well", home=home)
    good = losses(home / "runs/well")
    assert [bad[s] for s in (1, 2, 3)] == [good[s] for s in (1, 2, 3)] and bad[4] != good[4]


@pytest.mark.slow
def test_run_stops_if_a_rollback_does_not_help(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISON", "range(12, 100)")
    error = run_job("pretrain", "r.yaml", home=home, code=1)
    assert "in 3 steps in a row" in error and "rollbacks so far: 1" in error
    assert "Traceback" not in error
    checkpoint = latest_checkpoint(str(home / "runs/tiny/checkpoints"))
    assert checkpoint is not None and checkpoint.step == 10
    monkeypatch.setenv("POISON", "()")
    assert "resuming from step 10" in run_job("pretrain", "r.yaml", home=home)
