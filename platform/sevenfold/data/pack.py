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

    The rows' free spaces are kept as the bits of one integer, so that the tightest is found at once.

    Returns:
        (row, offset, rows): for every piece its row and where it begins there, int64 [pieces]; the number of rows.

    Raises:
        ValueError: a piece is empty or longer than a row.
    """
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= capacity):
        raise ValueError(f"pieces must have 1 to {capacity} tokens, found {lengths.min()} to {lengths.max()}")
    values, counts = np.unique(lengths, return_counts=True)
    row: list[int] = []  # of the pieces from the longest to the shortest
    offset: list[int] = []
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    free = 0  # bit s is set where some row has s tokens of free space
    rows = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:  # pieces of this length, as many at once as go the same way
            fits = free >> length
            space = length + (fits & -fits).bit_length() - 1 if fits else capacity
            each = min(space // length, count)  # in a row: what remains of it stays the tightest
            take = max(1, count // each)
            if fits:
                at = rows_with[space][-take:]
                del rows_with[space][-take:]
                if not rows_with[space]:
                    free &= ~(1 << space)
            else:
                at = list(range(rows, rows + take))
                rows += take
            begin, left = capacity - space, space - each * length
            row += at if each == 1 else [r for r in at for _ in range(each)]
            offset += list(range(begin, begin + each * length, length)) * len(at)
            count -= each * len(at)
            if left:
                rows_with[left] += at
                free |= 1 << left
    by_length = np.argsort(-lengths, kind="stable")
    back = np.empty_like(by_length)
    back[by_length] = np.arange(len(lengths))
    return np.array(row, np.int64)[back], np.array(offset, np.int64)[back], rows


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
