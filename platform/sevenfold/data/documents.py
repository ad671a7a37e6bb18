"""Which documents of a row group are read: bad ones refused or counted, filters, and the split by hash."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sevenfold.data import formats, shards
from sevenfold.data.manifest import Manifest
from sevenfold.errors import InputError
from sevenfold.recipe import Data, Filter

NAMED = 5  # bad documents that an error names


class BadDocuments(InputError):
    """Documents of a shard that cannot be read or learnt from: (where, what is wrong) of each."""

    def __init__(self, path: str, bad: Sequence[tuple[str, str]]):
        self.path, self.bad = path, list(bad)
        named = "; ".join(f"{where}: {reason}" for where, reason in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        super().__init__(f"{path}: {named}{more}: mend it, or leave such documents out (data.on_bad_document=skip)")

    def __reduce__(self) -> tuple[type, tuple[str, list[tuple[str, str]]]]:
        return BadDocuments, (self.path, self.bad)  # it travels between processes


@dataclass(frozen=True)
class Skipped:
    """Bad documents that were left out: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def __add__(self, other: Skipped) -> Skipped:
        return Skipped(self.count + other.count, self.first or other.first)


@dataclass
class Documents:
    """Of a row group, in its order: one array of strings a field, all of the same length.

    Attributes:
        origin: int64 [documents], each one's number within the row group before any was left out.
    """

    fields: list[pa.Array]
    origin: np.ndarray
    skipped: Skipped


@dataclass(frozen=True)
class Selection:
    """How documents are chosen. `split` names the side of the split by hash that is read."""

    fields: tuple[str, ...] = ("text",)
    held_out: float = 0.0
    split: Literal["train", "held_out"] = "train"
    on_bad: Literal["error", "skip"] = "error"
    max_bytes: int = 64_000_000
    classes: tuple[str, ...] = ()  # labels that may occur; none given: any

    @staticmethod
    def of(data: Data, fields: tuple[str, ...], split: Literal["train", "held_out"] = "train") -> Selection:
        return Selection(
            fields, data.held_out, split, data.on_bad_document, int(data.max_document_mb * 1e6), tuple(data.classes)
        )

    def read(self, manifest: Manifest, index: int) -> Documents:
        """The documents of a row group.

        Raises:
            InputError: the shard is gone or changed; a document is bad (not UTF-8, no text, too long, no valid JSON) or the
                row group cannot be read, and `on_bad` is error. Names file and position.
        """
        group = manifest.group(index)
        shard = manifest.shards[group.shard]
        source = manifest.sources[shard.source]
        texts = formats.read_columns(source)
        others = sorted({f.column for f in source.filters} - set(texts))
        try:
            raw = shards.read(shard, source, group, texts, others, self.max_bytes)
        except shards.Unreadable as e:
            if self.on_bad == "error":
                raise
            none = pa.array([], pa.large_string())
            return Documents([none] * len(self.fields), np.zeros(0, np.int64), Skipped(max(1, group.documents), str(e)))
        columns = [_flat(raw.columns[t]) for t in texts]
        good = np.ones(len(columns[0]), bool)
        wrong: list[tuple[int, str]] = []
        for name, column in zip(texts, columns, strict=True):
            for i, reason in _bad(column, self.max_bytes, empty=source.shape is not None):
                if good[i]:
                    wrong.append((i, f"{reason} in {name!r}"))
                good[i] = False
        wanted = np.ones(len(good), bool)
        for rule in source.filters:
            asked = np.flatnonzero(good) if rule.column in texts else np.arange(len(good))  # bad text has no length
            wanted[asked] &= _passes(raw.columns[rule.column].take(pa.array(asked)), rule, shard.path)
        if source.shape is not None:
            at = np.flatnonzero(good & wanted)
            columns = [c.take(pa.array(at)) for c in columns]
            made, unfit = formats.canonical(source, len(self.fields), columns, self.classes)
            wrong += [(int(at[i]), reason) for i, reason in unfit]
            columns = [_spread(c, at, len(good)) for c in made]
            good[at[[i for i, _ in unfit]]] = False
        bad = raw.bad + [(raw.where(i), reason) for i, reason in wrong if wanted[i]]
        skipped = Skipped()
        if bad:
            skipped = Skipped(len(bad), f"{shard.path}: {bad[0][0]}: {bad[0][1]}")
            if self.on_bad == "error":
                raise BadDocuments(shard.path, bad)
        keep = np.flatnonzero(good & wanted)
        if len(keep) < len(good):
            columns = [c.take(pa.array(keep)) for c in columns]
        if self.held_out:
            chosen = held_out(columns[0], self.held_out) == (self.split == "held_out")
            keep = keep[chosen]
            columns = [c.filter(pa.array(chosen)) for c in columns]
        return Documents(columns, keep, skipped)


