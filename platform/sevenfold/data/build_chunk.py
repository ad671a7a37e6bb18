"""Builds a chunk: encodes its documents, packs them into rows, and shuffles the rows.

A chunk is a function of the recipe and the data alone, so that any process can build any chunk at
any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sevenfold.data import pack
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.order import DataOrder
from sevenfold.data.permutation import shuffled
from sevenfold.data.rows import Chunk, Pieces, Rows
from sevenfold.data.sources.documents import Skipped
from sevenfold.errors import InputError


class _Layout(NamedTuple):
    """The places of pieces of documents, sorted by document. All arrays are int64 [pieces].

    Attributes:
        document: The index of the document in the chunk.
        start: The token of the document with which the piece starts.
        length: The number of tokens.
        row: The row that the piece lies in.
        offset: The position in the row at which the piece starts.
        row_count: The number of rows.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    row_count: int


def build_chunk(
    order: DataOrder,
    encoded: Callable[[list[int]], list[Encoded]],
    encoder: TextEncoder,
    sequence_length: int,
    packing: str,
    index: int,
) -> Chunk:
    """Builds a chunk. Its rows, and their order, are a function of the arguments alone.

    Args:
        order: The order of the data.
        encoded: Returns the token ids of the documents of row groups.
        encoder: The encoder that computed the ids.
        sequence_length: Tokens per row.
        packing: "best_fit" or "concatenate", see `pack`.
        index: The index of the chunk.

    Raises:
        InputError: A token id is outside the vocabulary.
    """
    groups = order.chunk(index)
    parts = encoded(groups)
    skipped = sum((part.skipped for part in parts), Skipped())
    for group, part in zip(groups, parts, strict=True):
        _check_ids(order, group, part, encoder.vocab_size)
    layout, rows = _build(parts, encoder, sequence_length, packing, order.seed, index)
    if layout is None:
        # a chunk must not be empty; a row of padding keeps the number of chunks
        return Chunk(index, rows, rows.hashes(), skipped)
    group_of = np.repeat(groups, [len(part.origin) for part in parts])
    origin_of = np.concatenate([part.origin for part in parts])
    pieces = Pieces(
        group_of[layout.document],
        origin_of[layout.document],
        layout.start,
        layout.row,
        layout.offset,
        layout.length,
    )
    return Chunk(index, rows, rows.hashes(), skipped, pieces)


def build_rows(
    parts: list[Encoded], encoder: TextEncoder, sequence_length: int, packing: str, seed: int
) -> Rows:
    """Returns the rows of documents that are no chunk; one row of padding without any."""
    return _build(parts, encoder, sequence_length, packing, seed, 0)[1]


def _build(
    parts: list[Encoded],
    encoder: TextEncoder,
    sequence_length: int,
    packing: str,
    seed: int,
    index: int,
) -> tuple[_Layout | None, Rows]:
    """Packs documents. Returns None and a row of padding if there are none with ids."""
    # tokens of each document, first without and then with head and tail
    sizes = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.offsets) for part in parts)])
    lengths = framed_lengths(sizes, encoder)
    if not lengths.any():
        return None, Rows.empty(1, sequence_length, encoder.dtype)
    layout = _pack(lengths, sequence_length, packing, seed, index)
    return layout, _fill_rows(parts, encoder, layout, sizes, lengths, sequence_length)


def framed_lengths(sizes: np.ndarray, encoder: TextEncoder) -> np.ndarray:
    """Returns the tokens of documents with head and tail; 0 for those without ids, left out."""
    frame = int(encoder.head is not None) + int(encoder.tail is not None)
    return np.where(sizes > 0, sizes + frame, 0)


