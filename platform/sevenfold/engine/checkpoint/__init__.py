"""Checkpoints that are either complete or absent.

A save writes the shards first and MANIFEST.json, which holds their checksums, last. A directory
without a manifest is no checkpoint.
"""

from sevenfold.engine.checkpoint.collective import on_each_rank
from sevenfold.engine.checkpoint.manager import CheckpointManager, TakenOverError, copy_checkpoint
from sevenfold.engine.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    DamagedError,
    checkpoint_paths,
    commit,
    latest_checkpoint,
    read_manifest,
    tree_digest,
    verified_checkpoint,
    verify_files,
)
from sevenfold.engine.checkpoint.retention import prune_checkpoints, remove_checkpoints
from sevenfold.engine.checkpoint.shards import CheckpointWeights, load_checkpoint

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointManager",
    "CheckpointWeights",
    "DamagedError",
    "TakenOverError",
    "checkpoint_paths",
    "commit",
    "copy_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "on_each_rank",
    "prune_checkpoints",
    "read_manifest",
    "remove_checkpoints",
    "tree_digest",
    "verified_checkpoint",
    "verify_files",
]
