"""Packing documents into rows: best-fit-decreasing (arXiv 2404.10830), which cuts no document that would fit into a row,
or end to end, which pads nothing but the last row."""

from __future__ import annotations

import numpy as np


def cut(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents that are longer than a row into pieces of at most `capacity` tokens.

    Returns:
        (document, start, length) of every piece: int64 [pieces]; start counts within the document.
    """
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    ordinal = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = ordinal * capacity
    return document, start, np.minimum(capacity, lengths[document] - start)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Puts pieces into rows: the longest first, each into the fullest row that still holds it.

    The rows' free spaces are kept as the bits of one integer, so that finding the tightest is O(1) a piece.

    Returns:
        (row, offset, rows): for every piece its row and where it begins there, int64 [pieces]; the number of rows.

    Raises:
        ValueError: a piece is empty or longer than a row.
    """
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= capacity):
        raise ValueError(f"pieces must have 1 to {capacity} tokens, found {lengths.min()} to {lengths.max()}")
    row = np.empty(len(lengths), np.int64)
    offset = np.empty(len(lengths), np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    free = 0  # bit s is set where some row has s tokens of free space
    rows = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        fits = free >> length
        if fits:
            space = length + (fits & -fits).bit_length() - 1
            at = rows_with[space].pop()
            if not rows_with[space]:
                free &= ~(1 << space)
        else:
            space, at = capacity, rows
            rows += 1
        row[i], offset[i] = at, capacity - space
        left = space - length
        if left:
            rows_with[left].append(at)
            free |= 1 << left
    return row, offset, rows


def concatenate(lengths: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, ...]:
    """Lays documents end to end in this order and cuts them at the rows' edges.

    Returns:
        (document, start, length, row, offset) of every piece: int64 [pieces].
    """
    lengths = lengths[order]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    cuts = np.union1d(begins, np.arange(0, int(ends[-1]) if len(ends) else 0, capacity))  # where pieces begin
    which = np.searchsorted(ends, cuts, side="right")
    length = np.diff(np.append(cuts, ends[-1:]))
    return order[which], cuts - begins[which], length, cuts // capacity, cuts % capacity
