"""Takes packed rows apart, for models whose documents would see each other in one row."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from sevenfold.engine.batch import IGNORE, Batch, Decoder


def unpacked(batch: Batch, pad: int) -> Batch:
    """Returns a batch with one document per row, padded on the right.

    Documents without a label are left out: they do not change the loss. If none is left, the batch
    has one row of padding.

    Args:
        batch: Packed documents.
        pad: The padding token.
    """
    if batch.decoder is not None:
        return _unpacked_pairs(batch, batch.decoder, pad)
    labels = batch.labels if batch.targets is None else batch.targets
    edges = batch.cu_seqlens.tolist()
    flat_labels = labels.flatten()
    pieces = [
        slice(start, stop)
        for start, stop in itertools.pairwise(edges)
        if (flat_labels[start:stop] != IGNORE).any()
    ] or [slice(0, 1)]

    def column(values: torch.Tensor, fill: int) -> torch.Tensor:
        return _padded([values.flatten()[piece] for piece in pieces], fill)

    new_labels = column(labels, IGNORE)
    rows = _rows([batch.input_ids.flatten()[piece] for piece in pieces], pad)
    if batch.targets is None:
        return replace(rows, labels=new_labels)
    assert batch.segments is not None
    segments = column(batch.segments, -1)
    return replace(rows, labels=batch.labels, targets=new_labels, segments=segments)


def _unpacked_pairs(batch: Batch, decoder: Decoder, pad: int) -> Batch:
    """Does the same for the pairs of encoder and decoder input of an encoder-decoder."""
    documents, sources, targets, labels = batch.documents, [], [], []
    for i, row in enumerate(decoder.documents):
        for document in row[row >= 0].unique_consecutive().tolist():
            sources.append(batch.input_ids[i][documents[i] == document])
            targets.append(decoder.input_ids[i][row == document])
            labels.append(batch.labels[i][row == document])
    if not sources:
        sources, targets = [batch.input_ids[0, :1]], [decoder.input_ids[0, :1]]
        labels = [torch.full((1,), IGNORE)]
    is_token = [torch.zeros(len(target), dtype=torch.int64) for target in targets]
    new_decoder = Decoder(_padded(targets, pad), _padded(is_token, -1))
    return replace(_rows(sources, pad), labels=_padded(labels, IGNORE), decoder=new_decoder)


def _rows(documents: list[torch.Tensor], pad: int) -> Batch:
    """Returns a batch of padded documents, without labels."""
    input_ids = _padded(documents, pad)
    count, width = input_ids.shape
    lengths = torch.tensor([len(document) for document in documents])
    return Batch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(count, -1).contiguous(),
        labels=torch.full_like(input_ids, IGNORE),
        cu_seqlens=torch.arange(0, input_ids.numel() + 1, width, dtype=torch.int32),
        attention_mask=torch.arange(width) < lengths[:, None],
    )


def _padded(values: list[torch.Tensor], fill: int) -> torch.Tensor:
    return pad_sequence(values, batch_first=True, padding_value=fill)
