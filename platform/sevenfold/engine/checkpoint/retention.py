"""Which checkpoints are kept, and the removal of the others."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection

from sevenfold import storage
from sevenfold.engine.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    DamagedError,
    base_name,
    checkpoint_names,
    committed_names,
    number_of,
    read_manifest,
)

# the files of a save other than its manifest, and temporary files of an interrupted write
_UNFINISHED = re.compile(
    r"(__\d+_\d+\.distcp|tensors\.json|\.metadata)(\.tmp)?|(MANIFEST|tensors)\.json\..+\.tmp"
)


def prune_checkpoints(
    newest: Checkpoint,
    keep: int,
    keep_every: int | None = None,
    damaged: Collection[str] = (),
    spared: Collection[int] = (),
) -> list[str]:
    """Removes the checkpoints of a run that are no longer kept, and what interrupted saves left.

    Only files that a save of this run wrote are removed: the directory must be named like a
    checkpoint, and if it is committed, its manifest must name this run. All other files in the
    folder belong to somebody else and stay. Checkpoints later than `newest` were found to be
    damaged; they stay too, so that a user can inspect them.

    Args:
        newest: The checkpoint that was just committed.
        keep: The number of newest checkpoints to keep, including `newest`.
        keep_every: Checkpoints whose step is a multiple of this are kept forever.
        damaged: Names of checkpoints that do not count towards `keep`.
        spared: Steps whose checkpoints are kept regardless of their age.

    Returns:
        The names in the folder that no save of this run wrote.
    """
    folder = newest.path.replace("\\", "/").rsplit("/", 1)[0]
    names = checkpoint_names(folder)
    foreign = [name for name in storage.listdir(folder) if name not in names]
    earlier = [name for name in names if number_of(name) < number_of(base_name(newest.path))]
    committed = set(committed_names(folder))
    valid = [name for name in earlier if name in committed and name not in damaged]
    kept = set(valid[-(keep - 1) :] if keep > 1 else ())
    for name in valid:
        step, _ = number_of(name)
        if step in spared or (keep_every and step % keep_every == 0):
            kept.add(name)
    for name in earlier:
        if name in kept:
            continue
        path = storage.join(folder, name)
        if name in committed:
            remaining = _remove_committed(path, newest.run)
        else:
            remaining = _remove_unfinished(path)
        foreign += [name] if MANIFEST in remaining else [f"{name}/{file}" for file in remaining]
    return foreign


def remove_checkpoints(folder: str) -> None:
    """Removes all checkpoints in a folder, and what interrupted saves left.

    Files that no save wrote stay, and so do damaged checkpoints.

    Args:
        folder: The folder of checkpoints of a run that is finished.
    """
    committed = committed_names(folder)
    for name in checkpoint_names(folder):
        path = storage.join(folder, name)
        if name not in committed:
            _remove_unfinished(path)
            continue
        with contextlib.suppress(DamagedError):
            _remove_committed(path, read_manifest(path).run)


def _remove_committed(path: str, run: str) -> list[str]:
    """Removes the files of a committed checkpoint if it belongs to a run.

    The manifest is removed first: if the removal is interrupted, the rest does not look like a
    checkpoint.

    Returns:
        The names that remain; all of them if the manifest cannot be read or names another run.
    """
    if is_link(path):
        return storage.listdir(path)
    try:
        checkpoint = read_manifest(path)
    except DamagedError:
        return storage.listdir(path)
    if checkpoint.run != run:
        return storage.listdir(path)
    for name in (MANIFEST, *checkpoint.files):
        storage.remove(storage.join(path, name))
    storage.remove_empty(path)
    return storage.listdir(path)


def _remove_unfinished(path: str) -> list[str]:
    """Removes the files of a save that was never committed. Returns the names that remain."""
    if not is_link(path):
        for name in storage.listdir(path):
            if _UNFINISHED.fullmatch(name):
                storage.remove(storage.join(path, name))
        storage.remove_empty(path)
    return storage.listdir(path)


def is_link(path: str) -> bool:
    """Returns whether a directory is a symbolic link.

    Its target lies elsewhere, so this run must not remove anything from it.
    """
    return not storage.is_url(path) and os.path.islink(path)