def texts(documents: Documents) -> list[list[str]]:
    """The fields as Python strings."""
    return [c.to_pylist() for c in documents.fields]


def buffers(strings: pa.Array) -> tuple[np.ndarray, memoryview]:
    """Offsets, int64 [strings + 1], and the UTF-8 bytes that they cut; nothing is copied."""
    _, offsets, data = strings.buffers()
    at = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    return at, memoryview(data if data is not None else b"")


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """As strings: what is nested as JSON."""
    if pa.types.is_nested(column.type):
        return pa.array(
            [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in column.to_pylist()],
            pa.large_string(),
        )
    flat = column.cast(pa.large_string()).combine_chunks()
    return pa.concat_arrays(flat.chunks) if isinstance(flat, pa.ChunkedArray) else flat


def _spread(column: pa.Array, at: np.ndarray, length: int) -> pa.Array:
    """The strings at these places of an array of this length, null elsewhere."""
    where = np.full(length, -1, np.int64)
    where[at] = np.arange(len(at))
    return column.take(pa.array(where, mask=where < 0))


def _bad(column: pa.Array, most: int, empty: bool) -> list[tuple[int, str]]:
    """(index, what is wrong) of the strings that cannot be trained on. empty: those without text can."""
    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy()
    out = [] if empty else [(int(i), "no text") for i in np.flatnonzero(sizes == 0)]
    out += [(int(i), f"{sizes[i] / 1e6:.0f} MB, longer than {most / 1e6:g} MB (data.max_document_mb)")
            for i in np.flatnonzero(sizes > most)]  # fmt: skip
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        at, data = buffers(column)
        for i in range(len(column)):
            try:
                str(data[at[i] : at[i + 1]], "utf-8")
            except UnicodeDecodeError as e:
                out.append((i, f"not UTF-8 at its byte {e.start}"))
    return sorted(out)


def _passes(column: pa.ChunkedArray, rule: Filter, path: str) -> np.ndarray:
    """bool [documents]."""
    if pa.types.is_null(column.type):
        return np.zeros(len(column), bool)
    tests = []
    try:
        if rule.min is not None:
            tests.append(pc.greater_equal(column, rule.min))
        if rule.max is not None:
            tests.append(pc.less_equal(column, rule.max))
        if rule.one_of is not None:
            tests.append(pc.is_in(column, pa.array(rule.one_of).cast(column.type)))
        if rule.min_chars is not None:
            tests.append(pc.greater_equal(pc.utf8_length(column), rule.min_chars))
        if rule.max_chars is not None:
            tests.append(pc.less_equal(pc.utf8_length(column), rule.max_chars))
    except pa.ArrowException as e:
        raise InputError(f"{path}: filter on {rule.column!r}: does not fit {column.type}: {shards.line(e)}") from None
    passed = functools.reduce(pc.and_kleene, tests)
    return np.asarray(pc.fill_null(passed, False).to_numpy(zero_copy_only=False), bool)


def held_out(column: pa.Array, part: float) -> np.ndarray:
    """Whether a document is held out: by a hash of its bytes, so that copies of it fall on the same side."""
    at, data = buffers(column)
    threshold = int(part * 2**64)
    hashes = (
        int.from_bytes(hashlib.blake2b(data[a:b], digest_size=8).digest(), "little")
        for a, b in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)
    )
    return np.fromiter((h < threshold for h in hashes), bool, len(column))


def document_hash(parts: Sequence[str]) -> str:
    """What the ledger knows a document by: blake2b of its fields, 16 hex digits."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
