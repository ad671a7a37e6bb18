"""Divides padded texts into micro-batches of a limited size, as many on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist


def bounded_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Divides texts into padded batches of at most `max_tokens` tokens, padding included.

    Texts of about the same length share a batch, so that there is little padding.

    Args:
        lengths: The length of each text, at most `max_tokens`.
        max_tokens: The maximum size of a batch: its number of texts times the longest one's length.

    Returns:
        The indices of the texts of each batch, the longest texts first.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    while by_length:
        size = max(1, max_tokens // max(1, lengths[by_length[0]]))
        batches.append(by_length[:size])
        by_length = by_length[size:]
    return batches


def largest_on_any_rank(device: torch.device, *numbers: int) -> list[int]:
    """Returns the largest value of each number that any rank passes."""
    largest = torch.tensor(numbers, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    result: list[int] = largest.tolist()
    return result
