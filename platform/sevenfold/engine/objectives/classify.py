"""Sequence classification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives.base import Objective, Scoring
from sevenfold.engine.objectives.layout import documents_of
from sevenfold.engine.objectives.padding import padded_batch


class Classify(Objective):
    """Predicts one class per document, with transformers' classification head.

    Each row of a batch is one document. The last token of a document in the data is its class.
    """

    has_predictions = True

    def collate(self, rows: Rows, step: int) -> Batch:
        """Builds a batch of padded documents; labels are class indices [documents]."""
        documents = [ids for row in documents_of(rows) for ids, _ in row]
        batch = padded_batch([ids[:-1] for ids in documents], self.special_tokens.pad)
        labels = torch.tensor([int(ids[-1]) for ids in documents] or [IGNORE])
        return replace(batch, labels=labels)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Runs the model on a batch and returns the logits of the classes."""
        assert batch.attention_mask is not None
        output = model.forward(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()
        )
        logits: torch.Tensor = output.logits
        return logits

    def losses(
        self, model: Any, batch: Batch, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the loss and the predicted class of each document."""
        logits = self.logits(model, batch)
        return scoring.cross_entropy(logits, batch.labels), logits.argmax(-1)
