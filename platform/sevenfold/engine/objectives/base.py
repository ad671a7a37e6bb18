"""The base class of all objectives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import Batch, micro_batches, to_batch
from sevenfold.engine.objectives.special_tokens import SpecialTokens
from sevenfold.engine.objectives.unpack import divided, unpacked
from sevenfold.engine.positions import position_offset


@dataclass(frozen=True)
class Scoring:
    """The functions that compute losses from a model's logits.

    Losses are -log p of a label in nats; 0 where the label is IGNORE.

    Attributes:
        per_token: (model, batch, labels [rows, length]) -> losses [rows, length].
        cross_entropy: (logits [n, classes], labels [n]) -> losses [n].
    """

    per_token: Callable[[Any, Batch, torch.Tensor], torch.Tensor]
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Support:
    """What a model supports; see `model.probe`.

    Attributes:
        packing: Whether the documents of a packed row are trained on as if each were alone. If not,
            each document becomes a padded row.
        chunked_logits: Whether the output layer can be applied to a part of the tokens at a time.
    """

    packing: bool = True
    chunked_logits: bool = True


class Objective:
    """Next-token prediction, and the base class of the other objectives.

    Which tokens are targets comes with the rows.

    Args:
        special_tokens: The tokenizer's special tokens.
        seed: The seed of the random draws.
        rate: The fraction of tokens that is masked or removed (masked, denoise).
        mean_span: The mean length of a removed span, in tokens (denoise).

    Attributes:
        has_predictions: Whether `losses` also returns predictions.
        compares_rows: Whether the loss of a row depends on the other rows of its step.
        support: What the model supports.
    """

    has_predictions = False
    compares_rows = False
    support = Support()

    def __init__(self, special_tokens: SpecialTokens, seed: int, rate: float, mean_span: float):
        self.special_tokens, self.seed, self.rate, self.mean_span = (
            special_tokens,
            seed,
            rate,
            mean_span,
        )

    def collate(self, rows: Rows, step: int) -> Batch:
        """Builds the batch of some rows.

        Args:
            rows: The rows of one micro-batch.
            step: The step's number, from 0; random draws depend on it.
        """
        batch = self._packed_batch(rows, step)
        return batch if self.support.packing else unpacked(batch, self.special_tokens.pad)

    def _packed_batch(self, rows: Rows, step: int) -> Batch:
        """Builds the batch of packed rows; see `collate`."""
        return to_batch(rows)

    def batches(
        self, rows: Rows, step: int, micro_batch: int, max_rows: int, device: torch.device
    ) -> list[Batch]:
        """Cuts this rank's rows of a step into micro-batches, as many as on every other rank.

        If the model does not support packing, a micro-batch has documents instead of rows, and at
        most as many tokens, padding included, as `micro_batch` rows.

        Args:
            rows: The rows of this rank.
            step: See `collate`.
            micro_batch: The number of rows per micro-batch.
            max_rows: The largest number of rows that any rank has.
            device: The device that the batches are moved to.
        """
        if not self.support.packing:
            documents = unpacked(self._packed_batch(rows, step), self.special_tokens.pad)
            parts = divided(documents, micro_batch * rows.tokens.shape[1], device)
            return [part.to(device) for part in parts]
        collate = functools.partial(self.collate, step=step)
        return micro_batches(rows, micro_batch, -(-max_rows // micro_batch), collate, device)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Runs the model on a batch and returns its logits."""
        context: dict[str, torch.Tensor]
        if batch.attention_mask is None:
            context = {"position_ids": batch.position_ids + position_offset(model)}
        else:
            context = {"attention_mask": batch.attention_mask.long()}
        output = model.forward(input_ids=batch.input_ids, use_cache=False, **context)
        logits: torch.Tensor = output.logits
        return logits

    def losses(
        self, model: Any, batch: Batch, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the losses of a batch.

        Returns:
            The loss of each label; and the predictions (int64) if the objective `has_predictions`,
            else None. Both have the shape of the labels.
        """
        return scoring.per_token(model, batch, batch.labels), None

    def backward(
        self, model: Any, batches: Sequence[Batch], scale: float | torch.Tensor, tensor: int
    ) -> torch.Tensor:
        """Accumulates the gradient of `scale` times the loss of all ranks' micro-batches of a step.

        Ranks exchange gradients once a step, in the last backward pass.

        Args:
            model: Sharded with FSDP over all ranks; has the method `token_losses`.
            batches: This rank's micro-batches, from `batches`.
            scale: The loss is the sum of all labels' losses times this number.
            tensor: The number of tensor-parallel ranks.

        Returns:
            The sum of this rank's losses, without the scale.
        """
        loss_sum = torch.zeros((), device=batches[0].labels.device)
        for i, batch in enumerate(batches):
            model.set_requires_gradient_sync(i == len(batches) - 1)
            loss = model.token_losses(batch).sum()
            (loss * scale).backward()
            loss_sum += loss.detach()
        return loss_sum

    def scores(
        self, model: Any, batches: Sequence[Batch], tensor: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yields what `losses` returns for each micro-batch of a step; called without gradients.

        Args:
            model: See `backward`.
            batches: See `backward`.
            tensor: See `backward`.
        """
        for batch in batches:
            yield model.token_losses(batch, with_predictions=True)

    def _generator(self, tokens: np.ndarray, step: int) -> np.random.Generator:
        """Returns the random generator for a row's tokens."""
        return np.random.default_rng([self.seed, step, xxh3_64_intdigest(tokens.data)])
