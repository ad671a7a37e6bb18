"""Preference optimization: DPO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch, to_batch
from sevenfold.engine.objectives.base import Objective, Scoring
from sevenfold.engine.objectives.causal import Causal
from sevenfold.engine.objectives.layout import documents_of


class Preference(Objective):
    """DPO (arXiv 2305.18290): makes chosen answers likelier than rejected ones.

    Likelihoods are relative to those of a reference model, which is the model at the start of
    training. A document of the data holds a pair: prompt and chosen answer, then prompt and
    rejected answer. The batch has one label per pair, which is 0: the chosen answer is the right
    one.

    Attributes:
        reference: The frozen reference model, sharded as the model is. None: the reference is the
            model without its adapter.
        beta: See the recipe's `preference`.
    """

    has_predictions = True
    reference: Any = None
    beta = 0.1

    def _packed_batch(self, rows: Rows, step: int) -> Batch:
        """Builds a batch in which the two halves of each pair are documents of their own."""
        width = rows.tokens.shape[1]
        second_starts: list[int] = []  # where second halves start in the concatenated rows
        segments = np.full(rows.tokens.shape, -1, np.int64)
        pairs = 0
        for i, row in enumerate(documents_of(rows)):
            start = 0
            for ids, is_target in row:
                # the chosen answer ends where the targets first do
                first_length = int(np.flatnonzero(is_target[:-1] & ~is_target[1:])[0]) + 1
                middle, stop = start + first_length, start + len(ids)
                segments[i, start:middle] = 2 * pairs
                segments[i, middle:stop] = 2 * pairs + 1
                second_starts.append(i * width + middle)
                start = stop
                pairs += 1
        edges = np.union1d(rows.edges, second_starts).astype(np.int64)
        starts = (edges[:-1] % width).astype(np.int32)
        batch = to_batch(Rows(rows.tokens, starts, rows.used, rows.targets))
        labels = torch.full((max(1, pairs),), 0 if pairs else IGNORE)
        return replace(
            batch, labels=labels, segments=torch.from_numpy(segments), targets=batch.labels
        )

    def reference_objective(self) -> Causal:
        """Returns the objective by which a reference model computes the losses of tokens."""
        causal = Causal(self.special_tokens, self.seed, self.rate, self.mean_span)
        causal.support = self.support
        return causal

    def losses(
        self, model: Any, batch: Batch, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the loss of each pair, and the preferred answer: 0 is the chosen one."""
        assert batch.targets is not None
        policy_losses = scoring.per_token(model, batch, batch.targets)
        policy = self._log_likelihoods(policy_losses, batch)
        with torch.no_grad():
            if self.reference is not None:
                reference_losses = self.reference.token_losses(replace(batch, labels=batch.targets))
            else:
                with _without_adapter(model):
                    reference_losses = scoring.per_token(model, batch, batch.targets)
        reference = self._log_likelihoods(reference_losses, batch)
        margins = preference_margins(policy, reference, self.beta)
        return -F.logsigmoid(margins) * (batch.labels != IGNORE), (margins <= 0).long()

    def _log_likelihoods(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sums the losses of tokens to log p of the answers: [pairs, 2], chosen and rejected."""
        assert batch.segments is not None
        sums = losses.new_zeros(2 * len(batch.labels))
        segments = batch.segments.flatten()
        token_losses = losses.flatten() * (segments >= 0)
        return -sums.index_add(0, segments.clamp(min=0), token_losses).view(-1, 2)


def preference_margins(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the margin of each pair: DPO's loss is its -log sigmoid (arXiv 2305.18290, eq. 7).

    Args:
        policy: log p of the chosen and the rejected answer: [pairs, 2].
        reference: The same of the reference model.
        beta: See the recipe's `preference`.
    """
    gains = policy - reference
    return beta * (gains[:, 0] - gains[:, 1])


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """Disables the model's adapter and dropout, which makes it the model at the start of training.

    It does not call peft's enable_adapters(), which also changes requires_grad: FSDP tracks that.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    training = model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)
