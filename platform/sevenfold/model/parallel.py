"""Parallelism, put on from outside: reads from top to bottom."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks: the modules of the classes that transformers itself says must not be split."""
    names = set(model._no_split_modules or [])
    return [m for m in model.modules() if type(m).__name__ in names]


def shard(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """FSDP2 over all ranks: each block, then the root. Shards and gradient sums are float32, the arithmetic `dtype`.

    Whatever rank 0 holds is what every rank gets, so that the start does not hang on the number of ranks.
    """
    full = model.state_dict() if dist.get_rank() == 0 else {}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model
