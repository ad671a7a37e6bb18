"""Rows to tensors, cut into micro-batches: made at the last moment, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sevenfold.data.rows import IGNORE, Rows, labels, positions

__all__ = ["IGNORE", "Batch", "micro_batches", "to_batch"]


@dataclass
class Batch:
    """A micro-batch; int64 [rows, sequence]. `labels` are the next tokens, IGNORE where none is asked for;
    `position_ids` begin anew at each document, which is what keeps packed documents apart. `cu_seqlens`: int32
    [documents + 1], where documents begin in the rows laid end to end, and the end of all (what varlen kernels take)."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor


def to_batch(rows: Rows, device: torch.device) -> Batch:
    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    made = rows.tokens.astype(np.int64), positions(rows), labels(rows), rows.edges.astype(np.int32)
    return Batch(*map(tensor, made))


def micro_batches(rows: Rows, micro_batch: int, count: int, device: torch.device) -> list[Batch]:
    """Cuts a rank's rows of a step into exactly `count` micro-batches; where rows are too few, rows without a
    target fill up, since every rank must run as many forward passes."""
    missing = count * micro_batch - len(rows)
    if missing < 0:
        raise ValueError(f"{len(rows)} rows do not fit into {count} micro-batches of {micro_batch}")
    if missing:
        rows = Rows.concatenate([rows, Rows.empty(missing, rows.tokens.shape[1], rows.tokens.dtype)])
    return [to_batch(rows.part(i * micro_batch, (i + 1) * micro_batch), device) for i in range(count)]
