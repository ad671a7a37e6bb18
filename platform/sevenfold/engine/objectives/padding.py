"""Batches of padded documents, one per row."""

from __future__ import annotations

import numpy as np
import torch

from sevenfold.engine.batch import IGNORE, Batch


def padded_batch(texts: list[np.ndarray], pad: int) -> Batch:
    """Builds a batch of one text per row, padded on the right, without labels.

    Without any text the batch is one row of padding.

    Args:
        texts: The token ids of each text.
        pad: The padding token.
    """
    texts = texts or [np.zeros(0, np.int64)]
    width = max(1, *map(len, texts))
    ids = np.full((len(texts), width), pad, np.int64)
    mask = np.zeros((len(texts), width), bool)
    mask[:, 0] = True  # even of an empty text: a softmax over nothing would be 0/0
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
        mask[i, : len(text)] = True
    input_ids = torch.from_numpy(ids)
    return Batch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(texts), -1).contiguous(),
        labels=torch.full_like(input_ids, IGNORE),
        cu_seqlens=torch.arange(0, ids.size + 1, width, dtype=torch.int32),
        attention_mask=torch.from_numpy(mask),
    )
