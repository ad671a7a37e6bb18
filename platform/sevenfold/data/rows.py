"""A window made into rows: read, encode, pack, permute. Any process can make any window, at any time, again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sevenfold.data import pack
from sevenfold.data.order import Plan, shuffled
from sevenfold.data.tokens import Encoder

START, TARGET = np.uint8(1), np.uint8(2)  # marks: a document or a piece of one begins here; predict this token


@dataclass
class Rows:
    """Packed rows, as they travel.

    Attributes:
        tokens: uint16 or uint32 [rows, sequence]; 0 where padded.
        marks: uint8 [rows, sequence]; bits START and TARGET. Padding is a document of its own without targets.
    """

    tokens: np.ndarray
    marks: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, at: slice) -> Rows:
        return Rows(self.tokens[at], self.marks[at])

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        return Rows(np.concatenate([p.tokens for p in parts]), np.concatenate([p.marks for p in parts]))


def make_window(plan: Plan, encoder: Encoder, sequence_length: int, index: int) -> Rows:
    """The rows of a window, in their order: a function of its arguments alone."""
    columns = [plan.manifest.read(group) for group in plan.window(index)]
    parts = [encoder(c) for c in columns]
    if not sum(len(p.lengths) for p in parts):  # documents without text: a row of padding keeps the count of windows
        return Rows(np.zeros((1, sequence_length), np.uint16), np.full((1, sequence_length), START))
    tokens = np.concatenate([p.tokens for p in parts])
    targets = np.concatenate([p.targets for p in parts])
    lengths = np.concatenate([p.lengths for p in parts])
    document, start, length = pack.cut(lengths, sequence_length)
    source = (np.cumsum(lengths) - lengths)[document] + start
    row, offset, rows = pack.best_fit(length, sequence_length)
    place = np.empty(rows, np.int64)
    place[shuffled(rows, plan.seed, index)] = np.arange(rows)
    to = place[row] * sequence_length + offset

    out_tokens = np.zeros(rows * sequence_length, np.uint16 if tokens.max(initial=0) < 2**16 else np.uint32)
    out_marks = np.zeros(rows * sequence_length, np.uint8)
    for s, n, t in zip(source.tolist(), length.tolist(), to.tolist(), strict=True):
        out_tokens[t : t + n] = tokens[s : s + n]
        out_marks[t : t + n] = targets[s : s + n] * TARGET
    out_marks[to] = START  # and no target: nothing is known before it
    ends = np.zeros(rows, np.int64)
    np.maximum.at(ends, place[row], offset + length)
    padded = np.flatnonzero(ends < sequence_length)
    out_marks[padded * sequence_length + ends[padded]] = START
    return Rows(out_tokens.reshape(rows, -1), out_marks.reshape(rows, -1))


def positions(marks: np.ndarray) -> np.ndarray:
    """Each token's position in its document: int64 [rows, sequence]."""
    at = np.arange(marks.shape[1])
    begin = np.where(marks & START, at, 0)
    return at - np.maximum.accumulate(begin, axis=1)


def labels(rows: Rows, ignore: int = -100) -> np.ndarray:
    """For each token the next one, where that is a target; else `ignore`: int64 [rows, sequence]."""
    out = np.full(rows.tokens.shape, ignore, np.int64)
    wanted = (rows.marks[:, 1:] & (START | TARGET)) == TARGET
    out[:, :-1][wanted] = rows.tokens[:, 1:][wanted]
    return out
