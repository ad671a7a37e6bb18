"""`platform/` is a folder, never a package: it would shadow Python's own module for all that runs in the root."""

import subprocess
import sys

import pytest
import ray
from conftest import ROOT

ASK = "import platform; assert platform.system(), platform.__file__; import uuid, torch"


def test_no_init() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("env", [{}, {"PYTHONPATH": str(ROOT)}])
def test_pythons_own_platform_from_the_root(env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_pythons_own_platform_in_a_ray_worker(on_shared_ray: None) -> None:
    ray.init(logging_level="ERROR")

    @ray.remote
    def ask(root: str) -> tuple[str, str]:
        sys.path.insert(0, root)
        import platform

        return platform.system(), str(platform.__file__)

    name, file = ray.get(ask.remote(str(ROOT)))
    assert name and file.endswith("platform.py"), (name, file)
