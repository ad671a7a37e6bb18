"""Per-token losses, attached to a model as a method that FSDP can wrap."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives.base import Objective, Scoring

# The number of logits computed at once on a CPU, and kept for the backward pass: a block of this
# size stays in the CPU's caches and in the process's heap.
CPU_LOGITS = 2**22


def attach_losses(
    model: Any,
    objective: Objective,
    chunk: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    cpu_logits: int | None = CPU_LOGITS,
) -> Callable[..., Any]:
    """Adds the method `token_losses(batch)` to a model and returns it; sets `model.objective`.

    The method returns -log p of each label in nats, float32, 0 where the label is IGNORE. With
    `with_predictions=True` it returns both values of `Objective.losses`. It is the model's method
    so that FSDP gathers the parameters of the root module when it is called.

    Args:
        model: The model; for objectives that predict tokens it has an output layer.
        objective: Computes the losses. If its `support` says that the model does not support
            logits in chunks, they are always computed at once.
        chunk: The logits are computed for this number of tokens at a time, and recomputed in the
            backward pass, which saves memory. None: all at once.
        z_loss: The weight of log(sum(exp(logits)))^2. It is added to the gradient only, not to the
            returned loss.
        label_smoothing: This fraction of each target is spread over all tokens; also in the
            gradient only.
        cpu_logits: On a CPU and without `chunk`, this number of logits is computed at a time and
            kept for the backward pass, which is faster. None: all at once, as on a GPU.
    """
    if not objective.support.chunked_logits:
        chunk = cpu_logits = None
    cross_entropy = functools.partial(
        cross_entropy_losses, z_loss=z_loss, label_smoothing=label_smoothing
    )

    def per_token(self: Any, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
        head = self.get_output_embeddings()
        flat_labels = labels.flatten()
        size = chunk
        if cpu_logits and not chunk and batch.labels.device.type == "cpu":
            size = max(1, cpu_logits // head.weight.shape[0])
        if size is None:
            losses = cross_entropy(objective.logits(self, batch).flatten(0, 1), flat_labels)
        else:
            with _skipped_head(head):
                hidden = objective.logits(self, batch).flatten(0, 1)
            losses = _losses_in_chunks(
                head, hidden, flat_labels, size, cross_entropy, recompute=bool(chunk)
            )
        return losses.view_as(labels).clone()  # FSDP warns about views

    scoring = Scoring(per_token, cross_entropy)

    def token_losses(self: Any, batch: Batch, with_predictions: bool = False) -> Any:
        losses, predictions = objective.losses(self, batch, scoring)
        return (losses, predictions) if with_predictions else losses

    bound: Callable[..., Any] = MethodType(token_losses, model)
    model.token_losses = bound
    model.objective = objective
    return bound


def _losses_in_chunks(
    head: Any,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    size: int,
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    recompute: bool,
) -> torch.Tensor:
    """Computes logits and losses for `size` tokens at a time.

    Args:
        head: The output layer.
        hidden: Its input: [tokens, hidden size].
        labels: int64 [tokens].
        size: The number of tokens per chunk.
        cross_entropy: See `Scoring`.
        recompute: Whether logits are recomputed in the backward pass, and not kept for it.
    """

    def chunk_losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(hidden), labels)

    compute: Callable[..., torch.Tensor] = chunk_losses
    if recompute:
        compute = functools.partial(checkpoint, chunk_losses, use_reentrant=False)
    chunks = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.cat([compute(*chunk) for chunk in chunks])


def cross_entropy_losses(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float, label_smoothing: float
) -> torch.Tensor:
    """Returns -log p of each label in nats, 0 where it is IGNORE: float32 [n].

    Args:
        logits: [n, classes].
        labels: int64 [n].
        z_loss: See `attach_losses`.
        label_smoothing: See `attach_losses`.
    """
    logits = logits.float()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if label_smoothing and torch.is_grad_enabled():
        smooth = F.cross_entropy(
            logits, labels, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing
        )
        losses = losses.detach() + (smooth - smooth.detach())  # adds 0, with the smooth gradient
    if z_loss:
        z = z_loss * logits.logsumexp(-1).square() * (labels != IGNORE)
        losses = losses + (z - z.detach())  # adds 0, with z's gradient
    return losses


@contextlib.contextmanager
def _skipped_head(head: nn.Module) -> Iterator[None]:
    """Makes a model return the input of its output layer in place of logits.

    Whatever else the model does before and after that layer stays as it is.
    """
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
