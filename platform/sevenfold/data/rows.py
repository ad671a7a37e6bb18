"""Packed rows and chunks of them, and the positions and labels of their tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from xxhash import xxh3_64_intdigest

from sevenfold.data.sources.documents import Skipped

IGNORE = -100  # the label of a token without a loss, as in PyTorch's cross_entropy


@dataclass
class Rows:
    """Packed rows in a compact form: positions, segments and labels are computed from it.

    Attributes:
        tokens: uint16 or uint32 [rows, sequence]; padding is 0.
        starts: int32 [pieces], the position in its row at which each document (or piece of one)
            starts, row by row. Padding counts as a piece. Each row has a piece that starts at 0.
        used: int32 [rows], the number of tokens in each row before its padding.
        targets: bool [rows, sequence], True for tokens that the model learns to predict. None: all
            tokens of a document but its first.
    """

    tokens: np.ndarray
    starts: np.ndarray
    used: np.ndarray
    targets: np.ndarray | None = None

    @functools.cached_property
    def bounds(self) -> list[int]:
        """[rows + 1]: the starts of row r are starts[bounds[r] : bounds[r + 1]]."""
        return [*np.flatnonzero(self.starts == 0).tolist(), len(self.starts)]

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """int64 [pieces + 1]: where pieces start in the flattened rows, then the total size."""
        flat = (self.starts == 0).cumsum()  # the row of each piece, from 1
        flat *= self.tokens.shape[1]
        flat += self.starts
        edges = np.empty(len(flat) + 1, np.int64)
        np.subtract(flat, self.tokens.shape[1], out=edges[:-1])
        edges[-1] = self.tokens.size
        return edges

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, begin: int, end: int) -> Rows:
        """Returns the rows begin to end - 1."""
        return Rows.from_ranges([(self, begin, end)])

    @staticmethod
    def from_ranges(parts: Sequence[tuple[Rows, int, int]]) -> Rows:
        """Concatenates ranges of rows. The arrays are views if there is one part.

        Args:
            parts: (rows, start, stop) of each range.
        """
        tokens = _concatenate([rows.tokens[start:stop] for rows, start, stop in parts])
        starts = _concatenate(
            [rows.starts[rows.bounds[start] : rows.bounds[stop]] for rows, start, stop in parts]
        )
        used = _concatenate([rows.used[start:stop] for rows, start, stop in parts])
        if not any(rows.targets is not None for rows, _, _ in parts):
            return Rows(tokens, starts, used)
        targets = [
            np.ones((stop - start, tokens.shape[1]), bool)
            if rows.targets is None
            else rows.targets[start:stop]
            for rows, start, stop in parts
        ]
        return Rows(tokens, starts, used, _concatenate(targets))

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Concatenates rows."""
        return Rows.from_ranges([(part, 0, len(part)) for part in parts])

    @staticmethod
    def empty(
        rows: int, sequence_length: int, dtype: type[np.unsignedinteger] | np.dtype = np.uint16
    ) -> Rows:
        """Returns rows that consist of padding."""
        return Rows(
            np.zeros((rows, sequence_length), dtype),
            np.zeros(rows, np.int32),
            np.zeros(rows, np.int32),
        )

    def hashes(self) -> np.ndarray:
        """Returns the XXH3 hash of all fields of each row: uint64 [rows]."""
        bounds = self.bounds
        starts = self.starts.data
        targets = None if self.targets is None else np.packbits(self.targets, axis=1)
        hashes = np.empty(len(self), np.uint64)
        for i, (tokens, used) in enumerate(zip(self.tokens, self.used.tolist(), strict=True)):
            # the second argument is the seed: each hash covers the ones before it
            value = xxh3_64_intdigest(tokens.data, used)
            value = xxh3_64_intdigest(starts[bounds[i] : bounds[i + 1]], value)
            hashes[i] = value if targets is None else xxh3_64_intdigest(targets[i].data, value)
        return hashes

    def hash(self) -> int:
        """Returns one hash of all rows."""
        return combine_hashes(self.hashes())


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def combine_hashes(hashes: np.ndarray) -> int:
    """Combines the hashes of rows into one of 63 bits, which fits into the ledger's int64."""
    return (int(hashes[0]) if len(hashes) == 1 else xxh3_64_intdigest(hashes.data)) >> 1


@dataclass
class Pieces:
    """The places of a chunk's documents in its rows.

    A document that is cut at the end of a row has several pieces.

    Attributes:
        group: int64 [pieces], the index of the row group in the manifest.
        origin: int64 [pieces], the index of the document in the row group.
        start: int64 [pieces], the token of the document with which the piece starts.
        row: int64 [pieces], the row that the piece lies in.
        offset: int64 [pieces], the position in the row at which the piece starts.
        length: int64 [pieces], the number of tokens.
    """

    group: np.ndarray
    origin: np.ndarray
    start: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    length: np.ndarray


@dataclass
class Chunk:
    """The rows of a chunk.

    Attributes:
        index: The index of the chunk in the order of the data.
        rows: The rows, shuffled.
        hashes: The hash of each row, uint64 [rows].
        skipped: The bad documents that were left out.
        pieces: The places of the documents. None if the chunk comes from a Ray Data task.
    """

    index: int
    rows: Rows
    hashes: np.ndarray
    skipped: Skipped = field(default_factory=Skipped)
    pieces: Pieces | None = None


def positions(rows: Rows) -> np.ndarray:
    """Returns the position of each token in its document: int64 [rows, sequence]."""
    edges = rows.edges
    starts = edges[:-1].repeat(edges[1:] - edges[:-1])  # of the document of each token
    return (_arange(rows.tokens.size) - starts).reshape(rows.tokens.shape)


@functools.lru_cache(maxsize=2)
def _arange(stop: int) -> np.ndarray:
    return np.arange(stop)


def labels(rows: Rows, ignore: int = IGNORE) -> np.ndarray:
    """Returns the labels for next-token prediction: int64 [rows, sequence].

    Args:
        rows: The rows.
        ignore: The label of tokens whose next token is not a target, and of a document's last
            token.

    Returns:
        For each token the id of the next token, so that the labels are already shifted.
    """
    flat = np.empty(rows.tokens.size, np.int64)
    flat[:-1] = rows.tokens.reshape(-1)[1:]
    if rows.targets is not None:
        flat[:-1][~rows.targets.reshape(-1)[1:]] = ignore
    flat[rows.edges[1:] - 1] = ignore  # a document's last token does not predict the next document
    result = flat.reshape(rows.tokens.shape)
    short = rows.used < rows.tokens.shape[1]
    if short.any():
        for r in np.flatnonzero(short).tolist():
            result[r, rows.used[r] :] = ignore
    return result
