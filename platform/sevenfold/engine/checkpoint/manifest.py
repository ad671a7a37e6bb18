"""Checkpoints and their manifests: list, read, verify and commit.

MANIFEST.json lists the files of a checkpoint with their sizes and checksums. It is written last:
writing it commits the checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from sevenfold import storage
from sevenfold.engine.checkpoint.collective import on_each_rank
from sevenfold.errors import InputError, RunError

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"

# name of a checkpoint's directory: step, and number of the save of this step
_DIRECTORY_NAME = re.compile(r"step-(\d{8,})\.(\d{2,})")


class DamagedError(RunError):
    """A checkpoint does not match its manifest, or its manifest cannot be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as its manifest describes it.

    Attributes:
        path: The checkpoint's directory.
        step: The training step whose state it holds.
        world_size: The number of ranks that wrote it.
        files: For each file name, its size ("bytes") and SHA-256 ("sha256").
        extra: Further state of the run, plain JSON.
        run: The identity of the run whose folder it was written to. Only that run may remove it.
    """

    path: str
    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    extra: dict[str, Any]
    run: str = ""


def commit(checkpoint: Checkpoint) -> None:
    """Commits a checkpoint: writes its manifest beside its files."""
    tree = {key: value for key, value in asdict(checkpoint).items() if key != "path"}
    storage.write(
        storage.join(checkpoint.path, MANIFEST),
        json.dumps({**tree, "sha256": tree_digest(tree)}, indent=1),
    )


def tree_digest(tree: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest's content, without its own checksum."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def checkpoint_paths(folder: str) -> dict[int, str]:
    """Returns the directory of each committed checkpoint by its step, oldest first."""
    return {number_of(name)[0]: storage.join(folder, name) for name in committed_names(folder)}


def latest_checkpoint(folder: str, warn: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """Finds the latest valid checkpoint, the same one on every rank.

    The ranks share the work: each verifies a part of the files. Damaged checkpoints are skipped.
    Nothing is unpickled.

    Args:
        folder: The folder of checkpoints.
        warn: Receives a message for each damaged checkpoint, on rank 0.

    Returns:
        The checkpoint, or None if there is no valid one.

    Raises:
        RunError: The storage keeps failing.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = on_each_rank(lambda: committed_names(folder) if rank == 0 else [])[0]
    if rank == 0:
        _report_uncommitted(folder, names, warn)
    for name in reversed(names):
        path = storage.join(folder, name)
        try:
            return on_each_rank(functools.partial(verified_checkpoint, path, rank, world))[0]
        except DamagedError as e:
            if rank == 0:
                warn(f"{e}; trying the previous checkpoint")
    return None


def _report_uncommitted(folder: str, committed: list[str], warn: Callable[[str], None]) -> None:
    """Reports directories without a manifest that are later than all that have one."""
    newest = number_of(committed[-1]) if committed else (-1, 0)
    for name in checkpoint_names(folder):
        if name not in committed and number_of(name) > newest:
            warn(
                f"{storage.join(folder, name)}: not used: it has no {MANIFEST}, which is written "
                "when a save is complete"
            )


def verified_checkpoint(path: str, rank: int = 0, world: int = 1) -> Checkpoint:
    """Reads a checkpoint's manifest and verifies its files.

    Args:
        path: The checkpoint's directory.
        rank: With `world`, selects the part of the files to verify.
        world: The number of parts; 1 verifies all files.

    Raises:
        DamagedError: The manifest cannot be read, or a verified file does not match it.
    """
    checkpoint = read_manifest(path)
    verify_files(checkpoint, sorted(checkpoint.files)[rank::world])
    return checkpoint


def read_manifest(path: str) -> Checkpoint:
    """Reads the manifest in a checkpoint's directory, without a look at the other files.

    Raises:
        DamagedError: The manifest cannot be read, does not match its own checksum, lists a file
            outside its directory, or is of another step than the directory's name says.
    """
    try:
        tree: dict[str, Any] = storage.read_json(storage.join(path, MANIFEST))
        if tree.pop("sha256") != tree_digest(tree):
            raise DamagedError(f"{path}: damaged: {MANIFEST} does not match its own checksum")
        # older manifests lack `run`; there the recipe's hash identifies the run
        tree.setdefault("run", tree["extra"].get("recipe", ""))
        checkpoint = Checkpoint(path=path, **tree)
        for file in checkpoint.files.values():
            int(file["bytes"]), str(file["sha256"])
    except (InputError, OSError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise DamagedError(
            f"{path}: damaged: {MANIFEST} cannot be read ({type(e).__name__})"
        ) from None
    for name in checkpoint.files:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise DamagedError(
                f"{path}: damaged: {MANIFEST} lists {name!r}, which is outside this directory"
            )
    if _DIRECTORY_NAME.fullmatch(base_name(path)):
        named_step, _ = number_of(base_name(path))
        if named_step != checkpoint.step:
            raise DamagedError(
                f"{path}: expected step {named_step}, but {MANIFEST} says step {checkpoint.step}: "
                "this is a renamed copy of another checkpoint"
            )
    return checkpoint


def verify_files(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> None:
    """Verifies the sizes and checksums of a checkpoint's files.

    Args:
        checkpoint: The checkpoint as its manifest describes it.
        names: The files to verify. Default: all.

    Raises:
        DamagedError: A file is missing, or does not match the manifest.
    """
    for name in checkpoint.files if names is None else names:
        file, expected = storage.join(checkpoint.path, name), checkpoint.files[name]
        if not storage.exists(file):
            raise DamagedError(f"{file}: damaged: the file is missing")
        if storage.size(file) != expected["bytes"] or storage.file_digest(file) != expected:
            raise DamagedError(f"{file}: damaged: size or checksum does not match {MANIFEST}")


def base_name(path: str) -> str:
    """Returns the last part of a path or URL."""
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def checkpoint_names(folder: str) -> list[str]:
    """Returns the names of all checkpoint directories, ordered by step, committed or not."""
    names = (name for name in storage.listdir(folder) if _DIRECTORY_NAME.fullmatch(name))
    return sorted(names, key=number_of)


def committed_names(folder: str) -> list[str]:
    """Returns the names of the checkpoint directories that have a manifest, oldest first."""
    return [
        name
        for name in checkpoint_names(folder)
        if storage.exists(storage.join(folder, name, MANIFEST))
    ]


def number_of(name: str) -> tuple[int, int]:
    """Returns the step in the name of a checkpoint's directory, and the number of the save."""
    match = _DIRECTORY_NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2])


def fresh_name(folder: str, step: int) -> str:
    """Returns an unused name for a checkpoint's directory.

    A save never writes into the directory of an interrupted save of the same step.
    """
    existing, number = set(storage.listdir(folder)), 0
    while (name := f"step-{step:08d}.{number:02d}") in existing:
        number += 1
    return name
