"""A window made into rows: encode, pack, permute. Any process can make any window, at any time, again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from xxhash import xxh3_64_intdigest

from sevenfold.data import pack
from sevenfold.data.documents import Skipped
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.order import Plan, shuffled
from sevenfold.errors import InputError

IGNORE = -100


@dataclass
class Rows:
    """Packed rows, as they travel.

    Attributes:
        tokens: uint16 or uint32 [rows, sequence]; 0 where padded.
        starts: int32 [pieces], where in its row each document (or piece of one) begins, row by row; padding counts as one,
            and each row begins with one.
        used: int32 [rows], tokens of a row before its padding.
        targets: bool [rows, sequence], tokens to be predicted; None where it is all of a document's but its first.
    """

    tokens: np.ndarray
    starts: np.ndarray
    used: np.ndarray
    targets: np.ndarray | None = None

    @functools.cached_property
    def bounds(self) -> list[int]:
        """[rows + 1], the starts of row r are starts[bounds[r] : bounds[r + 1]]."""
        return [*np.flatnonzero(self.starts == 0).tolist(), len(self.starts)]

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """Where documents begin in the rows laid end to end, and the end of all: int64 [pieces + 1]."""
        row = (self.starts == 0).cumsum()  # from 1
        row *= self.tokens.shape[1]
        row += self.starts
        out = np.empty(len(row) + 1, np.int64)
        np.subtract(row, self.tokens.shape[1], out=out[:-1])
        out[-1] = self.tokens.size
        return out

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, begin: int, end: int) -> Rows:
        """Rows begin .. end - 1."""
        return Rows.of([(self, begin, end)])

    @staticmethod
    def of(parts: Sequence[tuple[Rows, int, int]]) -> Rows:
        """Of each (rows, begin, end) the rows begin .. end - 1; one after the other. Views where there is one part."""
        tokens = _joined([r.tokens[a:b] for r, a, b in parts])
        starts = _joined([r.starts[r.bounds[a] : r.bounds[b]] for r, a, b in parts])
        used = _joined([r.used[a:b] for r, a, b in parts])
        if not any(r.targets is not None for r, _, _ in parts):
            return Rows(tokens, starts, used)
        masks = [np.ones((b - a, tokens.shape[1]), bool) if r.targets is None else r.targets[a:b] for r, a, b in parts]
        return Rows(tokens, starts, used, _joined(masks))

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        return Rows.of([(p, 0, len(p)) for p in parts])

    @staticmethod
    def empty(rows: int, sequence_length: int, dtype: type[np.unsignedinteger] | np.dtype = np.uint16) -> Rows:
        """Rows of padding alone."""
        return Rows(np.zeros((rows, sequence_length), dtype), np.zeros(rows, np.int32), np.zeros(rows, np.int32))

    def hashes(self) -> np.ndarray:
        """Of everything in each row: uint64 [rows], XXH3."""
        edges = self.bounds
        starts, packed = self.starts.data, None if self.targets is None else np.packbits(self.targets, axis=1)
        out = np.empty(len(self), np.uint64)
        for i, (tokens, used) in enumerate(zip(self.tokens, self.used.tolist(), strict=True)):
            made = xxh3_64_intdigest(tokens.data, used)
            made = xxh3_64_intdigest(starts[edges[i] : edges[i + 1]], made)
            out[i] = made if packed is None else xxh3_64_intdigest(packed[i].data, made)
        return out

    def hash(self) -> int:
        return together(self.hashes())


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def together(hashes: np.ndarray) -> int:
    """One of the hashes of several rows; 63 bits."""
    return (int(hashes[0]) if len(hashes) == 1 else xxh3_64_intdigest(hashes.data)) >> 1


@dataclass
class Pieces:
    """Where the documents of a window went: int64 [pieces] each.

    Attributes:
        group, origin: row group (its number in the manifest) and document in it.
        start: token of the document with which the piece begins.
        row, offset, length: where the piece lies.
    """

    group: np.ndarray
    origin: np.ndarray
    start: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    length: np.ndarray


@dataclass
class Window:
    index: int
    rows: Rows
    hashes: np.ndarray  # of each row
    skipped: Skipped = field(default_factory=Skipped)
    pieces: Pieces | None = None  # only where it was made


def make_window(
    plan: Plan,
    encoded: Callable[[list[int]], list[Encoded]],
    encoder: TextEncoder,
    sequence_length: int,
    packing: str,
    index: int,
) -> Window:
    """The rows of a window, in their order: a function of its arguments alone.

    Args:
        encoded: row groups -> their documents' ids.

    Raises:
        InputError: an id beyond the vocabulary.
    """
    groups = plan.window(index)
    parts = encoded(groups)
    head, tail = int(encoder.head is not None), int(encoder.tail is not None)
    body = np.concatenate([np.zeros(0, np.int64), *(np.diff(p.offsets) for p in parts)])  # ids a document
    lengths = np.where(body > 0, body + head + tail, 0)  # a document that came to nothing is left out
    skipped = sum((p.skipped for p in parts), Skipped())
    if not lengths.any():  # a row of padding keeps the count of windows
        none = Rows.empty(1, sequence_length, encoder.dtype)
        return Window(index, none, none.hashes(), skipped)
    for group, part in zip(groups, parts, strict=True):
        _check_ids(plan, group, part, encoder.vocab_size)
    if packing == "best_fit":
        document, start, length = pack.cut(lengths, sequence_length)
        row, offset, rows = pack.best_fit(length, sequence_length)
    else:
        order = shuffled(len(lengths), plan.seed, index, 1)
        document, start, length, row, offset = pack.concatenate(lengths, order[lengths[order] > 0], sequence_length)
        by_document = np.argsort(document, kind="stable")
        document, start, length, row, offset = (a[by_document] for a in (document, start, length, row, offset))
        rows = int(row.max()) + 1
    place = np.empty(rows, np.int64)
    place[shuffled(rows, plan.seed, index)] = np.arange(rows)
    row = place[row]
    to = row * sequence_length + offset

    tokens = np.zeros(rows * sequence_length, encoder.dtype)
    masked = any(p.targets is not None for p in parts)
    targets = np.zeros(len(tokens), bool) if masked else None
    low = np.maximum(start, head)  # the piece's part of the document's own ids, counted with the head
    count = np.minimum(start + length, head + body[document]) - low
    into = to + low - start
    first = 0  # document of the window that a part begins with
    for part in parts:
        span = slice(*np.searchsorted(document, [first, first + len(part.origin)]))
        source = part.offsets[document[span] - first] + low[span] - head
        _copy(part.ids.astype(encoder.dtype, copy=False), tokens, source, into[span], count[span])
        if targets is not None:
            _copy(
                np.ones(len(part.ids), bool) if part.targets is None else part.targets, targets, source, into[span], count[span]
            )
        first += len(part.origin)
    if head:
        tokens[to[start == 0]] = encoder.head
    if tail:
        ends = start + length == lengths[document]
        tokens[(to + length - 1)[ends]] = encoder.tail
    used = np.bincount(row, weights=length, minlength=rows).astype(np.int32)
    padded = np.flatnonzero(used < sequence_length)
    flat = np.sort(np.concatenate([to, padded * sequence_length + used[padded]]))
    made = Rows(
        tokens.reshape(rows, -1), (flat % sequence_length).astype(np.int32), used,
        None if targets is None else targets.reshape(rows, -1),
    )  # fmt: skip
    owner = np.repeat(groups, [len(p.origin) for p in parts])
    origin = np.concatenate([p.origin for p in parts])
    return Window(index, made, made.hashes(), skipped, Pieces(owner[document], origin[document], start, row, offset, length))


def _copy(source: np.ndarray, into: np.ndarray, begin: np.ndarray, at: np.ndarray, count: np.ndarray) -> None:
    """By memoryviews: numpy gives up the GIL for each piece, which a thread that draws beside this one pays for."""
    a, b, size = source.data.cast("B"), into.data.cast("B"), into.itemsize
    for s, t, n in zip((begin * size).tolist(), (at * size).tolist(), (count * size).tolist(), strict=True):
        if n > 0:
            b[t : t + n] = a[s : s + n]


def _check_ids(plan: Plan, group: int, part: Encoded, vocab_size: int) -> None:
    if len(part.ids) and part.ids.max() >= vocab_size:
        at = int(np.argmax(part.ids >= vocab_size))
        document = int(part.origin[np.searchsorted(part.offsets, at, side="right") - 1])
        path = plan.manifest.shards[plan.manifest.group(group).shard].path
        raise InputError(
            f"{path}: document {document} of row group {group}: token id {int(part.ids[at])} is beyond the vocabulary of "
            f"{vocab_size}: the tokens were made with another tokenizer, or are damaged: make them anew (jobs/tokenize.py)"
        )


def positions(rows: Rows) -> np.ndarray:
    """Each token's position in its document: int64 [rows, sequence]."""
    edges = rows.edges
    return (_count(rows.tokens.size) - edges[:-1].repeat(edges[1:] - edges[:-1])).reshape(rows.tokens.shape)


@functools.lru_cache(maxsize=2)
def _count(to: int) -> np.ndarray:
    return np.arange(to)


def labels(rows: Rows, ignore: int = IGNORE) -> np.ndarray:
    """For each token the next one, where that is a target; else `ignore`: int64 [rows, sequence]."""
    flat = np.empty(rows.tokens.size, np.int64)
    flat[:-1] = rows.tokens.reshape(-1)[1:]
    if rows.targets is not None:
        flat[:-1][~rows.targets.reshape(-1)[1:]] = ignore
    flat[rows.edges[1:] - 1] = ignore  # nothing is known before a document's first token
    out = flat.reshape(rows.tokens.shape)
    short = rows.used < rows.tokens.shape[1]
    if short.any():
        for r in np.flatnonzero(short).tolist():
            out[r, rows.used[r] :] = ignore
    return out
