"""Run folders of revision 837cad8 are exported, evaluated, replayed and resumed.

`runs_of_837cad8.tar.xz` holds what that revision wrote, with `texts.jsonl` and `heldout.jsonl`: the
finished run `old` of 12 steps, and `stopped`, the same recipe killed while it saved step 8.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import run_job
from safetensors.torch import load_file

from sevenfold.cli import main

ARCHIVE = Path(__file__).with_name("runs_of_837cad8.tar.xz")


@pytest.fixture(scope="module")
def old_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for manifest in folder.glob("runs/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("/HOME", str(folder)))
    return folder


def losses(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_an_old_run_is_exported(old_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = old_home / "exported"
    assert main(["export", str(old_home / "runs/old"), "--out", str(out)]) == 0
    assert load_file(out / "model.safetensors")
    assert main(["generate", str(out), "--prompt", "def ", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_an_old_run_is_replayed(old_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(old_home / "runs/old"), old_home / "step.safetensors"
    assert main(["ledger", run, "which", "--step", "3"]) == 0
    assert "texts.jsonl" in capsys.readouterr().out
    assert main(["ledger", run, "replay", "--step", "3", "--out", str(out)]) == 0
    assert load_file(out)


@pytest.mark.slow
def test_an_old_run_is_resumed_and_evaluated(old_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(old_home, home)
    for manifest in home.glob("runs/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace(str(old_home), str(home)))
    recipe = str(home / "runs/stopped/recipe.yaml")
    output = run_job("pretrain", recipe, home=home)
    assert "resuming from step 4" in output
    # not to the bit: the archived run was trained on another kind of CPU
    assert losses(home / "runs/stopped") == pytest.approx(losses(home / "runs/old"), rel=1e-5)
    run_job("evaluate", "runs/old", "runs/stopped", home=home)
    results = [
        json.loads((home / f"runs/{name}/metrics.json").read_text()) for name in ("old", "stopped")
    ]
    assert results[0]["perplexity"] == pytest.approx(results[1]["perplexity"], rel=1e-5)
    assert results[0]["perplexity"] > 1
