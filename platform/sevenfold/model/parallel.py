"""Parallelism, applied to a model from outside.

It covers FSDP, tensor parallelism, activation checkpointing and compilation.
"""

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
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sevenfold.errors import InputError
from sevenfold.recipe import Parallel, Train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
}
# selective activation checkpointing (arXiv 2205.05198): the results of matmuls and attention, which
# are expensive to recompute, are saved; everything else is recomputed in the backward pass
SAVED = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_cudnn_attention",
    )
} | {torch.ops.higher_order.flex_attention}


@dataclass(frozen=True)
class DataRank:
    """A rank's position among the data-parallel ranks.

    The ranks of one tensor-parallel group have the same position: they read the same rows.

    Attributes:
        rank: The data-parallel rank.
        world_size: The number of data-parallel ranks.
    """

    rank: int
    world_size: int

    @staticmethod
    def from_rank(rank: int, world_size: int, tensor: int) -> DataRank:
        """Returns the position of a rank, given the number of tensor-parallel ranks."""
        return DataRank(rank // tensor, world_size // tensor)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the transformer blocks of a model, in order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def tensor_plan(model: PreTrainedModel, ways: int) -> dict[str, str]:
    """Returns the tensor-parallel plan of a model, which its config holds.

    Args:
        model: The model.
        ways: The number of tensor-parallel ranks.

    Returns:
        The style, colwise or rowwise, of each module; in the modules' names `*` stands for the
        number of the layer.

    Raises:
        InputError: The model has no supported plan, or its size is not a multiple of `ways`.
    """
    config = model.config
    plan = {
        f"{model.base_model_prefix}.{name}": style
        for name, style in (getattr(config, "base_model_tp_plan", None) or {}).items()
    }
    unsupported = sorted(set(plan.values()) - STYLES.keys())
    if not plan or unsupported:
        reason = f"its plan needs {unsupported[0]}" if unsupported else "it has no plan"
        raise InputError(
            f"parallel.tensor {ways}: {config.model_type} does not support tensor parallelism "
            f"({reason}); llama, mistral and qwen2 do"
        )
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, field, ways) % ways:
            raise InputError(
                f"the model's {field} ({getattr(config, field)}) must be a multiple of "
                f"parallel.tensor ({ways})"
            )
    return plan


def shard(
    model: PreTrainedModel, device: torch.device, train: Train, parallel: Parallel | None = None
) -> PreTrainedModel:
    """Shards a model over all ranks and broadcasts rank 0's weights.

    Shards and gradient sums are float32; the computation is in `train.dtype`. The weights are rank
    0's, so that they do not depend on the number of ranks.

    Args:
        model: The model. Only rank 0 needs its weights.
        device: The device of this rank.
        train: The recipe's `train`.
        parallel: The recipe's `parallel`. Default: FSDP over all ranks.
    """
    full = model.state_dict() if dist.get_rank() == 0 else {}
    layout = parallel or Parallel()
    parallelize(model, mesh_of(device, layout), train, layout)
    set_model_state_dict(
        model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    return model


def parallelize(model: PreTrainedModel, mesh: DeviceMesh, train: Train, layout: Parallel) -> None:
    """Applies the parallelism to a model without broadcasting rank 0's weights; see `shard`.

    Args:
        model: The model.
        mesh: The device mesh, from `mesh_of`.
        train: The recipe's `train`.
        layout: The recipe's `parallel`.
    """
    if layout.tensor > 1:
        styles: dict[str, ParallelStyle] = {
            name: STYLES[style]() for name, style in tensor_plan(model, layout.tensor).items()
        }
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
    register_fsdp_forward_method(model, "token_losses")  # see attach_losses


def mesh_of(device: torch.device, layout: Parallel) -> DeviceMesh:
    """Creates the device mesh of a layout.

    Tensor-parallel ranks are neighbors, since they communicate the most. Dimensions of size 1 are
    left out, except `shard`.

    Raises:
        ValueError: The sizes do not match the number of ranks.
    """
    world_size = dist.get_world_size()
    sizes = {
        "replicate": layout.replicate,
        "shard": world_size // layout.replicate // layout.tensor,
        "tensor": layout.tensor,
    }
    used = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    if math.prod(used.values()) != world_size:
        raise ValueError(
            f"the product of the mesh sizes {sizes} must be the number of ranks ({world_size})"
        )
    return init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))


def recompute(model: PreTrainedModel, how: str) -> None:
    """Enables activation checkpointing.

    Args:
        model: The model.
        how: "none"; "full": the inputs of blocks are saved, and everything else is recomputed in
            the backward pass; "selective": the results of matmuls and attention are saved too.
    """
    if how == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
