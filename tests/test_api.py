"""sevenfold as a library: several calls in one process, and exceptions for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from sevenfold import api as sf

SCRIPT = """
import json, os, signal, sys
from sevenfold import api as sf

tree = json.loads(sys.argv[1])
def settings():
    # libraries that are imported meanwhile set variables of their own, Ray RAY_CLIENT_MODE
    names = ("RAY_", "TORCH_GLOO", "PYTHONPATH", "SEVENFOLD")
    return {
        k: v for k, v in os.environ.items() if k.startswith(names) and k != "RAY_CLIENT_MODE"
    }

before, handler = settings(), signal.getsignal(signal.SIGTERM)
runs = [
    sf.train(sf.load_recipe(tree, {"name": name, "optimizer.learning_rate": rate}))
    for name, rate in (("first", 1e-2), ("second", 1e-3))
]
assert sf.train(runs[0].recipe).folder == runs[0].folder  # finished already
try:
    sf.train(sf.load_recipe(tree, {"name": "third", "data.sources.0.path": "missing"}))
except sf.InputError as e:
    print("refused:", e)
results = sf.evaluate(*runs)
assert set(results) == {run.folder for run in runs}
import ray
assert not ray.is_initialized()
assert settings() == before, (settings(), before)
assert signal.getsignal(signal.SIGTERM) is handler, signal.getsignal(signal.SIGTERM)
text = sf.generate(runs[0], "def add(a, b):", max_new_tokens=8, temperature=0)
out = runs[0].export("exported")
print("RESULT", json.dumps({
    "losses": [run.metrics["train/loss"].dropna().tolist() for run in runs],
    "steps": [list(run.checkpoints) for run in runs],
    "finished": [run.finished for run in runs],
    "perplexity": [results[run.folder]["perplexity"] for run in runs],
    "text": text,
    "exported": sorted(os.listdir(out)),
    "trials": len(runs[0].trials),
}))
"""


@pytest.mark.slow
def test_several_calls_in_one_process(tree: dict[str, Any], tmp_path: Path) -> None:
    tree |= {"storage": str(tmp_path / "runs")}
    tree["data"]["executor"] = "inline"
    path = os.pathsep.join([str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "SEVENFOLD_HOME": str(tmp_path)}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(tree)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused: " in done.stdout and "missing" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["finished"] == [True, True] and result["steps"] == [[8], [8]]
    first, second = result["losses"]
    assert len(first) == len(second) == 8 and first[0] == second[0] and first != second
    assert all(1 < value < 600 for value in result["perplexity"])
    assert result["text"] and "model.safetensors" in result["exported"]
    assert result["trials"] == 0


def test_mistakes_are_exceptions(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(sf.InputError, match="expected a run"):
        sf.Run(tmp_path)
    with pytest.raises(sf.InputError, match=r"optimizer\.learning_rate"):
        sf.load_recipe(tree, {"optimizer.lr": 1})
    with pytest.raises(sf.InputError, match="sevenfold recipes"):
        sf.load_recipe("no-such-recipe")
    with pytest.raises(sf.InputError, match="expected a file or folder"):
        sf.recipe_for(tmp_path / "missing.jsonl")
    assert sf.load_recipe("quickstart", {"train.steps": 3}).train.steps == 3
    assert sf.load_recipe(tree).hash() == sf.load_recipe(tree, {"name": "other"}).hash()


def test_a_frame_of_a_run_that_writes_its_log(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = sf.load_recipe(tree)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    run = sf.Run(tmp_path)
    assert run.metrics.empty and not run.finished and run.checkpoints == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    assert run.metrics.to_dict("list") == {"step": [1], "loss": [5.0]}
    assert run.recipe.hash() == recipe.hash()
