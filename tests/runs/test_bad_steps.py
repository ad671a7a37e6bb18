"""NaN in one rank's gradient, in real runs: left out, gone back from, given up with a healthy checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, run_job

from sevenfold.data.ledger import Ledger
from sevenfold.engine import checkpoint as ckpt

# Python runs it at the start of each process, Ray's too: the gradients of rank 1 are poisoned in the calls that POISON names
SITE = """
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
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{"path": str(texts / "train")}]}
    tree["train"] |= {"steps": 24}
    tree |= {"checkpoint": {"every": 5, "keep": 9}, "cluster": {"num_workers": 2, "max_failures": 0}}
    tree |= {"guard": {"max_skipped": 3, "max_rollbacks": 1}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def losses(run: Path) -> dict[int, float]:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m["train/loss"] for m in logged if "train/loss" in m}


@pytest.mark.slow
def test_bad_steps_are_left_out_and_their_data_passed_over(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISON", "(3, 8, 9, 10)")  # one alone, then three in a row: back to step 5
    out = run_job("pretrain", "r.yaml", home=home)
    assert "step 3 was left out: loss" in out and "gradient norm nan" in out
    assert "step 10 was left out" in out and "going on from step 5" in out
    assert "data steps 8 to 10 are passed over from now on" in out
    run = home / "runs/tiny"
    read = {d.step: d.data_step for d in Ledger(str(run / "ledger")).read(1, 24)}
    assert read == {s: s if s <= 7 else s + 3 for s in range(1, 25)}
    found = losses(run)
    assert sorted(found) == list(range(1, 25)) and all(v == v for v in found.values())

    monkeypatch.setenv("POISON", "()")
    run_job("pretrain", "r.yaml", "name=well", home=home)
    well = losses(home / "runs/well")
    assert [found[s] for s in (1, 2, 3)] == [well[s] for s in (1, 2, 3)] and found[4] != well[4]


@pytest.mark.slow
def test_what_does_not_get_better_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISON", "range(12, 100)")
    said = run_job("pretrain", "r.yaml", home=home, code=1)
    assert "in 3 steps in a row" in said and "after 1 returns to a checkpoint" in said and "Traceback" not in said
    last = ckpt.latest(str(home / "runs/tiny/checkpoints"))
    assert last is not None and last.step == 10
    monkeypatch.setenv("POISON", "()")
    assert "going on from step 10" in run_job("pretrain", "r.yaml", home=home)
