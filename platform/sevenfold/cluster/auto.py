"""Chooses values for `auto` in a recipe by what this machine, or the cluster that is used, has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sevenfold.cluster.hardware import gpu_memory_gib, gpus_without_bfloat16
from sevenfold.report.console import say

# Tokens of a micro-batch: with few, a device idles; with many, activations do not fit. Of a GPU,
# for one with 80 GB; fewer on a smaller one.
CPU_TOKENS, GPU_TOKENS, GPU_GIB = 4_096, 16_384, 79.0


class Hardware(NamedTuple):
    """What a run can use.

    Attributes:
        gpus: The number of GPUs, of all nodes.
        bfloat16: Whether the GPUs compute in bfloat16.
        gpu_gib: The memory of a GPU.
        nodes: The number of machines.
        cores: The CPU cores of this machine.
        where: "this machine" or "this cluster", for messages.
    """

    gpus: int
    bfloat16: bool
    gpu_gib: float
    nodes: int
    cores: int
    where: str

    @property
    def micro_batch_tokens(self) -> int:
        """About how many tokens a worker's micro-batch should have."""
        if not self.gpus:
            return CPU_TOKENS
        return int(GPU_TOKENS * min(1.0, self.gpu_gib / GPU_GIB))


def find_hardware() -> Hardware:
    """Returns what the cluster at RAY_ADDRESS has or can start; without it, what this machine has.

    Raises:
        InputError: RAY_ADDRESS is the URL of a dashboard.
        RunError: No cluster answers at RAY_ADDRESS.
    """
    if os.environ.get("RAY_ADDRESS"):
        return _of_cluster()
    import torch

    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if not gpus:
        return Hardware(0, False, 0.0, 1, cores, "this machine")
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Hardware(gpus, bfloat16, memory / 2**30, 1, cores, "this machine")


def _of_cluster() -> Hardware:
    import ray

    from sevenfold.cluster import capacity, connect

    was_connected = ray.is_initialized()
    if not was_connected:
        connect.connect()
    try:
        gpus, kinds, nodes = capacity.gpus_and_nodes()
    finally:
        if not was_connected:
            ray.shutdown()
    memory = min((gpu_memory_gib(kind) or GPU_GIB for kind in kinds), default=GPU_GIB)
    bfloat16 = not (kinds and kinds <= gpus_without_bfloat16())
    return Hardware(gpus, bfloat16 and gpus > 0, memory, nodes, os.cpu_count() or 1, "this cluster")


def fill(
    tree: Mapping[str, Any], keys: Sequence[str], found: Hardware | None = None
) -> dict[str, Any]:
    """Returns values for the keys that are `auto`, and says which.

    Args:
        tree: The recipe.
        keys: The keys.
        found: What the run can use. Default: as `find_hardware`.

    Raises:
        InputError: As `find_hardware`.
        RunError: As `find_hardware`.
    """
    found = found or find_hardware()
    values = chosen(tree, keys, found)
    has = f"{found.gpus} GPUs" if found.gpus else "no GPU"
    texts = ", ".join(f"{key}={value}" for key, value in values.items())
    say(f"auto: {texts}, since {found.where} has {has}")
    return values


def fill_for_gpus(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Returns values for one recent GPU; `sevenfold plan` chooses all of them but the dtype."""
    return chosen(tree, keys, Hardware(1, True, GPU_GIB, 1, 1, ""))


def chosen(tree: Mapping[str, Any], keys: Sequence[str], found: Hardware) -> dict[str, Any]:
    """Returns values for the keys that are `auto`.

    Args:
        tree: The recipe, whose other values may be wrong: they are checked later.
        keys: The keys.
        found: What the run can use.
    """
    gpus_per_worker = _number(tree, "cluster.gpus_per_worker", 0)
    if "cluster.gpus_per_worker" in keys:
        gpus_per_worker = min(1, found.gpus)
    workers = _number(tree, "cluster.num_workers", 1)
    if "cluster.num_workers" in keys:
        workers = _workers(tree, max(1, found.gpus if gpus_per_worker else found.nodes))
    length = _number(tree, "data.sequence_length", 1)
    share = -(-_number(tree, "train.global_batch", 1) // workers)
    tokens = found.micro_batch_tokens if gpus_per_worker else CPU_TOKENS
    values = {
        "cluster.num_workers": workers,
        "cluster.gpus_per_worker": gpus_per_worker,
        "train.micro_batch": max(1, min(share, tokens // length)),
        "train.dtype": "bfloat16" if gpus_per_worker and found.bfloat16 else "float32",
    }
    return {key: value for key, value in values.items() if key in keys}


def _workers(tree: Mapping[str, Any], most: int) -> int:
    """Returns the largest number of workers that the batch can be divided over."""
    tensor = _number(tree, "parallel.tensor", 1)
    group = tensor * _number(tree, "parallel.replicate", 1)
    lanes = _number(tree, "data.lanes", _number(tree, "train.global_batch", 1))
    return max(1, min(most, lanes * tensor) // group) * group


def _number(tree: Mapping[str, Any], path: str, default: int) -> int:
    """Returns a whole number above 0 of the recipe, or else the default."""
    section, key = path.split(".")
    values = tree.get(section)
    value = values.get(key) if isinstance(values, Mapping) else None
    return value if type(value) is int and value > 0 else default
