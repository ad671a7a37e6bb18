"""Which documents of a row group are read: valid ones, that pass the filters, of one split.

Bad documents raise an error or are counted and left out. Training and held-out documents are split
by a hash.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sevenfold.data.manifest import Manifest
from sevenfold.data.sources import formats
from sevenfold.data.sources.filters import pass_all
from sevenfold.data.sources.messages import MessageKeys, to_json
from sevenfold.data.sources.reading import read_row_group
from sevenfold.data.sources.shards import BadDocument, UnreadableError
from sevenfold.errors import InputError
from sevenfold.recipe import Data, Source

_MAX_NAMED = 5  # bad documents that an error names


class BadDocumentsError(InputError):
    """Documents of a shard cannot be read or trained on.

    Attributes:
        path: The path of the shard.
        bad: The (location, reason) of each document.
    """

    def __init__(self, path: str, bad: Sequence[tuple[str, str]]):
        self.path, self.bad = path, list(bad)
        named = "; ".join(f"{location}: {reason}" for location, reason in bad[:_MAX_NAMED])
        more = f"; and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
        super().__init__(
            f"{path}: {named}{more}: fix the file, or skip such documents "
            "(data.on_bad_document=skip)"
        )

    def __reduce__(self) -> tuple[type, tuple[str, list[tuple[str, str]]]]:
        return BadDocumentsError, (self.path, self.bad)  # it is pickled between processes


class UnusableExampleError(ValueError):
    """A document cannot be encoded for its objective; the message is the reason."""


@dataclass(frozen=True)
class Skipped:
    """Bad documents that were left out.

    Attributes:
        count: Their number.
        first: Path, location and reason of the first one; "" if there are none.
    """

    count: int = 0
    first: str = ""

    def __add__(self, other: Skipped) -> Skipped:
        return Skipped(self.count + other.count, self.first or other.first)


@dataclass
class Documents:
    """Documents of a row group, in their order in the file.

    Attributes:
        fields: For each field that the objective reads (such as "text", or "text" and "label"), an
            array with its string for each document.
        origin: int64 [documents], the index of each document in the row group, counted before any
            were left out.
        skipped: The bad documents that were left out.
        unknown_keys: How often messages have keys that are not understood.
        locate: Returns the location of a document in the file, by its index in the row group.
        path: The path of the file.
        on_bad: What to do about documents that an encoder cannot use.
    """

    fields: list[pa.Array]
    origin: np.ndarray
    skipped: Skipped
    unknown_keys: Counter[str] = field(default_factory=Counter)
    locate: Callable[[int], str] = str
    path: str = ""
    on_bad: Literal["error", "skip"] = "error"

    def reject(self, bad: Sequence[tuple[int, str]]) -> Skipped:
        """Returns `skipped` together with documents that an encoder cannot use.

        Args:
            bad: The index (of `fields`) and the reason of each.

        Raises:
            BadDocumentsError: There are some, and `on_bad` is "error".
        """
        if not bad:
            return self.skipped
        named = [(self.locate(int(self.origin[index])), reason) for index, reason in bad]
        if self.on_bad == "error":
            raise BadDocumentsError(self.path, named)
        return self.skipped + Skipped(len(bad), f"{self.path}: {named[0][0]}: {named[0][1]}")


@dataclass(frozen=True)
class Selection:
    """How documents are selected.

    Attributes:
        fields: The names of the fields that the objective reads.
        held_out: The share of the documents that is held out from training.
        split: Which side of the split to read.
        on_bad: What to do about bad documents: raise an error, or skip them.
        max_bytes: The maximum size of a document.
        classes: The labels that may occur; empty: any.
        ignored: Keys of messages that are not read.
    """

    fields: tuple[str, ...] = ("text",)
    held_out: float = 0.0
    split: Literal["train", "held_out"] = "train"
    on_bad: Literal["error", "skip"] = "error"
    max_bytes: int = 64_000_000
    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @staticmethod
    def from_data(
        data: Data, fields: tuple[str, ...], split: Literal["train", "held_out"] = "train"
    ) -> Selection:
        """Returns the selection that a recipe describes.

        Args:
            data: The recipe's section `data`.
            fields: The names of the fields that the objective reads.
            split: Which side of the split to read.
        """
        return Selection(
            fields,
            data.held_out,
            split,
            data.on_bad_document,
            int(data.max_document_mb * 1e6),
            tuple(data.classes),
            tuple(data.ignore_columns),
        )

    def read(self, manifest: Manifest, index: int) -> Documents:
        """Reads the selected documents of a row group.

        Args:
            manifest: The manifest.
            index: The index of the row group in it.

        Raises:
            InputError: The shard does not exist any more or has changed. If `on_bad` is "error",
                also: a document is bad (not UTF-8, no text, too long, invalid JSON), or the row
                group cannot be read. Names the file and the location.
        """
        group = manifest.group(index)
        shard = manifest.shards[group.shard]
        source = manifest.sources[shard.source]
        text_columns = formats.columns_to_read(source)
        try:
            raw = read_row_group(shard, source, group, text_columns, self.max_bytes)
        except UnreadableError as e:
            if self.on_bad == "error":
                raise
            empty = pa.array([], pa.large_string())
            return Documents(
                [empty] * len(self.fields),
                np.zeros(0, np.int64),
                Skipped(max(1, group.documents), str(e)),
            )
        marked = source.shape is not None
        columns = [_to_strings(raw.columns[name], marked) for name in text_columns]
        is_good, problems = self._check_texts(source, text_columns, columns)
        # The length of a string that is not UTF-8 is undefined, so bad text is not filtered.
        passes = np.ones(len(is_good), bool) if raw.passes is None else raw.passes
        on_text = [rule for rule in source.filters if rule.column in text_columns]
        tested = np.flatnonzero(is_good) if on_text else np.zeros(0, np.int64)
        good_text = {r.column: raw.columns[r.column].take(pa.array(tested)) for r in on_text}
        passes[tested] &= pass_all(good_text, on_text, len(tested), shard.path, shard.has_cells)
        keys = MessageKeys(self.ignored)
        if source.shape is not None:
            candidates = np.flatnonzero(is_good & passes)
            columns = [c.take(pa.array(candidates)) for c in columns]
            converted, unusable = formats.convert_rows(
                source, len(self.fields), columns, self.classes, keys
            )
            problems += [(int(candidates[i]), reason) for i, reason in unusable]
            columns = [_scatter(c, candidates, len(is_good)) for c in converted]
            is_good[candidates[[i for i, _ in unusable]]] = False
        # A bad document does not matter if the filters leave it out.
        bad = raw.bad + [BadDocument(raw.locate(i), reason) for i, reason in problems if passes[i]]
        skipped = Skipped()
        if bad:
            skipped = Skipped(len(bad), f"{shard.path}: {bad[0].location}: {bad[0].reason}")
            if self.on_bad == "error":
                raise BadDocumentsError(shard.path, bad)
        kept = np.flatnonzero(is_good & passes)
        if len(kept) < len(is_good):
            columns = [c.take(pa.array(kept)) for c in columns]
        if self.held_out:
            in_split = held_out(columns[0], self.held_out) == (self.split == "held_out")
            kept = kept[in_split]
            columns = [c.filter(pa.array(in_split)) for c in columns]
        return Documents(columns, kept, skipped, keys.unknown, raw.locate, shard.path, self.on_bad)

    def _check_texts(
        self, source: Source, names: Sequence[str], columns: Sequence[pa.Array]
    ) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Checks the text columns of a row group.

        Returns:
            bool [documents], whether each document is good; and the (index, reason) of the bad
            ones, with one reason each.
        """
        is_good = np.ones(len(columns[0]), bool)
        problems: list[tuple[int, str]] = []
        for name, column in zip(names, columns, strict=True):
            may_be_empty = source.shape is not None
            for i, reason in _bad_strings(column, self.max_bytes, may_be_empty):
                if is_good[i]:
                    problems.append((i, f"{reason} in {name!r}"))
                is_good[i] = False
        return is_good, problems


