"""The modes of a run's files: those that the user's umask gives, as of any other program."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from conftest import ROOT
from helpers.modes import wrong_modes

from sevenfold import storage


def _job(umask: int, job: str, *args: str, home: Path) -> None:
    """Runs a job in a process with this umask."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *args]
    environment = {**os.environ, "SEVENFOLD_HOME": str(home)}
    result = subprocess.run(
        command,
        env=environment,
        cwd=home,
        umask=umask,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_a_new_folder_has_the_modes_of_the_umask(umask: int, tmp_path: Path) -> None:
    """Its files come from libraries and from copies, with any modes."""
    modes = (0o400, 0o600, 0o644, 0o666, 0o777)
    before = os.umask(umask)
    try:
        with storage.new_folder(str(tmp_path / "new")) as folder:
            for folder_mode in (0o700, 0o755, 0o777):
                inner = Path(folder, f"{folder_mode:o}", "deep")
                inner.mkdir(parents=True)
                for mode in modes:
                    (inner / f"{mode:o}").touch()
                    (inner / f"{mode:o}").chmod(mode)
                inner.chmod(folder_mode)
            os.symlink("/nowhere", Path(folder, "link"))
            safetensors.torch.save_file({"a": torch.zeros(1)}, Path(folder, "model.safetensors"))
    finally:
        os.umask(before)
    paths = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert len(paths) == 1 + 3 * (2 + len(modes)) + 2
    assert not wrong_modes(paths, umask)


@pytest.mark.nightly  # test_twelve_secrets.py does this once
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_run_folder_has_the_modes_of_the_umask(
    umask: int, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["train"] |= {"steps": 4}
    tree |= {
        "validation": {"every": 2, "rows": 4},
        "sweep": {
            "trials": 1,
            "metric": "validation/loss",
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    # A sweep writes what runs write, in the folders of its trials, and more.
    _job(umask, "sweep", "tiny.yaml", home=tmp_path)
    _job(umask, "evaluate", "runs/tiny-sweep", home=tmp_path)
    paths = list((tmp_path / "runs").rglob("*"))
    names = {p.name for p in paths}
    assert {"recipe.yaml", "metrics.jsonl", "predictions.jsonl", "report.html"} <= names
    assert {"MANIFEST.json", "model.safetensors", "tokenizer.json", "trial.json"} <= names
    assert not wrong_modes(paths, umask)
