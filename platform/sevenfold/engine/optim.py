"""Optimizers and the learning-rate schedule.

The schedule is a function of the step, so that a checkpoint holds no state of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from sevenfold import recipe as r

# how transformers names the layers that choose experts, and the gate of a shared expert
_ROUTER = re.compile(r"(^|[._])(router|(mlp|mixer|moe|feed_forward)\.gate|expert_gate)\.")


def build(model: nn.Module, settings: r.Optimizer) -> list[torch.optim.Optimizer]:
    """Builds the optimizers of a model's trainable parameters.

    With `name: muon`, Muon updates the matrices and AdamW all other parameters, among them the
    output layer, classifiers' heads, routers and the embeddings. Otherwise AdamW updates
    everything. Weight decay and L1 apply to matrices that are not embeddings.
    """
    embeddings = {id(p) for p in embedding_parameters(model)}
    left_to_adamw = _left_to_adamw(model)
    matrices: list[nn.Parameter] = []
    adamw_matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # Mamba's A_log is a tensor of decay rates: with weight decay they would all tend to 1
        if p.ndim < 2 or id(p) in embeddings or name.endswith("A_log"):
            others.append(p)
        elif id(p) in left_to_adamw:
            adamw_matrices.append(p)
        else:
            matrices.append(p)

    optimizers: list[torch.optim.Optimizer] = []
    muon = settings.name == "muon"
    decayed = adamw_matrices if muon else matrices + adamw_matrices
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay, "l1": settings.l1},
        {"params": others, "weight_decay": 0.0, "l1": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        options = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
        optimizers.append(torch.optim.AdamW(groups, **options, fused=True))  # type: ignore[arg-type]
    if muon and matrices:
        optimizers.append(
            Muon(
                matrices,
                settings.learning_rate,
                settings.weight_decay,
                settings.momentum,
                settings.l1,
            )
        )
    if settings.l1:
        for optimizer in optimizers:
            optimizer.register_step_post_hook(_apply_l1)
    return optimizers


def _left_to_adamw(model: Any) -> set[int]:
    """Returns the ids of the matrices that Muon leaves to AdamW.

    Muon makes all directions of an update equally large. That suits matrices between hidden states,
    but not those whose rows are classes, tokens or experts to choose from (arXiv 2502.16982), nor
    the kernels of convolutions, which are no matrices.
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    parameters = [m.weight for m in model.modules() if isinstance(m, convolutions)]
    parameters += [p for name, p in model.named_parameters() if _ROUTER.search(name)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if head is not None:
        parameters.append(head.weight)
    elif body is not None:  # a classifier: all that is outside its body
        inner = {id(p) for p in body.parameters()}
        parameters += [p for p in model.parameters() if id(p) not in inner]
    return {id(p) for p in parameters}


@torch.no_grad()
def _apply_l1(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Applies the proximal step of L1 after a gradient step: p <- sign(p) max(|p| - lr * l1, 0).

    This is ISTA (Beck and Teboulle, SIAM J. Imaging Sciences 2(1), 2009, eq. 1.4). It is decoupled
    from the gradient, as AdamW's weight decay is: the scale of the gradient has no influence on it.
    """
    for group in optimizer.param_groups:
        if not group["l1"]:
            continue
        for p in group["params"]:
            shard = _local_shard(p)
            shard.copy_(F.softshrink(shard, float(group["lr"]) * group["l1"]))


@torch.no_grad()
def sparsity(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """Returns the fraction of the L1-regularized parameters that are exactly zero.

    It counts the shards of all ranks, so every rank has to call it.
    """
    parameters = [
        p for o in optimizers for group in o.param_groups if group["l1"] for p in group["params"]
    ]
    counts = [(_local_shard(p) == 0).sum() / _replicas(p) for p in parameters]
    zeros = torch.stack(counts).double().sum()
    dist.all_reduce(zeros)
    return float(zeros) / sum(p.numel() for p in parameters)


def _local_shard(p: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a parameter; it shares the parameter's memory."""
    return p.to_local() if isinstance(p, DTensor) else p


def _replicas(p: torch.Tensor) -> int:
    """Returns the number of ranks that hold a copy of the same shard."""
    world_size = dist.get_world_size()
    if not isinstance(p, DTensor):
        return world_size
    shards = math.prod(
        size
        for size, placement in zip(p.device_mesh.shape, p.placements, strict=True)
        if placement.is_shard()
    )
    return world_size // shards


class Muon(torch.optim.Optimizer):
    """Muon, for matrices: momentum whose updates are made orthogonal (Jordan 2024).

    Updates are scaled by 0.2 * sqrt(max(rows, columns)), which gives them the size of AdamW's, so
    that AdamW's learning rates can be used (arXiv 2502.16982, section 2.2). A tensor of experts,
    [experts, rows, columns], is a matrix for each expert.

    torch.optim.Muon (torch 2.13) orthogonalizes in bfloat16, and on whichever part of a matrix
    DTensor's sharding rules leave on a rank. Here each matrix is gathered, orthogonalized by one
    rank and broadcast, so that the result is the same on any number of ranks.

    Args:
        params: The matrices to update.
        lr: The learning rate.
        weight_decay: Decoupled weight decay, as in AdamW.
        momentum: The decay of the running mean of the gradients.
        l1: The strength of L1, which `build` applies after each step.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        l1: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "l1": l1}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters; `closure` is ignored."""
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(buffer, group["momentum"])
                update = _orthogonalized(nesterov, index)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))
                index += 1


def _orthogonalized(matrix: torch.Tensor, index: int) -> torch.Tensor:
    """Orthogonalizes a matrix; the result is sharded as the matrix is.

    One rank computes it and broadcasts it. The ranks take turns by `index`, the matrix's number.
    """
    if not isinstance(matrix, DTensor):
        return newton_schulz(matrix)
    full, mesh = matrix.full_tensor(), matrix.device_mesh
    owner = index % dist.get_world_size()
    result = newton_schulz(full) if dist.get_rank() == owner else torch.empty_like(full)
    dist.broadcast(result, owner)
    replicated = DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=matrix.placements)


def newton_schulz(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximates the nearest orthogonal matrix: singular values end up between 0.7 and 1.2.

    Of a tensor with more dimensions, the last two are those of the matrices.

    Coefficients are Jordan's, as in torch.optim.Muon. It computes in bfloat16 on a GPU, which
    multiplies matrices fastest in it, and in float32 on a CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    norm = x.norm() if x.ndim == 2 else x.flatten(-2).norm(dim=-1)[..., None, None]
    x = x / (norm + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def embedding_parameters(model: nn.Module) -> list[torch.Tensor]:
    """Returns the weights of embedding layers; a tied output layer shares one of them."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]


def learning_rate(step: int, steps: int, peak: float, schedule: r.Schedule) -> float:
    """Returns the learning rate of a step.

    Args:
        step: The step's number, from 0.
        steps: The number of steps of the run.
        peak: The learning rate at the end of the warmup.
        schedule: constant, cosine, linear or wsd (warmup-stable-decay, arXiv 2404.06395).
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    if schedule.name == "constant":
        factor = 1.0
    elif schedule.name == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.name == "linear":
        factor = 1 - progress
    else:  # wsd: constant, then linear over the last decay_fraction of the steps
        decay = min(schedule.decay_fraction * steps, steps - schedule.warmup_steps)
        factor = min(1.0, (steps - step) / max(1.0, decay))
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * factor)
