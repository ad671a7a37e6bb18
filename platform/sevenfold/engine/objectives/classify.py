"""Sequence classification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import Batch
from sevenfold.engine.objectives.base import Scoring
from sevenfold.engine.objectives.layout import documents_of
from sevenfold.engine.objectives.padding import Padded, Texts


class Classify(Padded):
    """Predicts one class per document, with transformers' classification head.

    Each row of a batch is one document. The last token of a document in the data is its class.
    """

    has_predictions = True

    def texts(self, rows: Rows) -> Texts:
        """Returns the documents; labels are class indices."""
        documents = [ids for row in documents_of(rows) for ids, _ in row]
        labels = np.array([ids[-1] for ids in documents], np.int64)
        return Texts([ids[:-1] for ids in documents], labels)

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
