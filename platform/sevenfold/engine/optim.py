"""Optimizers and learning-rate schedule. The schedule is a function of the step: there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from sevenfold import recipe as r


def build(model: nn.Module, settings: r.Optimizer) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices, and AdamW for all else. Weight decay and L1 on matrices that are no embeddings."""
    embeddings = {id(p) for p in embedding_parameters(model)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    matrices: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            matrix = p.ndim >= 2 and id(p) not in embeddings
            (heads if matrix and head is not None and p is head.weight else matrices if matrix else plain).append(p)
    muon = settings.name == "muon"
    decayed = heads if muon else matrices + heads
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay, "l1": settings.l1},
        {"params": plain, "weight_decay": 0.0, "l1": 0.0},
    ]
    out: list[torch.optim.Optimizer] = []
    if groups := [g for g in groups if g["params"]]:
        rest = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
        out.append(torch.optim.AdamW(groups, **rest, fused=True))  # type: ignore[arg-type]
    if muon and matrices:
        out.append(Muon(matrices, settings.learning_rate, settings.weight_decay, settings.momentum, settings.l1))
    for optimizer in out if settings.l1 else ():
        optimizer.register_step_post_hook(_shrink)
    return out


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The proximal step of L1, after the gradient's: p <- sign(p) max(|p| - rate * l1, 0) (ISTA: Beck and Teboulle, SIAM J.
    Imaging Sciences 2(1), 2009, eq. 1.4). Decoupled, as the weight decay is: the gradient's scale does not show in it."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["l1"] else ():
            shard = _shard(p)
            shard.copy_(F.softshrink(shard, float(group["lr"]) * group["l1"]))


@torch.no_grad()
def sparsity(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """The part of the parameters that L1 draws to 0 and that are exactly that, over all ranks, each of which calls it."""
    found = [p for o in optimizers for group in o.param_groups if group["l1"] for p in group["params"]]
    zeros = torch.stack([(_shard(p) == 0).sum() / _copies(p) for p in found]).double().sum()
    dist.all_reduce(zeros)
    return float(zeros) / sum(p.numel() for p in found)


def _shard(p: torch.Tensor) -> torch.Tensor:
    """This rank's part, which p shares its memory with."""
    return p.to_local() if isinstance(p, DTensor) else p


def _copies(p: torch.Tensor) -> int:
    """How many ranks hold the same part of it."""
    world = dist.get_world_size()
    if not isinstance(p, DTensor):
        return world
    return world // math.prod(n for n, placed in zip(p.device_mesh.shape, p.placements, strict=True) if placed.is_shard())


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan 2024, arXiv 2502.16982): for matrices. Steps have AdamW's size, so that its
    learning rates serve (0.2 * sqrt(max(rows, columns)), ibid., section 2.2).

    torch's own (2.13) does this in bfloat16 and on whatever part of a matrix it holds in the end by DTensor's rules; here
    each matrix is put together, made orthogonal by one rank, and handed out: the same on any number of ranks.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float, l1: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "l1": l1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = _orthogonal(p.grad.lerp(buffer, group["momentum"]), number)  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
                number += 1


def _orthogonal(matrix: torch.Tensor, number: int) -> torch.Tensor:
    """Laid out as the argument is. One rank makes it: the ranks take turns by `number`."""
    if not isinstance(matrix, DTensor):
        return newton_schulz(matrix)
    full, mesh = matrix.full_tensor(), matrix.device_mesh
    owner = number % dist.get_world_size()
    made = newton_schulz(full) if dist.get_rank() == owner else torch.empty_like(full)
    dist.broadcast(made, owner)
    whole = DTensor.from_local(made, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=matrix.placements)


def newton_schulz(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest orthogonal matrix: singular values within 0.7 to 1.2. Coefficients: Jordan's (as torch.optim.Muon).

    bfloat16 on an accelerator, where it is what products are made for; float32 on a CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.flatten(1).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).reshape(matrix.shape).to(matrix.dtype)


def embedding_parameters(model: nn.Module) -> list[torch.Tensor]:
    """The weights of look-up tables, which an output layer may share."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]


def learning_rate(step: int, steps: int, peak: float, schedule: r.Schedule) -> float:
    """The rate of step `step` (from 0) of `steps`. wsd: arXiv 2404.06395."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    if schedule.name == "constant":
        factor = 1.0
    elif schedule.name == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule.name == "linear":
        factor = 1 - done
    else:
        left = steps - step
        factor = min(1.0, left / max(1.0, schedule.decay_fraction * steps))
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * factor)
