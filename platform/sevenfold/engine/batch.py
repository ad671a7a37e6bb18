"""Rows to tensors, cut into micro-batches: made at the last moment, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sevenfold.data.rows import START, Rows, labels, positions

IGNORE = -100


@dataclass
class Batch:
    """A micro-batch; all int64 [rows, sequence]. `labels` are the next tokens, IGNORE where none is asked for;
    `position_ids` begin anew at each document, which is what keeps packed documents apart."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor


def micro_batches(rows: Rows, micro_batch: int, count: int, device: torch.device) -> list[Batch]:
    """Cuts a rank's rows of a step into exactly `count` micro-batches; where rows are too few, rows without a
    target fill up, since every rank must run as many forward passes."""
    missing = count * micro_batch - len(rows)
    if missing < 0:
        raise ValueError(f"{len(rows)} rows do not fit into {count} micro-batches of {micro_batch}")
    if missing:
        marks = np.zeros((missing, rows.marks.shape[1]), np.uint8)
        marks[:, 0] = START
        rows = Rows.concatenate([rows, Rows(np.zeros(marks.shape, rows.tokens.dtype), marks)])

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)

    parts = [rows[slice(i * micro_batch, (i + 1) * micro_batch)] for i in range(count)]
    return [Batch(tensor(p.tokens), tensor(positions(p.marks)), tensor(labels(p, IGNORE))) for p in parts]