def texts(documents: Documents) -> list[list[str]]:
    """Returns the fields as lists of Python strings."""
    return [c.to_pylist() for c in documents.fields]


def buffers(strings: pa.Array) -> tuple[np.ndarray, memoryview]:
    """Returns the memory of an array of large strings, without copying it.

    Returns:
        int64 [strings + 1], the offsets at which the strings begin and end; and the UTF-8 bytes
        that they refer to.
    """
    _, offsets, data = strings.buffers()
    offsets = np.frombuffer(offsets, np.int64)
    offsets = offsets[strings.offset : strings.offset + len(strings) + 1]
    return offsets, memoryview(data if data is not None else b"")


def _to_strings(column: pa.ChunkedArray, marked: bool) -> pa.Array:
    """Returns a column as one array of large strings; nested values become JSON.

    Args:
        column: The column.
        marked: Whether this JSON is marked, see `messages.to_json`.
    """
    if pa.types.is_nested(column.type):
        return pa.array(
            [None if value is None else to_json(value, marked) for value in column.to_pylist()],
            pa.large_string(),
        )
    strings = column.cast(pa.large_string()).combine_chunks()
    return pa.concat_arrays(strings.chunks) if isinstance(strings, pa.ChunkedArray) else strings


def _scatter(column: pa.Array, indices: np.ndarray, length: int) -> pa.Array:
    """Returns an array of this length with the column's strings at these indices, else null."""
    positions = np.full(length, -1, np.int64)
    positions[indices] = np.arange(len(indices))
    return column.take(pa.array(positions, mask=positions < 0))


