"""Contrastive training of text embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives.base import Objective, Scoring
from sevenfold.engine.objectives.layout import documents_of
from sevenfold.engine.objectives.padding import padded_batch


class Contrastive(Objective):
    """InfoNCE with in-batch negatives (arXiv 1807.03748).

    Each query has to select its own document among the documents of the micro-batch, by the cosine
    similarity of mean-pooled hidden states (as in arXiv 1908.10084). Documents with the same tokens
    as the right one, and other documents of the same query, are not used as negatives.

    The rows of a batch are the queries, followed by the documents. A label is the index of a
    query's document in the micro-batch.

    Attributes:
        temperature: Cosine similarities are divided by it; see the recipe's `contrastive`.
    """

    has_predictions = True
    temperature = 0.05

    def collate(self, rows: Rows, step: int) -> Batch:
        """Builds a batch of padded queries and documents: 2 * pairs rows."""
        pairs = [
            (ids[~is_target], ids[is_target])
            for row in documents_of(rows)
            for ids, is_target in row
        ]
        if not pairs:
            empty = np.zeros(0, np.int64)
            batch = padded_batch([empty, empty], self.special_tokens.pad)
            return replace(batch, labels=torch.tensor([IGNORE]))
        queries = [query for query, _ in pairs]
        documents = [document for _, document in pairs]
        batch = padded_batch(queries + documents, self.special_tokens.pad)
        return replace(batch, labels=torch.arange(len(pairs)))

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the scaled similarity of each query to each document: [queries, documents]."""
        assert batch.attention_mask is not None
        states = model.forward(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state.float()
        mask = batch.attention_mask[:, :, None]
        embeddings = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        queries, documents = embeddings.chunk(2)
        same_query, same_document = (
            (ids[:, None] == ids[None]).all(-1) for ids in batch.input_ids.chunk(2)
        )
        own = torch.eye(len(same_document), dtype=torch.bool, device=same_document.device)
        excluded = (same_query | same_document) & ~own
        return (queries @ documents.T / self.temperature).masked_fill(excluded, float("-inf"))

    def losses(
        self, model: Any, batch: Batch, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the loss and the selected document of each query."""
        logits = self.logits(model, batch)
        losses = F.cross_entropy(logits, batch.labels, ignore_index=IGNORE, reduction="none")
        return losses, logits.argmax(-1)
