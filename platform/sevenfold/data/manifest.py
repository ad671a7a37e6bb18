"""The manifest: the list of all shards of all sources, each split into row groups.

It is computed when a run starts for the first time; the run uses it unchanged from then on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from sevenfold import storage
from sevenfold.data.sources import formats
from sevenfold.data.sources.reading import column_names
from sevenfold.data.sources.row_groups import split_shard
from sevenfold.data.sources.shards import (
    CHANGED_HINT,
    RowGroup,
    Shard,
    content_hash,
    describe,
    file_suffixes,
    fingerprint,
    wrong_content,
)
from sevenfold.data.sources.text_encoding import report_encodings, with_text_format
from sevenfold.errors import InputError
from sevenfold.recipe import Source
from sevenfold.recipe.locations import STORED

TARGET_BYTES = 2 * 2**20  # of text in a row group
# The smallest target, for text and for the rows of fine-tuning data.
_MIN_BYTES, _MIN_EXAMPLE_BYTES = 8 * 2**10, 2**10
# Local files up to this size together are hashed as a whole when a run is started.
HASHED_BYTES = 8 * 2**30
_THREADS = 16  # shards are examined in parallel, because remote storage is slow to respond
_ESTIMATED_TOKENS_PER_BYTE = 0.25  # before there is a tokenizer to measure it with

# The columns of Manifest.table.
_COLUMNS = tuple(f.name for f in fields(RowGroup))
_SHARD, _DOCUMENTS, _BYTES = (_COLUMNS.index(c) for c in ("shard", "documents", "bytes"))


@dataclass(frozen=True)
class Manifest(storage.CarriesSecrets):
    """The shards of some sources and their row groups, in the order of sources, shards and rows.

    Attributes:
        sources: The sources.
        shards: Their shards.
        table: int64 [row groups, 6], the fields of a RowGroup.
        skipped: An error message for each shard that was left out (on_bad_document: skip).
        tokens_per_byte: Tokens per byte of text of each source, measured on a sample; () as long
            as there is no tokenizer.
    """

    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    table: np.ndarray
    skipped: tuple[str, ...] = ()
    tokens_per_byte: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def group(self, index: int) -> RowGroup:
        """Returns a row group."""
        return RowGroup(*self.table[index].tolist())

    @functools.cached_property
    def bytes(self) -> int:
        """The total size of the text, uncompressed."""
        return int(self.table[:, _BYTES].sum())

    @property
    def documents(self) -> int | None:
        """The number of documents; None if it is unknown, because a text file was not read."""
        counts = self.table[:, _DOCUMENTS]
        return int(counts.sum()) if counts.all() else None

    @functools.cached_property
    def spans(self) -> tuple[range, ...]:
        """The indices of the row groups of each source."""
        source = np.array([s.source for s in self.shards])[self.table[:, _SHARD]]
        bounds = np.searchsorted(source, np.arange(len(self.sources) + 1))
        return tuple(range(int(start), int(stop)) for start, stop in itertools.pairwise(bounds))

    def tokens(self, source: int) -> float:
        """Returns the estimated number of tokens of a source."""
        span = self.spans[source]
        size = float(self.table[span.start : span.stop, _BYTES].sum())
        if not self.tokens_per_byte:
            return size * _ESTIMATED_TOKENS_PER_BYTE
        return size * self.tokens_per_byte[source]

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as a tree that can be stored as JSON."""
        return {
            "sources": [s.to_json() for s in self.sources],
            "shards": [s.to_json() for s in self.shards],
            "row_groups": {c: self.table[:, i].tolist() for i, c in enumerate(_COLUMNS)},
            "left_out": list(self.skipped),
            "tokens_per_byte": list(self.tokens_per_byte),
        }

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Manifest:
        """Returns the manifest that `to_json` converted; in earlier versions, URLs had secrets."""
        table = np.array([tree["row_groups"][c] for c in _COLUMNS], np.int64).T
        return Manifest(
            tuple(Source.model_validate(s, context={STORED: True}) for s in tree["sources"]),
            tuple(
                Shard(**s | {"path": storage.keep_secrets(s["path"], stored=True)})
                for s in tree["shards"]
            ),
            np.ascontiguousarray(table),
            tuple(map(storage.hide_secrets, tree["left_out"])),
            tuple(tree["tokens_per_byte"]),
        )

    def hash(self) -> str:
        """Returns a hash of what is read: the sources, shards and row groups."""
        tree = self.to_json()
        del tree["left_out"], tree["tokens_per_byte"]
        for shard in tree["shards"]:  # a copy of the data is the same data
            shard.pop("version", None)
            shard.pop("content", None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    def measured(self, tokens_per_byte: Sequence[float]) -> Manifest:
        """Returns the manifest with the tokens per byte of its sources filled in."""
        return replace(self, tokens_per_byte=tuple(tokens_per_byte))

    def recorded(self) -> Manifest:
        """Returns the manifest with what tells later whether a file has changed, wherever that is.

        That is the file's version and, of local files of up to HASHED_BYTES together, the hash of
        their content.
        """
        local = sum(s.file_bytes for s in self.shards if not storage.is_url(s.path))

        def record(shard: Shard) -> Shard:
            is_hashed = local <= HASHED_BYTES and not storage.is_url(shard.path)
            version = storage.version(shard.path)
            return replace(
                shard, version=version, content=content_hash(shard.path) if is_hashed else ""
            )

        with ThreadPoolExecutor(_THREADS) as pool:
            return replace(self, shards=tuple(pool.map(record, self.shards)))

    def check_unchanged(self) -> None:
        """Checks that the sources still consist of the same files with the same content.

        A file that was not written since is not read. Of one that was, such as a copy, the content
        is compared.

        Raises:
            InputError: A file is new, missing or has changed. Names the file.
        """
        recorded = {s.path for s in self.shards}
        current = {path for _, path in _list_files(self.sources)}
        skipped = {message.partition(": ")[0] for message in self.skipped}
        for path in sorted(recorded | (current - skipped)):
            if path not in current:
                raise InputError(f"{path}: is gone since this run began: {CHANGED_HINT}")
            if path not in recorded:
                raise InputError(f"{path}: is new since this run began: {CHANGED_HINT}")
        with ThreadPoolExecutor(_THREADS) as pool:
            results = pool.map(_has_changed, self.shards)
            for shard, has_changed in zip(self.shards, results, strict=True):
                if has_changed:
                    raise InputError(
                        f"{shard.path}: has changed since this run began: {CHANGED_HINT}"
                    )


def _has_changed(shard: Shard) -> bool:
    """Returns whether the content of a shard's file has changed since it was recorded."""
    if shard.version and storage.version(shard.path) == shard.version:
        return storage.size(shard.path) != shard.file_bytes
    if fingerprint(shard.path) != shard.fingerprint:
        return True
    return bool(shard.content) and content_hash(shard.path) != shard.content


def scan(
    sources: Sequence[Source],
    objective: str,
    chunks: int = 1,
    on_bad: Literal["error", "skip"] = "error",
    most: int = TARGET_BYTES,
    ignored_columns: Sequence[str] = (),
) -> Manifest:
    """Examines the files of all sources and splits them into row groups.

    It reads the footers of parquet files, the sizes of text files, and compressed files as a whole;
    no document is kept in memory.

    Args:
        sources: The sources.
        objective: The training objective, which determines the columns to read
            (`sevenfold.data.sources.formats`).
        chunks: The minimum number of chunks per epoch. The row groups of a small corpus are made
            small enough for it.
        on_bad: What to do about a bad shard: raise an error, or leave it out.
        most: The maximum size of a row group to aim for, bytes of text.
        ignored_columns: Columns that are not read although a format knows their names.

    Raises:
        InputError: A source contains no files or no documents. If `on_bad` is "error", also: a
            shard is not what its name says, lacks a column, is truncated, empty, a decompression
            bomb, or a copy of another.
    """
    files = _list_files(sources)
    skipped: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        described = pool.map(lambda item: describe(item[1], item[0], sources[item[0]]), files)
        shards = _without_copies(described, on_bad, skipped)
        shards = _with_text_formats(shards, sources, pool, on_bad, skipped)
        sources = [
            _recognise_columns(source, i, objective, shards, ignored_columns)
            for i, source in enumerate(sources)
        ]
        total = sum(shard.file_bytes for shard in shards)
        minimum = _MIN_EXAMPLE_BYTES if objective in formats.SHAPES else _MIN_BYTES
        # At most 3/4 of an equal share of each chunk, so that there are more row groups than chunks
        target = max(minimum, min(most, TARGET_BYTES, 3 * total // max(1, 4 * chunks)))

        groups: list[RowGroup] = []
        results = pool.map(
            lambda item: _row_groups_or_error(item[0], item[1], sources, target), enumerate(shards)
        )
        for result in results:
            if isinstance(result, str):
                _reject(result, on_bad, skipped)
            else:
                groups += result
    for i, source in enumerate(sources):
        if not any(shards[g.shard].source == i for g in groups):
            reason = f" ({skipped[0]})" if skipped else ""
            raise InputError(
                f"source {source.name!r}: expected documents in {source.path}, found none{reason}"
            )
    table = np.array([list(vars(g).values()) for g in groups], np.int64).reshape(-1, len(_COLUMNS))
    return Manifest(tuple(sources), tuple(shards), table, tuple(skipped))


def _list_files(sources: Sequence[Source]) -> list[tuple[int, str]]:
    """Returns (index of the source, path) of all files of the sources."""
    return [
        (i, path)
        for i, source in enumerate(sources)
        for path in storage.input_files(storage.resolve_input(source.path), file_suffixes(source))
    ]


def _without_copies(
    described: Iterable[Shard], on_bad: Literal["error", "skip"], skipped: list[str]
) -> list[Shard]:
    """Returns the shards without those whose content another shard has too; empty ones all stay."""
    shards: list[Shard] = []
    first_paths: dict[str, str] = {}  # by fingerprint
    for shard in described:
        if shard.fingerprint not in first_paths or shard.file_bytes == 0:
            first_paths.setdefault(shard.fingerprint, shard.path)
            shards.append(shard)
            continue
        first = first_paths[shard.fingerprint]
        problem = "is listed twice" if first == shard.path else f"is a copy of {first}"
        _reject(f"{shard.path}: {problem}: each file may be used only once", on_bad, skipped)
    return shards


def _with_text_formats(
    shards: Sequence[Shard],
    sources: Sequence[Source],
    pool: ThreadPoolExecutor,
    on_bad: Literal["error", "skip"],
    skipped: list[str],
) -> list[Shard]:
    """Returns the shards with their encodings and newlines, without those that are damaged."""

    def examine(shard: Shard) -> Shard | str:
        try:
            return with_text_format(shard, sources[shard.source])
        except InputError as e:
            return str(e)
        except (OSError, EOFError) as e:
            return str(wrong_content(shard, e))

    examined: list[Shard] = []
    for result in pool.map(examine, shards):
        if isinstance(result, str):
            _reject(result, on_bad, skipped)
        else:
            examined.append(result)
    report_encodings(examined, sources)
    return examined


def _recognise_columns(
    source: Source,
    index: int,
    objective: str,
    shards: Sequence[Shard],
    ignored_columns: Sequence[str],
) -> Source:
    """Returns a source with its shape and columns filled in from its first shard."""
    first = next((shard for shard in shards if shard.source == index), None)
    if first is None or objective not in formats.SHAPES:
        return source
    more = first.format == "jsonl"  # the keys of its first line; other lines may have more
    return formats.recognise(
        source, objective, column_names(first), first.path, more, ignored_columns
    )


def _row_groups_or_error(
    index: int, shard: Shard, sources: Sequence[Source], target_bytes: int
) -> list[RowGroup] | str:
    """Returns the row groups of a shard, or an error message if it cannot be read."""
    source = sources[shard.source]
    text_columns = formats.columns_to_read(source)
    filter_columns = sorted({f.column for f in source.filters} - set(text_columns))
    try:
        return split_shard(index, shard, source, text_columns, filter_columns, target_bytes)
    except InputError as e:
        return str(e)


def _reject(message: str, on_bad: Literal["error", "skip"], skipped: list[str]) -> None:
    """Raises InputError about a shard, or leaves the shard out.

    Args:
        message: What is wrong with the shard; begins with its path.
        on_bad: Whether to raise or to skip.
        skipped: The messages about shards that are left out; this one is appended.
    """
    if on_bad == "error":
        raise InputError(f"{message}; or skip such files (data.on_bad_document=skip)")
    skipped.append(message)
