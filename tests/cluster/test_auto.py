"""What `auto` becomes in a recipe, on this machine and on a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused

from sevenfold.cli import main
from sevenfold.cluster.auto import Hardware, chosen, fill
from sevenfold.recipe import from_tree, parse
from sevenfold.recipe.keys import auto_keys

KEYS = ("train.micro_batch", "train.dtype", "cluster.num_workers", "cluster.gpus_per_worker")
LAPTOP = Hardware(0, False, 0.0, 1, 8, "this machine")
H100S = Hardware(8, True, 79.1, 2, 8, "this cluster")
T4S = Hardware(2, False, 14.6, 1, 8, "this machine")


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "name": "r",
        "data": {"sources": [{"path": "x"}], "sequence_length": 512},
        "tokenizer": {"vocab_size": 512},
        "model": {"config": {"model_type": "llama"}},
        "train": {"global_batch": 64, "micro_batch": "auto", "dtype": "auto", "steps": 1},
        "cluster": {"num_workers": "auto", "gpus_per_worker": "auto"},
    }
    for name, values in sections.items():
        recipe[name] = recipe.get(name, {}) | values
    return recipe


@pytest.mark.parametrize(
    ("found", "sections", "expected"),
    [
        (LAPTOP, {}, (8, "float32", 1, 0)),
        (H100S, {}, (8, "bfloat16", 8, 1)),
        (H100S, {"train": {"global_batch": 256}}, (32, "bfloat16", 8, 1)),
        (T4S, {}, (5, "float32", 2, 1)),
        # a longer sequence than a micro-batch should have
        (LAPTOP, {"data": {"sequence_length": 2**20}}, (1, "float32", 1, 0)),
        # no more workers than lanes, and whole groups of tensor parallel workers
        (H100S, {"data": {"lanes": 4}}, (16, "bfloat16", 4, 1)),
        (H100S, {"data": {"lanes": 2}, "parallel": {"tensor": 2}}, (16, "bfloat16", 4, 1)),
        (H100S._replace(gpus=7), {"parallel": {"replicate": 3}}, (11, "bfloat16", 6, 1)),
        (H100S, {"train": {"global_batch": 2}}, (1, "bfloat16", 2, 1)),
        # what the recipe says stays
        (H100S, {"cluster": {"gpus_per_worker": 0}}, (8, "float32", 2, 0)),
        (H100S, {"cluster": {"num_workers": 2}}, (32, "bfloat16", 2, 1)),
        (H100S, {"train": {"dtype": "float32"}}, (8, "float32", 8, 1)),
    ],
)
def test_values(found: Hardware, sections: dict[str, Any], expected: tuple[Any, ...]) -> None:
    recipe = from_tree(tree(**sections), {}, lambda recipe, keys: chosen(recipe, keys, found))
    train, cluster = recipe.train, recipe.cluster
    values = (train.micro_batch, train.dtype, cluster.num_workers, cluster.gpus_per_worker)
    assert values == expected


def test_only_these_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(auto_keys(tree())) == sorted(KEYS)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tree(schedule={"warmup_steps": "auto"})))
    assert "schedule.warmup_steps" in refused(capsys, "pretrain", str(file), "--dry-run")


def test_wrong_values_beside_auto_are_named(tmp_path: Path) -> None:
    for section in (
        {"train": {"global_batch": "many"}},
        {"data": {"sequence_length": -1}},
        {"parallel": {"tensor": "two"}},
    ):
        recipe = tree(**section)  # type: ignore[arg-type]
        assert set(chosen(recipe, KEYS, H100S)) == set(KEYS)


def test_what_was_chosen_is_said_stored_and_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words " * 99}) + "\n")
    recipe = tree(data={"sources": [{"path": str(tmp_path / "a.jsonl")}]})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    parsed = parse(str(tmp_path / "r.yaml"), (), fill)
    line = capsys.readouterr().out
    assert "train.micro_batch=8" in line and "since this machine has" in line
    assert parse_again(parsed.to_yaml(), tmp_path) == parsed
    plan = ["plan", str(tmp_path / "r.yaml"), "--gpu", "h100-80gb", "--gpus", "2", "--write"]
    assert main(plan) == 0
    written = parse(str(tmp_path / "r.yaml"))
    assert written.cluster.num_workers == 2 and written.train.dtype == "bfloat16"


def parse_again(text: str, folder: Path) -> Any:
    (folder / "again.yaml").write_text(text)
    return parse(str(folder / "again.yaml"))


FIND = """
import ray
ray.init(num_cpus=2, num_gpus=3, include_dashboard=False, _temp_dir="FOLDER", logging_level="ERROR",
         resources={"accelerator_type:T4": 1})
import os
os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
from sevenfold.cluster.auto import find_hardware
print(find_hardware())
ray.shutdown()
"""


def test_a_cluster_is_asked_for_its_gpus() -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sf") as folder:
        done = subprocess.run(
            [sys.executable, "-c", FIND.replace("FOLDER", folder)],
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            capture_output=True,
            text=True,
        )
    assert "gpus=3, bfloat16=False, gpu_gib=14.6, nodes=1" in done.stdout, done.stderr
    assert "this cluster" in done.stdout
