"""Packing of documents into rows of equal length.

Best-fit-decreasing (arXiv 2404.10830) cuts no document that fits into a row. Concatenation cuts
documents at the ends of rows, and pads only the last row.
"""

from __future__ import annotations

import numpy as np


def cut(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents that are longer than a row into pieces of at most `capacity` tokens.

    Args:
        lengths: Tokens of each document, int64 [documents].
        capacity: Tokens per row.

    Returns:
        (document, start, length) of each piece, int64 [pieces]: the document's index, the token of
        the document with which the piece starts, and the number of tokens.
    """
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    ordinal = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = ordinal * capacity
    return document, start, np.minimum(capacity, lengths[document] - start)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Assigns pieces to rows: the longest first, each to the fullest row with space for it.

    Args:
        lengths: Tokens of each piece, int64 [pieces].
        capacity: Tokens per row.

    Returns:
        (row, offset, rows): for each piece its row and its first position there, int64 [pieces];
        the number of rows.

    Raises:
        ValueError: A piece is empty or longer than a row.
    """
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= capacity):
        raise ValueError(
            f"pieces must have 1 to {capacity} tokens, found {lengths.min()} to {lengths.max()}"
        )
    values, counts = np.unique(lengths, return_counts=True)
    row: list[int] = []  # of each piece, from the longest to the shortest
    offset: list[int] = []
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit s is set if some row has s free tokens. The lowest set bit from `length` on is the
    # smallest sufficient space; in one integer, it is found without a loop.
    free = 0
    rows = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:  # place as many pieces of this length at once as fit in the same way
            fits = free >> length
            space = length + (fits & -fits).bit_length() - 1 if fits else capacity
            # after one piece, the same row is still the fullest that fits, so it gets several
            per_row = min(space // length, count)
            row_count = max(1, count // per_row)
            if fits:
                chosen = rows_by_space[space][-row_count:]
                del rows_by_space[space][-row_count:]
                if not rows_by_space[space]:
                    free &= ~(1 << space)
            else:
                chosen = list(range(rows, rows + row_count))
                rows += row_count
            begin, left = capacity - space, space - per_row * length
            row += chosen if per_row == 1 else [r for r in chosen for _ in range(per_row)]
            offset += list(range(begin, begin + per_row * length, length)) * len(chosen)
            count -= per_row * len(chosen)
            if left:
                rows_by_space[left] += chosen
                free |= 1 << left
    # back from the order by length to the order of the arguments
    by_length = np.argsort(-lengths, kind="stable")
    rank = np.empty_like(by_length)
    rank[by_length] = np.arange(len(lengths))
    return np.array(row, np.int64)[rank], np.array(offset, np.int64)[rank], rows


def concatenate(lengths: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, ...]:
    """Concatenates documents in the given order and cuts them at the ends of the rows.

    Args:
        lengths: Tokens of each document, int64 [documents].
        order: The indices of the documents to take, int64.
        capacity: Tokens per row.

    Returns:
        (document, start, length, row, offset) of each piece, int64 [pieces]: as `cut`, then as
        `best_fit`.
    """
    lengths = lengths[order]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    # a piece starts where a document starts and where a row starts
    starts = np.union1d(begins, np.arange(0, total, capacity))
    position = np.searchsorted(ends, starts, side="right")  # of the piece's document in `order`
    length = np.diff(np.append(starts, ends[-1:]))
    return (
        order[position],
        starts - begins[position],
        length,
        starts // capacity,
        starts % capacity,
    )
