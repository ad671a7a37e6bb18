"""Converts packed rows to tensors and cuts them into micro-batches on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from sevenfold.data.rows import IGNORE, Rows, labels, positions

__all__ = ["IGNORE", "Batch", "Decoder", "micro_batches", "to_batch"]


@dataclass
class Decoder:
    """The input of the decoder of an encoder-decoder.

    Attributes:
        input_ids: int64 [rows, decoder length].
        documents: The index of each token's document in its row, the same index as on the encoder's
            side; -1 for padding. int64 [rows, decoder length].
    """

    input_ids: torch.Tensor
    documents: torch.Tensor


@dataclass
class Batch:
    """A micro-batch.

    Attributes:
        input_ids: int64 [rows, sequence].
        position_ids: int64 [rows, sequence]. They restart from 0 at each document, which is what
            keeps packed documents apart.
        labels: What is to be predicted; IGNORE where nothing is. int64 [rows, sequence], or
            [rows, decoder length] for an encoder-decoder. Objectives with one label per text or
            pair have int64 [rows] or [pairs].
        cu_seqlens: Cumulative sequence lengths, as varlen kernels take them: where each document
            starts in the concatenated rows, and the total length. int32 [documents + 1].
        decoder: The decoder's input, for an encoder-decoder only.
        attention_mask: bool [rows, sequence]; only if each row is one padded document.
        segments: The index of the answer that each token belongs to, -1 if to none. int64
            [rows, sequence]; for preference pairs only.
        targets: The labels of tokens, where `labels` are those of preference pairs. int64
            [rows, sequence].
        text_index: The index of each row's text in the flattened `text_keys`, -1 for a row without
            a text. int64 [rows]; for pairs of query and document only, as is `text_keys`.
        text_keys: A hash of the query and of the document of each pair that this rank has in the
            step, -1 where it has fewer pairs than another rank. int64 [pairs, 2]; every rank has
            the same number of pairs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    decoder: Decoder | None = None
    attention_mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    text_index: torch.Tensor | None = None
    text_keys: torch.Tensor | None = None

    @property
    def documents(self) -> torch.Tensor:
        """The index of each token's document in its row, from 0: int64 [rows, sequence]."""
        return (self.position_ids == 0).cumsum(1) - 1

    def to(self, device: torch.device) -> Batch:
        """Returns this batch on a device."""

        def moved(part: Batch | Decoder) -> dict[str, torch.Tensor]:
            tensors = {f.name: getattr(part, f.name) for f in fields(part) if f.name != "decoder"}
            return {k: t.to(device, non_blocking=True) for k, t in tensors.items() if t is not None}

        decoder = Decoder(**moved(self.decoder)) if self.decoder else None
        return Batch(**moved(self), decoder=decoder)


def to_batch(rows: Rows) -> Batch:
    """Builds a batch for next-token prediction within each document."""
    return Batch(
        input_ids=torch.from_numpy(rows.tokens.astype(np.int64)),
        position_ids=torch.from_numpy(positions(rows)),
        labels=torch.from_numpy(labels(rows)),
        cu_seqlens=torch.from_numpy(rows.edges.astype(np.int32)),
    )


def micro_batches(
    rows: Rows, micro_batch: int, count: int, collate: Callable[[Rows], Batch], device: torch.device
) -> list[Batch]:
    """Cuts a rank's rows of a step into exactly `count` micro-batches.

    If there are too few rows, rows of padding without targets are added: every rank must run the
    same number of forward passes.

    Args:
        rows: The rows of this rank.
        micro_batch: The number of rows per micro-batch.
        count: The number of micro-batches, the same on every rank.
        collate: Builds the batch of some rows.
        device: The device that the batches are moved to.

    Raises:
        ValueError: There are more rows than fit.
    """
    missing = count * micro_batch - len(rows)
    if missing < 0:
        raise ValueError(
            f"expected at most {count * micro_batch} rows ({count} micro-batches of {micro_batch}),"
            f" found {len(rows)}"
        )
    if missing:
        padding = Rows.empty(missing, rows.tokens.shape[1], rows.tokens.dtype)
        rows = Rows.concatenate([rows, padding])
    return [
        collate(rows.part(i * micro_batch, (i + 1) * micro_batch)).to(device) for i in range(count)
    ]
