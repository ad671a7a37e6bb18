"""One training step, and the loss of batches for validation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.signals import Signal
from sevenfold.errors import RunError


class NoTargetsError(RunError):
    """Raised when the batches of a step hold no target token on any rank."""


@dataclass
class StepResult:
    """The result of one training step; every value is that of all ranks together.

    Attributes:
        loss: The mean loss per target token, in nats.
        targets: The number of target tokens.
        grad_norm: The norm of the gradient before clipping.
        applied: False if loss or gradient were not finite, or the gradient's norm was above the
            limit. Then no weight was changed.
        signal: The request that one of the ranks passed in, or Signal.NONE.
    """

    loss: float
    targets: int
    grad_norm: float
    applied: bool
    signal: Signal


def train_step(
    model: Any,
    batches: Sequence[Batch],
    optimizers: Sequence[torch.optim.Optimizer],
    learning_rate: float,
    max_grad_norm: float,
    *,
    tensor: int = 1,
    skip_above_norm: float = float("inf"),
    signal: Signal = Signal.NONE,
) -> StepResult:
    """Runs forward and backward over the micro-batches of all ranks, then updates the weights.

    The loss is the mean over the target tokens of all micro-batches of all ranks. It therefore does
    not depend on how the rows are distributed over ranks and micro-batches.

    Args:
        model: Sharded with FSDP over all ranks; has an objective (see objectives.attach_losses).
        batches: This rank's micro-batches of the step (see Objective.batches). Every rank passes
            the same number of them.
        optimizers: The optimizers of all trainable parameters.
        learning_rate: The learning rate of this step.
        max_grad_norm: The gradient is scaled down to this norm.
        tensor: The number of tensor-parallel ranks. That many neighboring ranks hold the same rows.
        skip_above_norm: A gradient with a larger norm is treated as one that is not finite.
        signal: The request that this rank has received. Only one rank may pass another value than
            NONE; it reaches every rank along with the number of targets.

    Raises:
        NoTargetsError: No rank has a target token.
    """
    data_parallel_size = dist.get_world_size() // tensor
    targets, received_signal = _reduce_targets(batches, tensor, signal)
    # FSDP averages gradients over the data-parallel ranks; times their number it is the sum
    loss_sum = model.objective.backward(model, batches, data_parallel_size / targets, tensor)
    dist.all_reduce(loss_sum)
    loss_sum /= tensor
    grad_norm = clip_grad_norm(model.parameters(), max_grad_norm)

    # one transfer for all four values: the only place where the host waits for the device
    total_loss, target_count, norm, signal_value = torch.stack(
        [value.double() for value in (loss_sum, targets, grad_norm, received_signal)]
    ).tolist()
    if not target_count:
        raise NoTargetsError(
            "expected at least one target token in a step, found none: "
            "every document is empty or fully masked"
        )
    applied = math.isfinite(total_loss + norm) and norm <= skip_above_norm
    _update_weights(optimizers, learning_rate, applied)
    return StepResult(
        loss=total_loss / target_count,
        targets=int(target_count),
        grad_norm=norm,
        applied=applied,
        signal=Signal(int(signal_value)),
    )


def _reduce_targets(
    batches: Sequence[Batch], tensor: int, signal: Signal
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the number of target tokens and the signal over all ranks, in one all-reduce.

    Returns:
        The number of distinct target tokens, and the signal's value; both float32 scalars.
    """
    device = batches[0].labels.device
    # the leading zero makes the sum float32, which the signal can be stacked with
    counts = [torch.zeros((), device=device), *((b.labels != IGNORE).sum() for b in batches)]
    local_targets = torch.stack(counts).sum()
    totals = torch.stack([local_targets, torch.full((), float(signal), device=device)])
    dist.all_reduce(totals)
    # each row was counted by all of its tensor-parallel ranks, the signal was sent by one rank
    return totals[0] // tensor, totals[1]


def _update_weights(
    optimizers: Sequence[torch.optim.Optimizer], learning_rate: float, applied: bool
) -> None:
    """Steps the optimizers if the gradient is to be applied, and zeroes it in any case."""
    for optimizer in optimizers:
        if applied:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        optimizer.zero_grad()


def clip_grad_norm(parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
    """Scales the gradients down so that the norm of all of them together is at most `most`.

    torch's clip_grad_norm_ accepts parameters of one device mesh only. With tensor parallelism some
    parameters lie on a mesh of two dimensions and others on one of a single dimension.

    Returns:
        The norm before scaling.
    """
    by_mesh: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            by_mesh[getattr(p.grad, "device_mesh", None)].append(p.grad)
    norms = [nn.utils.get_total_norm(grads) for grads in by_mesh.values()]
    norm = torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).norm()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)  # the same epsilon as clip_grad_norm_
    for grads in by_mesh.values():
        torch._foreach_mul_([g.to_local() if hasattr(g, "to_local") else g for g in grads], factor)
    return norm


@torch.no_grad()
def evaluate(
    model: Any,
    batches: Sequence[Batch],
    token_bytes: torch.Tensor,
    pairs: list[tuple[int, int]] | None = None,
    *,
    tensor: int = 1,
    between: Callable[[], None] = lambda: None,
) -> tuple[float, int, int]:
    """Computes the loss of the batches of all ranks, in evaluation mode.

    Args:
        model: Sharded with FSDP over all ranks; has an objective (see objectives.attach_losses). It
            is left in training mode.
        batches: This rank's micro-batches, as those of a training step: the loss of objective embed
            compares texts within all of them.
        token_bytes: The number of bytes of text that each token stands for: int64 [vocabulary].
        pairs: If given, the (label, prediction) of each of this rank's targets is appended. Only
            for an objective that makes predictions (`Objective.has_predictions`).
        tensor: The number of tensor-parallel ranks.
        between: Called after each micro-batch, on every rank.

    Returns:
        The sum of -log p in nats, the number of target tokens, and the number of bytes of text that
        these tokens stand for; each summed over all ranks.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    scores = model.objective.scores(model, batches, tensor)
    for batch, (losses, predictions) in zip(batches, scores, strict=True):
        is_target = batch.labels != IGNORE
        labels = batch.labels[is_target]
        nats = float(losses.sum())
        if pairs is not None:
            pairs += zip(labels.tolist(), predictions[is_target].tolist(), strict=True)
        text_bytes = int(token_bytes[labels.cpu()].sum())
        sums += torch.tensor([nats, len(labels), text_bytes], dtype=torch.float64)
        between()
    sums = sums.to(batches[0].labels.device)
    dist.all_reduce(sums)
    model.train()
    return float(sums[0]), int(sums[1]), int(sums[2])
