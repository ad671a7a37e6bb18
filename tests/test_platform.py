"""`platform/` must not be a package.

Otherwise it would shadow the standard library's module `platform` for every process that runs in
the repository's root.
"""

import subprocess
import sys

import pytest
import ray
from conftest import ROOT

CODE = "import platform; assert platform.system(), platform.__file__; import uuid, torch"


def test_platform_folder_is_not_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("env", [{}, {"PYTHONPATH": str(ROOT)}])
def test_standard_platform_module_from_the_root(env: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()


def test_standard_platform_module_in_a_ray_worker(on_shared_ray: None) -> None:
    ray.init(logging_level="ERROR")

    @ray.remote
    def import_platform(root: str) -> tuple[str, str]:
        sys.path.insert(0, root)
        import platform

        return platform.system(), str(platform.__file__)

    name, file = ray.get(import_platform.remote(str(ROOT)))
    assert name and file.endswith("platform.py"), (name, file)
