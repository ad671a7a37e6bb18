"""The wheel works without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_wheel_trains_without_the_repository(tmp_path: Path) -> None:
    """An environment of its own has the wheel, and its dependencies from that of the tests."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, ROOT], check=True, timeout=120)
    (wheel,) = tmp_path.glob("sevenfold-*.whl")
    environment, elsewhere = tmp_path / "env", tmp_path / "elsewhere"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60
    )
    python = environment / "bin/python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    elsewhere.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"SEVENFOLD_HOME": str(elsewhere), "PATH": f"{environment}/bin:{env['PATH']}"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(str(python), "-c", "import sevenfold; print(sevenfold.__file__)")
    assert where.startswith(str(site_packages))
    assert "quickstart" in run("sevenfold", "recipes")
    run("sevenfold", "cluster-files", "cluster")
    assert (elsewhere / "cluster/cluster.yaml").read_text() == (ROOT / "cluster.yaml").read_text()
    assert (elsewhere / "cluster/deploy/Dockerfile").exists()
    small = ["train.steps=20", "train.global_batch=4", "train.micro_batch=4", "data.lanes=4"]
    run("sevenfold", "corpus", "python", "--max-mb", "2")
    run("sevenfold", "pretrain", "quickstart", *small)
    summary = json.loads((elsewhere / "runs/quickstart/summary.json").read_text())
    assert summary["steps"] == 20
    assert (elsewhere / "runs/quickstart/model/model.safetensors").exists()
