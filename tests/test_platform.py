"""`platform/` is a folder, never a package: it would shadow Python's own module for all that runs in the root."""

import subprocess
import sys

import pytest
from conftest import ROOT

ASK = "import platform; assert platform.system(), platform.__file__; import uuid, torch"


def test_no_init() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("env", [{}, {"PYTHONPATH": str(ROOT)}])
def test_pythons_own_platform_from_the_root(env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_pythons_own_platform_in_a_ray_worker() -> None:
    code = """
import ray
ray.init(address="local", num_cpus=2, logging_level="ERROR", object_store_memory=100 * 2**20)
@ray.remote
def ask():
    import os, platform, sys
    sys.path.insert(0, os.getcwd())
    return platform.system(), platform.__file__
name, file = ray.get(ask.remote())
assert name and file.endswith("platform.py"), (name, file)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
