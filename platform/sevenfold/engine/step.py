"""One training step, and the forward pass of a validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.errors import RunError


class NoTargets(RunError):
    """A step without a single target token, on any rank."""


@dataclass
class Step:
    """Of all ranks together: loss in nats a target token, number of target tokens, norm of the gradient before
    clipping; `applied` is False where the gradient was not finite and no weight was changed."""

    loss: float
    targets: int
    grad_norm: float
    applied: bool


def token_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """-log p of each label, nats, 0 where there is none: float32 [rows, sequence]."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(batch.labels)


def train_step(
    model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float
) -> Step:
    """The loss is the mean over the target tokens of all micro-batches of all ranks: how they are dealt out does
    not show in it. Raises NoTargets where there is no target token at all."""
    world = dist.get_world_size()
    device = batches[0].labels.device
    targets = torch.stack([(b.labels != IGNORE).sum() for b in batches]).sum()
    dist.all_reduce(targets)
    count = int(targets)
    if not count:
        raise NoTargets("a step without a single target token: the documents are empty, or every one of them is masked")

    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)  # type: ignore[operator]
        loss = token_losses(model, batch).sum()
        (loss * (world / count)).backward()  # FSDP takes the mean over ranks: times world makes it the sum
        total += loss.detach()
    dist.all_reduce(total)

    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    applied = bool(torch.isfinite(norm) & torch.isfinite(total))
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()
    return Step(float(total) / count, count, float(norm), applied)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], token_bytes: torch.Tensor) -> tuple[float, int, int]:
    """(sum of -log p in nats, target tokens, bytes of text that these stand for) of all ranks together.

    Every rank must bring as many batches. `token_bytes`: int64 [vocabulary].
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        asked = batch.labels[batch.labels != IGNORE]
        sums += torch.tensor(
            [float(token_losses(model, batch).sum()), len(asked), int(token_bytes[asked.cpu()].sum())], dtype=torch.float64
        )
    sums = sums.to(batches[0].labels.device)
    dist.all_reduce(sums)
    model.train()
    return float(sums[0]), int(sums[1]), int(sums[2])
