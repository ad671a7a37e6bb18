"""One training step, and the forward pass of a validation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.notice import Notice
from sevenfold.errors import RunError


class NoTargets(RunError):
    """A step without a single target token, on any rank."""


@dataclass
class Step:
    """Of all ranks together: loss in nats a target token, number of target tokens, norm of the gradient before
    clipping; `applied` is False where loss or gradient were not finite and no weight was changed. `noticed`: the notice
    that a rank was given."""

    loss: float
    targets: int
    grad_norm: float
    applied: bool
    noticed: Notice


def train_step(
    model: Any, batches: Sequence[Batch], optimizers: Sequence[torch.optim.Optimizer], learning_rate: float,
    max_grad_norm: float, tensor: int = 1, most_norm: float = float("inf"),
    notice: Notice = Notice.NONE,
) -> Step:  # fmt: skip
    """The loss is the mean over the target tokens of all micro-batches of all ranks: how they are dealt out does
    not show in it. Raises NoTargets where there is no target token at all.

    Args:
        model: with the method token_losses (objectives.attach), sharded over all ranks.
        tensor: so many neighbouring ranks hold the same rows.
        most_norm: a gradient above it counts as one that is not finite.
        notice: of one rank, the others' being NONE; it travels with the count.
    """
    world = dist.get_world_size() // tensor
    device = batches[0].labels.device
    mine = torch.stack([torch.zeros((), device=device), *((b.labels != IGNORE).sum() for b in batches)]).sum()
    both = torch.stack([mine, torch.full((), float(notice), device=device)])
    dist.all_reduce(both)
    count, notices = both[0] // tensor, both[1]

    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)
        loss = model.token_losses(batch).sum()
        (loss * (world / count)).backward()  # FSDP takes the mean over ranks: times world makes it the sum
        total += loss.detach()
    dist.all_reduce(total)
    total /= tensor

    norm = clip_grad_norm(model.parameters(), max_grad_norm)
    # the one place where the host waits for the device
    summed, targets, length, noticed = torch.stack([t.double() for t in (total, count, norm, notices)]).tolist()
    if not targets:
        raise NoTargets("a step without a single target token: the documents are empty, or every one of them is masked")
    applied = math.isfinite(summed + length) and length <= most_norm
    for optimizer in optimizers:
        if applied:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        optimizer.zero_grad()
    return Step(summed / targets, int(targets), length, applied, Notice(int(noticed)))


def clip_grad_norm(parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
    """Scales the gradients so that the norm of all together is at most `most`; returns what it was.

    torch's clip_grad_norm_ takes one mesh alone: with tensor parallelism some parameters lie on two.
    """
    by_mesh: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            by_mesh[getattr(p.grad, "device_mesh", None)].append(p.grad)
    norms = [nn.utils.get_total_norm(grads) for grads in by_mesh.values()]
    norm = torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).norm()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's
    for grads in by_mesh.values():
        torch._foreach_mul_([g.to_local() if hasattr(g, "to_local") else g for g in grads], factor)
    return norm


@torch.no_grad()
def evaluate(
    model: Any, batches: Sequence[Batch], token_bytes: torch.Tensor, told: list[tuple[int, int]] | None = None
) -> tuple[float, int, int]:
    """(sum of -log p in nats, target tokens, bytes of text that these stand for) of all ranks together.

    Every rank must bring as many batches.

    Args:
        token_bytes: int64 [vocabulary].
        told: of an objective that judges, (label, what the model took for it) of this rank's batches are put in.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        asked = batch.labels[batch.labels != IGNORE]
        losses, taken = model.token_losses(batch, judged=True)
        nats = float(losses.sum())
        if told is not None:
            told += zip(asked.tolist(), taken[batch.labels != IGNORE].tolist(), strict=True)
        sums += torch.tensor([nats, len(asked), int(token_bytes[asked.cpu()].sum())], dtype=torch.float64)
    sums = sums.to(batches[0].labels.device)
    dist.all_reduce(sums)
    model.train()
    return float(sums[0]), int(sums[1]), int(sums[2])