def _bad_strings(column: pa.Array, max_bytes: int, may_be_empty: bool) -> list[tuple[int, str]]:
    """Returns the (index, reason) of strings that cannot be trained on, sorted."""
    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy()
    bad: list[tuple[int, str]] = []
    if not may_be_empty:
        bad += [(int(i), "no text") for i in np.flatnonzero(sizes == 0)]
    for i in _indices(pc.match_substring(column, "\0")):
        bad.append((i, "a NUL character: expected text (UTF-16? see the source's `encoding`)"))
    for i in np.flatnonzero(sizes > max_bytes).tolist():
        size, limit = f"{sizes[i] / 1e6:.0f} MB", f"{max_bytes / 1e6:g} MB"
        bad.append((i, f"{size}, longer than {limit} (data.max_document_mb)"))
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        offsets, data = buffers(column)
        for i in range(len(column)):
            try:
                str(data[offsets[i] : offsets[i + 1]], "utf-8")
            except UnicodeDecodeError as e:
                bad.append((i, f"not UTF-8 at its byte {e.start}"))
        return sorted(bad)
    if not may_be_empty:
        bad += [(i, "no text but white space") for i in _indices(pc.utf8_is_space(column))]
    return sorted(bad)


def _indices(flags: pa.Array) -> list[int]:
    """Returns the indices at which an array of booleans is true."""
    indices: list[int] = np.flatnonzero(pc.fill_null(flags, False)).tolist()
    return indices


def held_out(column: pa.Array, part: float) -> np.ndarray:
    """Returns bool [documents], whether each document is held out from training.

    It depends on a hash of the document's bytes, so that all copies of a document are on the same
    side of the split.

    Args:
        column: The documents' strings.
        part: The share of the documents to hold out.
    """
    offsets, data = buffers(column)
    threshold = int(part * 2**64)
    hashes = (
        int.from_bytes(hashlib.blake2b(data[start:stop], digest_size=8).digest(), "little")
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    )
    return np.fromiter((h < threshold for h in hashes), bool, len(column))


def document_hash(parts: Sequence[str]) -> str:
    """Returns the hash by which the ledger identifies a document.

    Args:
        parts: The strings of the document's fields.

    Returns:
        blake2b of the fields, as 16 hexadecimal digits.
    """
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
