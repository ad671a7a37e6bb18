"""Rows to tensors, cut into micro-batches: made at the last moment, on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from sevenfold.data.rows import IGNORE, Rows, labels, positions

__all__ = ["IGNORE", "Batch", "Decoder", "micro_batches", "to_batch"]


@dataclass
class Decoder:
    """What the decoder of an encoder-decoder reads; int64 [rows, length]. `documents` numbers the documents of a row as
    the encoder's side does; -1 where padded."""

    input_ids: torch.Tensor
    documents: torch.Tensor


@dataclass
class Batch:
    """A micro-batch; int64 [rows, sequence]. `labels` are what is to be predicted (the decoder's length where there is one),
    IGNORE where nothing is asked for; `position_ids` begin anew at each document, which is what keeps packed documents apart.
    `cu_seqlens`: int32 [documents + 1], where documents begin in the rows laid end to end, and the end of all (what varlen
    kernels take). What only some objectives have:

    Attributes:
        decoder: of an encoder-decoder.
        attention_mask: bool [rows, sequence], where rows are padded documents and not packed ones.
        segments: int64 [rows, sequence], the number of the answer that a token belongs to, -1 where to none.
        targets: what labels are elsewhere, where labels are those of pairs: int64 [rows, sequence].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    decoder: Decoder | None = None
    attention_mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    targets: torch.Tensor | None = None

    @property
    def documents(self) -> torch.Tensor:
        """The number of its document in the row, from 0: int64 [rows, sequence]."""
        return (self.position_ids == 0).cumsum(1) - 1

    def to(self, device: torch.device) -> Batch:
        def moved(part: Batch | Decoder) -> dict[str, torch.Tensor]:
            tensors = {f.name: getattr(part, f.name) for f in fields(part) if f.name != "decoder"}
            return {k: t.to(device, non_blocking=True) for k, t in tensors.items() if t is not None}

        return Batch(**moved(self), decoder=Decoder(**moved(self.decoder)) if self.decoder else None)


def to_batch(rows: Rows) -> Batch:
    """To predict each next token of a document."""
    ids, edges = torch.from_numpy(rows.tokens.astype(np.int64)), torch.from_numpy(rows.edges.astype(np.int32))
    return Batch(ids, torch.from_numpy(positions(rows)), torch.from_numpy(labels(rows)), edges)


def micro_batches(
    rows: Rows, micro_batch: int, count: int, collate: Callable[[Rows], Batch], device: torch.device
) -> list[Batch]:
    """Cuts a rank's rows of a step into exactly `count` micro-batches; where rows are too few, rows without a
    target fill up, since every rank must run as many forward passes."""
    missing = count * micro_batch - len(rows)
    if missing < 0:
        raise ValueError(f"{len(rows)} rows do not fit into {count} micro-batches of {micro_batch}")
    if missing:
        rows = Rows.concatenate([rows, Rows.empty(missing, rows.tokens.shape[1], rows.tokens.dtype)])
    return [collate(rows.part(i * micro_batch, (i + 1) * micro_batch)).to(device) for i in range(count)]
