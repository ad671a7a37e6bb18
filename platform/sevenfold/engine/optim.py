"""Optimizer and learning-rate schedule. The schedule is a function of the step: there is no state to save."""

from __future__ import annotations

import math

import torch
from torch import nn

from sevenfold import recipe as r


def build(model: nn.Module, settings: r.Optimizer) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices that are no embeddings."""
    embeddings = {id(p) for p in embedding_parameters(model)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (decayed if p.ndim >= 2 and id(p) not in embeddings else plain).append(p)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True,
    )  # fmt: skip


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
