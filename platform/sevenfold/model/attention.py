"""Attention on a CPU in chunks of queries.

It skips the keys that no query of a chunk attends to. FlexAttention's block mask does the same on a
GPU; FlexAttention has no backward pass on a CPU (torch 2.13).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_chunks"  # as transformers' attn_implementation
CHUNK = 128  # queries; 64 and 256 were not faster (benchmarks/RESULTS.md)


def in_chunks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes the same as transformers' SDPA attention, in chunks of CHUNK queries.

    Args:
        module: The attention layer.
        query: [rows, heads, queries, head size].
        key: [rows, heads, keys, head size].
        value: [rows, heads, keys, head size].
        attention_mask: bool [rows, 1, queries, keys]. Without a boolean mask all queries are
            computed at once.
        position_bias: Computed at once too, if given.
        **kwargs: Passed on to SDPA attention.

    Returns:
        The output [rows, queries, heads, head size], and None in place of attention weights.
    """
    sdpa = partial(sdpa_attention_forward, module)
    mask = attention_mask
    if (
        mask is None
        or mask.dtype != torch.bool
        or position_bias is not None
        or query.shape[2] <= CHUNK
    ):
        return sdpa(query, key, value, mask, position_bias=position_bias, **kwargs)
    outputs = []
    for start in range(0, query.shape[2], CHUNK):
        queries = slice(start, start + CHUNK)
        used_keys = mask[:, :, queries].any(dim=(0, 1, 2)).nonzero()
        keys = slice(int(used_keys[0]), int(used_keys[-1]) + 1) if len(used_keys) else slice(None)
        output, _ = sdpa(
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            mask[:, :, queries, keys],
            **kwargs,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, in_chunks)
AttentionMaskInterface.register(NAME, partial(sdpa_mask, allow_is_causal_skip=False))
