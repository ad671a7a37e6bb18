"""Checkpoints: whole, or not there. Shards and their sums first, MANIFEST.json last: that is the commit."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from sevenfold import storage
from sevenfold.errors import InputError, RunError

log = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as its manifest tells it. `extra`: what the run wants to find again (plain JSON)."""

    path: str
    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    extra: dict[str, Any]


def save(
    folder: str, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], extra: dict[str, Any]
) -> Checkpoint:
    """Writes the trained parameters and the optimizers' state, a shard a rank. Every rank calls it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    names: list[str | None] = [_fresh(folder, step) if rank == 0 else None]
    dist.broadcast_object_list(names)
    path = storage.join(folder, str(names[0]))
    weights, state = get_state_dict(model, optimizers, options=_options())
    dcp.save({"model": weights, "optimizer": state}, storage_writer=_writer(path))
    mine = {n: _sum(storage.join(path, n)) for n in storage.listdir(path) if n.startswith(f"__{rank}_")}
    if rank == 0:
        mine[".metadata"] = _sum(storage.join(path, ".metadata"))
    parts: list[dict[str, Any]] = [{}] * world
    dist.all_gather_object(parts, mine)
    found = Checkpoint(path, step, world, {n: s for part in parts for n, s in part.items()}, extra)
    if rank == 0:
        written = {k: v for k, v in asdict(found).items() if k != "path"}
        storage.write(storage.join(path, MANIFEST), json.dumps(written, indent=1))
    dist.barrier()
    return found


def load(checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Reads a verified checkpoint into a model of any number of ranks, or of none."""
    options = _options()
    if not optimizers:
        trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        state = {"model": {n: p for n, p in model.state_dict().items() if n in trained}}
        dcp.load(state, storage_reader=_reader(checkpoint.path), no_dist=not dist.is_initialized())
        return
    weights, optim = get_state_dict(model, optimizers, options=options)
    dcp.load({"model": weights, "optimizer": optim}, storage_reader=_reader(checkpoint.path))
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=optim, options=options)


def latest(folder: str, warn: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named to `warn` and passed over. Nothing is unpickled."""
    for name in reversed(storage.listdir(folder)):
        path = storage.join(folder, name)
        if not storage.exists(storage.join(path, MANIFEST)):
            continue  # never committed
        try:
            found = read(path)
            verify(found)
        except RunError as e:
            warn(f"{e}; passed over for the one before")
            continue
        return found
    return None


def read(path: str) -> Checkpoint:
    """Raises RunError where the manifest cannot be read or names a file outside its folder."""
    try:
        found = Checkpoint(path=path, **storage.read_json(storage.join(path, MANIFEST)))
    except (InputError, OSError, ValueError, TypeError) as e:
        raise RunError(f"{path}: damaged: {MANIFEST} cannot be read ({type(e).__name__})") from None
    for name in found.files:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise RunError(f"{path}: damaged: {MANIFEST} names {name!r}, which leaves its folder")
    return found


def verify(checkpoint: Checkpoint) -> None:
    """Raises RunError, naming the file, where a size or sum is not what the manifest says."""
    for name, expected in checkpoint.files.items():
        file = storage.join(checkpoint.path, name)
        if not storage.exists(file):
            raise RunError(f"{file}: damaged: missing")
        if storage.size(file) != expected["bytes"] or _sum(file) != expected:
            raise RunError(f"{file}: damaged: its checksum is not the manifest's")


def prune(newest: Checkpoint, keep: int) -> None:
    """Removes what is older than the `keep` committed checkpoints up to `newest`, which was just written, and what was
    never committed before it. What lies after it (damaged, and passed over) is left for whoever wants to look."""
    folder, last = newest.path.replace("\\", "/").rsplit("/", 1)
    older = [n for n in storage.listdir(folder) if n < last]
    committed = [n for n in older if storage.exists(storage.join(folder, n, MANIFEST))]
    kept = committed[-(keep - 1) :] if keep > 1 else []
    for name in older:
        if name not in kept:
            storage.remove(storage.join(folder, name))


def _fresh(folder: str, step: int) -> str:
    """A name that no directory has: an interrupted save of the same step is never written into."""
    taken, n = set(storage.listdir(folder)), 0
    while (name := f"step-{step:08d}.{n:02d}") in taken:
        n += 1
    return name


def _options() -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True)


def _writer(path: str) -> Any:
    if storage.is_url(path):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(path, single_file_per_rank=True)
    return dcp.FileSystemWriter(path, single_file_per_rank=True, overwrite=False)


def _reader(path: str) -> Any:
    if storage.is_url(path):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(path)
    return dcp.FileSystemReader(path)


def _sum(path: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with storage.open_read(path) as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
