"""Takes packed rows apart, for models whose documents would see each other in one row."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from sevenfold.engine.batch import IGNORE, Batch, Decoder
from sevenfold.engine.objectives.divide import bounded_batches, largest_on_any_rank


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
    is_used = (labels != IGNORE) if batch.segments is None else (batch.segments >= 0)
    is_used = is_used.flatten()
    pieces = [
        slice(start, stop)
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())
        if is_used[start:stop].any()
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


def divided(batch: Batch, max_tokens: int, device: torch.device) -> list[Batch]:
    """Divides the documents of all of a rank's rows into micro-batches, as many on every rank.

    The two answers of a preference pair stay together.

    Args:
        batch: The documents, from `unpacked`.
        max_tokens: The largest number of tokens of a micro-batch, padding included.
        device: The device on which the ranks exchange the number of their micro-batches.
    """
    assert batch.attention_mask is not None
    lengths = batch.attention_mask.sum(1)
    if batch.decoder is not None:
        lengths = lengths + (batch.decoder.documents >= 0).sum(1)
    unit = 1 if batch.segments is None else 2  # rows that stay together
    if unit == 2 and len(lengths) > 1:
        lengths = 2 * lengths.view(-1, 2).amax(1)
    parts = bounded_batches(lengths.tolist(), max_tokens)
    (count,) = largest_on_any_rank(device, len(parts))
    batches = [_select(batch, torch.tensor(part), unit) for part in parts]
    # micro-batches without a label, for a rank that has fewer than another one
    spare = _select(batch, torch.tensor(parts[-1][-1:]), unit)
    spare = replace(spare, labels=torch.full_like(spare.labels, IGNORE))
    return batches + [spare] * (count - len(parts))


def _select(batch: Batch, units: torch.Tensor, unit: int) -> Batch:
    """Returns some documents of a batch, cut to the width that they need.

    Args:
        batch: The documents.
        units: The indices of groups of documents: int64 [groups].
        unit: The number of documents per group.
    """
    assert batch.attention_mask is not None
    rows = (units[:, None] * unit + torch.arange(unit)).flatten()
    rows = rows[rows < len(batch.input_ids)]  # a batch without text has one row
    width = int(batch.attention_mask[rows].sum(1).max())

    def cut(values: torch.Tensor) -> torch.Tensor:
        return values[rows, :width]

    selected = replace(
        batch,
        input_ids=cut(batch.input_ids),
        position_ids=cut(batch.position_ids),
        attention_mask=cut(batch.attention_mask),
        cu_seqlens=torch.arange(0, len(rows) * width + 1, width, dtype=torch.int32),
    )
    if batch.segments is not None and batch.targets is not None:
        # the answers of the pairs are numbered anew
        segments = cut(batch.segments)
        numbers = torch.arange(len(rows))[:, None].expand_as(segments)
        return replace(
            selected,
            labels=batch.labels[units],
            targets=cut(batch.targets),
            segments=torch.where(segments >= 0, numbers, segments),
        )
    if batch.decoder is None:
        return replace(selected, labels=cut(batch.labels))
    length = max(1, int((batch.decoder.documents[rows] >= 0).sum(1).max()))
    decoder = Decoder(
        batch.decoder.input_ids[rows, :length], batch.decoder.documents[rows, :length]
    )
    return replace(selected, labels=batch.labels[rows, :length], decoder=decoder)


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
