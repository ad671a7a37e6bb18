"""Attention on a CPU that leaves out what no query of a chunk may look at, as FlexAttention's block mask does on a GPU (it
has no backward on a CPU, torch 2.13)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_chunks"
CHUNK = 128  # queries: 64 and 256 were no quicker (benchmarks/RESULTS.md)


def in_chunks(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, position_bias: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As transformers' sdpa, for query [rows, heads, length, size] and attention_mask bool [rows, 1, length, keys]."""
    whole = partial(sdpa_attention_forward, module)
    mask = attention_mask
    if mask is None or mask.dtype != torch.bool or position_bias is not None or query.shape[2] <= CHUNK:
        return whole(query, key, value, mask, position_bias=position_bias, **kwargs)
    parts = []
    for begin in range(0, query.shape[2], CHUNK):
        asking = slice(begin, begin + CHUNK)
        seen = mask[:, :, asking].any(dim=(0, 1, 2)).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(None)
        part, _ = whole(query[:, :, asking], key[:, :, keys], value[:, :, keys], mask[:, :, asking, keys], **kwargs)
        parts.append(part)
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, in_chunks)
AttentionMaskInterface.register(NAME, partial(sdpa_mask, allow_is_causal_skip=False))
