"""Parallelism, put on from outside: reads from top to bottom."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sevenfold.errors import InputError
from sevenfold.recipe import Parallel, Train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STYLES: dict[str, Callable[[], ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
# the products of matrices, dear to make again; all else is made again (selective checkpointing, arXiv 2205.05198)
SAVED = {
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
                 "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_cudnn_attention")
} | {torch.ops.higher_order.flex_attention}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A rank's place in the data: ranks of one tensor-parallel group read the same rows."""

    rank: int
    world_size: int

    @staticmethod
    def of(rank: int, world_size: int, tensor: int) -> Place:
        return Place(rank // tensor, world_size // tensor)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, as transformers marks them."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def tensor_plan(model: PreTrainedModel, ways: int) -> dict[str, str]:
    """Module -> colwise or rowwise, with `*` for layer numbers, as the model's config has it.

    Raises:
        InputError: the model has no such plan, or heads or width cannot be dealt out.
    """
    config = model.config
    plan = {f"{model.base_model_prefix}.{k}": v for k, v in (getattr(config, "base_model_tp_plan", None) or {}).items()}
    unknown = sorted(set(plan.values()) - STYLES.keys())
    if not plan or unknown:
        why = f"its plan asks for {unknown[0]}" if unknown else "it has no plan"
        raise InputError(f"parallel.tensor {ways}: {config.model_type} cannot be split: {why}; llama, mistral and qwen2 can")
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, field, ways) % ways:
            raise InputError(f"parallel.tensor {ways} does not divide the model's {field} {getattr(config, field)}")
    return plan


def shard(model: PreTrainedModel, device: torch.device, train: Train, parallel: Parallel | None = None) -> PreTrainedModel:
    """Lays a model, whole on rank 0, over all ranks. Shards and gradient sums are float32, the arithmetic `train.dtype`.

    Whatever rank 0 holds is what every rank gets, so that the start does not hang on the number of ranks.
    """
    full = model.state_dict() if dist.get_rank() == 0 else {}
    layout = parallel or Parallel()
    lay_out(model, mesh_of(device, layout), train, layout)
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def lay_out(model: PreTrainedModel, mesh: DeviceMesh, train: Train, layout: Parallel) -> None:
    """As `shard`, without handing out what rank 0 holds. mesh: as `mesh_of` makes it."""
    if layout.tensor > 1:
        styles: dict[str, ParallelStyle] = {k: STYLES[v]() for k, v in tensor_plan(model, layout.tensor).items()}
        parallelize_module(model, mesh["tensor"], styles)

    recompute(model, train.activation_checkpointing)

    if train.compile:
        for block in blocks(model):
            block.compile()

    data = mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[train.dtype], reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=data, mp_policy=policy)
    fully_shard(model, mesh=data, mp_policy=policy)
    register_fsdp_forward_method(model, "token_losses")  # of objectives.attach


def mesh_of(device: torch.device, layout: Parallel) -> DeviceMesh:
    """Tensor-parallel ranks are neighbours: they talk most."""
    world = dist.get_world_size()
    sizes = {"replicate": layout.replicate, "shard": world // layout.replicate // layout.tensor, "tensor": layout.tensor}
    used = {k: n for k, n in sizes.items() if n > 1 or k == "shard"}
    if math.prod(used.values()) != world:
        raise ValueError(f"{world} ranks cannot be laid out as {sizes}")
    return init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))


def recompute(model: PreTrainedModel, how: str) -> None:
    """Activation checkpointing: none, full (a block's inputs are kept, all else is made again in backward) or selective
    (what matrix products gave is kept too)."""
    if how == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
