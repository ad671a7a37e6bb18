"""Masked language modeling, as in BERT."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch, to_batch
from sevenfold.engine.objectives import masking
from sevenfold.engine.objectives.base import Objective
from sevenfold.engine.objectives.layout import same_document
from sevenfold.engine.positions import position_offset


class Masked(Objective):
    """Masked language modeling: predicts masked tokens from both sides.

    Packed documents are kept apart: each token attends to its own document only.
    """

    def _packed_batch(self, rows: Rows, step: int) -> Batch:
        """Builds a batch in which random tokens are masked; these are its labels."""
        batch = to_batch(rows)
        assert self.special_tokens.mask is not None
        input_ids = batch.input_ids.numpy()
        labels = np.full(batch.labels.shape, IGNORE, np.int64)
        for i, tokens in enumerate(rows.tokens):
            maskable = ~np.isin(tokens, self.special_tokens.special)
            maskable[int(rows.used[i]) :] = False
            ids = input_ids[i]
            masked_ids, selected = masking.mask_tokens(
                self._generator(tokens, step),
                ids,
                maskable,
                self.rate,
                self.special_tokens.mask,
                self.special_tokens.vocab_size,
            )
            labels[i, selected] = ids[selected]
            input_ids[i] = masked_ids  # shares its memory with batch.input_ids
        return Batch(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=torch.from_numpy(labels),
            cu_seqlens=batch.cu_seqlens,
        )

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Runs the model on a batch and returns its logits."""
        if batch.attention_mask is not None:
            return super().logits(model, batch)
        output = model.forward(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids + position_offset(model),
            attention_mask=_attention_mask(model, batch),
        )
        logits: torch.Tensor = output.logits
        return logits


def _attention_mask(model: Any, batch: Batch) -> torch.Tensor | dict[str, torch.Tensor]:
    """Returns the mask that keeps packed documents apart, or one for each kind of layer.

    ModernBERT and its kin have layers in which a token attends to its neighbors only. They compute
    that mask themselves unless they are given one.
    """
    mask = same_document(batch.documents, batch.documents)
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return mask
    places = torch.arange(mask.shape[-1], device=mask.device)
    is_near = (places[:, None] - places).abs() <= model.config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask & is_near}
