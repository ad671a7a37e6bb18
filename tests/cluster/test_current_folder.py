"""Modules in the current folder are not imported, by commands, by jobs, or by Ray's processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hostile.current_folder import write_tripwires

COMMANDS = {
    "script": [str(Path(sys.executable).with_name("sevenfold"))],
    "module": [sys.executable, "-m", "sevenfold.cli"],
}
LIBRARY = str(ROOT / "platform")
PATHS = {"as it is": LIBRARY, "with an empty entry": f":{LIBRARY}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "handed over"
    folder.mkdir()
    write_tripwires(folder, tmp_path / "tripped")
    return folder


def run(command: list[str], folder: Path, path: str, timeout: int) -> str:
    """Runs a command in the folder; returns its output if nothing there was imported."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "SEVENFOLD_HOME": str(folder.parent)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    tripped = folder.parent / "tripped"
    assert not tripped.exists(), tripped.read_text()
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_versions(command: str, path: str, folder: Path) -> None:
    (folder / "sevenfold.py").unlink()
    assert "sevenfold " in run([*COMMANDS[command], "--version"], folder, PATHS[path], 120)


@pytest.mark.nightly
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, path: str, folder: Path, tree: dict[str, Any]) -> None:
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(tree))
    if (command, path) != ("script", "as it is"):
        # Python looks for the package itself there, before any of its code can run
        (folder / "sevenfold.py").unlink()
    arguments = ["pretrain", str(folder.parent / "recipe.yaml"), "--dry-run"]
    assert "chunks" in run([*COMMANDS[command], *arguments], folder, PATHS[path], 120)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("as it is", marks=pytest.mark.slow),
        pytest.param("with an empty entry", marks=pytest.mark.nightly),
    ],
)
def test_jobs_on_a_local_ray(path: str, folder: Path, tree: dict[str, Any]) -> None:
    tree["train"] |= {"steps": 2}
    tree["cluster"] = {"num_workers": 2}
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), str(recipe)]
    if path != "as it is":
        # Python looks for the package, and for what it needs itself, before any code can run
        for name in ("sevenfold", "random", "tempfile", "dataclasses"):
            (folder / f"{name}.py").unlink()
    run(command, folder, PATHS[path], 500)
    assert (folder.parent / "runs/tiny/summary.json").exists()
