"""Packing of pieces of documents into rows."""

import numpy as np
import pytest

from sevenfold.data import pack


@pytest.mark.parametrize("seed", range(5))
def test_pieces_fit_without_overlap_and_none_is_lost(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(1 + rng.pareto(0.8, 3000) * 40, 5000).astype(np.int64)
    document, _, length = pack.cut(lengths, 256)
    assert np.array_equal(np.bincount(document, weights=length), lengths)
    row, offset, rows = pack.best_fit(length, 256)
    used = np.zeros((rows, 256), int)
    for row_index, start, count in zip(row, offset, length, strict=True):
        used[row_index, start : start + count] += 1
    assert used.max() == 1 and used.sum() == lengths.sum()
    assert 1 - used.mean() < 0.006
    fits = np.flatnonzero(lengths <= 256)
    # a document that fits into a row is not cut
    assert np.array_equal(np.bincount(document)[fits], np.ones(len(fits)))


def test_the_fullest_row_that_fits_is_chosen() -> None:
    row, offset, rows = pack.best_fit(np.array([6, 7, 3, 4]), 10)
    assert rows == 2 and row[1] == row[2] and row[0] == row[3] and offset.tolist() == [0, 0, 7, 6]


def test_pieces_of_invalid_length_are_refused() -> None:
    for lengths in ([0], [11]):
        with pytest.raises(ValueError, match="1 to 10 tokens"):
            pack.best_fit(np.array(lengths), 10)