def count_rows(lengths: np.ndarray, sequence_length: int, packing: str) -> int:
    """Returns the number of rows of a chunk whose documents have these numbers of tokens."""
    if not lengths.any():
        return 1  # of padding
    if packing == "concatenate":
        return int(-(-lengths.sum() // sequence_length))
    _, _, pieces = pack.cut(lengths, sequence_length)
    return pack.best_fit(pieces, sequence_length)[2]


def _pack(
    lengths: np.ndarray, sequence_length: int, packing: str, seed: int, index: int
) -> _Layout:
    """Packs the documents of a chunk into rows, and shuffles the rows.

    Args:
        lengths: Tokens of each document, int64 [documents]; 0 for documents that are left out.
        sequence_length: Tokens per row.
        packing: "best_fit" or "concatenate".
        seed: The seed of the data's order.
        index: The index of the chunk, which is a part of the shuffling's key.
    """
    if packing == "best_fit":
        document, start, length = pack.cut(lengths, sequence_length)
        row, offset, row_count = pack.best_fit(length, sequence_length)
    else:
        permutation = shuffled(len(lengths), seed, index, 1)
        document, start, length, row, offset = pack.concatenate(
            lengths, permutation[lengths[permutation] > 0], sequence_length
        )
        by_document = np.argsort(document, kind="stable")
        document, start, length, row, offset = (
            array[by_document] for array in (document, start, length, row, offset)
        )
        row_count = int(row.max()) + 1
    new_row = np.empty(row_count, np.int64)
    new_row[shuffled(row_count, seed, index)] = np.arange(row_count)
    return _Layout(document, start, length, new_row[row], offset, row_count)


def _fill_rows(
    parts: list[Encoded],
    encoder: TextEncoder,
    layout: _Layout,
    sizes: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
) -> Rows:
    """Copies the ids of the documents to their places.

    Args:
        parts: The ids of each row group.
        encoder: The encoder, for the ids of head and tail.
        layout: The places of the pieces.
        sizes: Tokens of each document without head and tail, int64 [documents].
        lengths: Tokens of each document with head and tail, int64 [documents].
        sequence_length: Tokens per row.
    """
    document, start, length, row, offset, row_count = layout
    head = int(encoder.head is not None)
    position = row * sequence_length + offset  # of each piece in the flattened rows
    tokens = np.zeros(row_count * sequence_length, encoder.dtype)
    has_targets = any(part.targets is not None for part in parts)
    targets = np.zeros(len(tokens), bool) if has_targets else None
    # Positions within a document count its head, but `part.ids` has neither head nor tail. So find
    # the document's own ids in each piece: the position of the first one within the document, and
    # their number.
    own_start = np.maximum(start, head)
    own_count = np.minimum(start + length, head + sizes[document]) - own_start
    destination = position + own_start - start
    first = 0  # the index, in the chunk, of the part's first document
    for part in parts:
        span = slice(*np.searchsorted(document, [first, first + len(part.origin)]))
        source = part.offsets[document[span] - first] + own_start[span] - head
        ids = part.ids.astype(encoder.dtype, copy=False)
        _copy(ids, tokens, source, destination[span], own_count[span])
        if targets is not None:
            part_targets = np.ones(len(ids), bool) if part.targets is None else part.targets
            _copy(part_targets, targets, source, destination[span], own_count[span])
        first += len(part.origin)
    if encoder.head is not None:
        tokens[position[start == 0]] = encoder.head
    if encoder.tail is not None:
        is_end = start + length == lengths[document]
        tokens[(position + length - 1)[is_end]] = encoder.tail
    used = np.bincount(row, weights=length, minlength=row_count).astype(np.int32)
    padded = np.flatnonzero(used < sequence_length)
    padding = padded * sequence_length + used[padded]  # counts as a piece, see `Rows.starts`
    starts = np.sort(np.concatenate([position, padding]))
    return Rows(
        tokens.reshape(row_count, -1),
        (starts % sequence_length).astype(np.int32),
        used,
        None if targets is None else targets.reshape(row_count, -1),
    )


def _copy(
    source: np.ndarray,
    destination: np.ndarray,
    source_start: np.ndarray,
    destination_start: np.ndarray,
    count: np.ndarray,
) -> None:
    """Copies several ranges of elements from one array to another of the same type.

    It uses memoryviews, since numpy releases the GIL for each range, which costs time if another
    thread reads from the stream meanwhile.
    """
    source_bytes, destination_bytes = source.data.cast("B"), destination.data.cast("B")
    size = destination.itemsize
    for start, to, length in zip(
        (source_start * size).tolist(),
        (destination_start * size).tolist(),
        (count * size).tolist(),
        strict=True,
    ):
        if length > 0:
            destination_bytes[to : to + length] = source_bytes[start : start + length]


def _check_ids(order: DataOrder, group: int, part: Encoded, vocab_size: int) -> None:
    """Raises InputError if a token id of a row group is outside the vocabulary."""
    if not len(part.ids) or part.ids.max() < vocab_size:
        return
    first = int(np.argmax(part.ids >= vocab_size))
    document = int(part.origin[np.searchsorted(part.offsets, first, side="right") - 1])
    path = order.manifest.shards[order.manifest.group(group).shard].path
    raise InputError(
        f"{path}: document {document} of row group {group}: expected token ids below {vocab_size} "
        f"(the vocabulary's size), found {int(part.ids[first])}: the token cache is damaged or was "
        "made with another tokenizer: run jobs/tokenize.py again"
    )
