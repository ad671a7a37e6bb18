"""The base class of all objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import Batch, to_batch
from sevenfold.engine.objectives.special_tokens import SpecialTokens
from sevenfold.engine.objectives.unpack import unpacked
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
        support: What the model supports.
    """

    has_predictions = False
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

    def _generator(self, tokens: np.ndarray, step: int) -> np.random.Generator:
        """Returns the random generator for a row's tokens."""
        return np.random.default_rng([self.seed, step, xxh3_64_intdigest(tokens.data)])
