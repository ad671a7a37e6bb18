"""Examines the files of all sources, once, when a run is started: the result is a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from sevenfold import storage
from sevenfold.data.manifest import COLUMNS, Manifest, reading_threads
from sevenfold.data.sources import formats
from sevenfold.data.sources.csv_cells import header_hint
from sevenfold.data.sources.documents import Selection
from sevenfold.data.sources.reading import column_names
from sevenfold.data.sources.row_groups import estimated_size, split_shard
from sevenfold.data.sources.shards import (
    COMPRESSIONS,
    RowGroup,
    Shard,
    is_divided_by_files,
    named_shard,
    read_tail,
    wrong_content,
)
from sevenfold.data.sources.source_files import find_files, report_unread
from sevenfold.data.sources.text_encoding import report_encodings, with_text_format
from sevenfold.errors import InputError
from sevenfold.recipe import Source
from sevenfold.report.console import say

TARGET_BYTES = 2 * 2**20  # of text in a row group
# The smallest target, for text and for the rows of fine-tuning data.
_MIN_BYTES, _MIN_EXAMPLE_BYTES = 8 * 2**10, 2**10
# Compressed files of up to this size together are decompressed at the start, which finds damaged
# ones. Of more, the sizes are estimated: a driver would take hours for them.
DECOMPRESSED_BYTES = 256 * 2**20

_File = tuple[int, storage.InputFile]  # the index of the source, and the file


class _Examined(NamedTuple):
    """A file that was examined."""

    shard: Shard
    groups: list[RowGroup]


def scan(
    sources: Sequence[Source],
    objective: str,
    chunks: int = 1,
    on_bad: Literal["error", "skip"] = "error",
    most: int = TARGET_BYTES,
    ignored_columns: Sequence[str] = (),
    max_bytes: int = Selection.max_bytes,
    reported: set[str] | None = None,
) -> Manifest:
    """Examines the files of all sources and splits them into row groups.

    Each file is opened once. Of parquet files the footer is read, of text files the beginning, of
    all files the end; compressed files are read as a whole unless they are large. No document is
    kept in memory.

    Args:
        sources: The sources.
        objective: The training objective, which determines the columns to read
            (`sevenfold.data.sources.formats`).
        chunks: The minimum number of chunks per epoch. The row groups of a small corpus are made
            small enough for it.
        on_bad: What to do about a bad shard: raise an error, or leave it out.
        most: The maximum size of a row group to aim for, bytes of text.
        ignored_columns: Columns that are not read although a format knows their names.
        max_bytes: The maximum size of a document.
        reported: What was said already of the sources' folders, so that it is said once of a folder
            that several splits are read from; what is said now is added.

    Raises:
        InputError: A source contains no files or no documents. If `on_bad` is "error", also: a
            shard is not what its name says, lacks a column, is truncated, empty, a decompression
            bomb, or a copy of another.
    """
    reported = set() if reported is None else reported
    found = [find_files(source) for source in sources]
    for source, (_, unread) in zip(sources, found, strict=True):
        report_unread(source, unread, reported)
    files = [(i, file) for i, source_files in enumerate(found) for file in source_files.files]
    whole = [
        is_divided_by_files(source, [file.path for file in source_files.files])
        for source, source_files in zip(sources, found, strict=True)
    ]
    # what follows reads each line as a document, unless the shard says otherwise
    sources = [source.model_copy(update={"separator": source.lines}) for source in sources]
    skipped: list[str] = []
    with reading_threads(file.path for _, file in files) as pool:
        sources = [
            _recognise_columns(source, i, objective, files, on_bad, ignored_columns)
            for i, source in enumerate(sources)
        ]
        sizes = list(pool.map(_size, files))
        minimum = _MIN_EXAMPLE_BYTES if objective in formats.SHAPES else _MIN_BYTES
        # At most 3/4 of an equal share of each chunk, so that there are more row groups than chunks
        target = max(minimum, min(most, TARGET_BYTES, 3 * sum(sizes) // max(1, 4 * chunks)))
        most_whole = [max_bytes if is_whole else -1 for is_whole in whole]
        examined = _examine_all(pool, files, sizes, sources, target, most_whole)
        shards, table = _kept(examined, on_bad, skipped)
    _report_whole_files(shards, sources, whole, max_bytes, reported)
    report_encodings(shards, sources)
    source_of_group = np.array([shard.source for shard in shards], np.int64)[table[:, 0]]
    for i, source in enumerate(sources):
        if not (source_of_group == i).any():
            reason = f" ({skipped[0]})" if skipped else ""
            raise InputError(
                f"source {source.name!r}: expected documents in {source.path}, found none{reason}"
            )
    return Manifest(tuple(sources), tuple(shards), table, tuple(skipped))


def _size(item: _File) -> int:
    """Returns the size of a file; one that cannot be opened is reported when it is examined."""
    file = item[1]
    if file.size is not None:
        return file.size
    try:
        return storage.size(file.path)
    except (InputError, OSError):
        return 0


def _recognise_columns(
    source: Source,
    index: int,
    objective: str,
    files: Sequence[_File],
    on_bad: Literal["error", "skip"],
    ignored_columns: Sequence[str],
) -> Source:
    """Returns a source with its shape and columns filled in from its first readable file."""
    if objective not in formats.SHAPES:
        return source
    for _, file in (item for item in files if item[0] == index):
        try:
            shard = named_shard(file.path, index, source)
            with storage.open_read(file.path) as opened:
                shard = _with_text_format(shard, source, opened)
            names = column_names(shard)
        except InputError:
            if on_bad == "error":
                raise
            continue  # it is left out when it is examined
        more = shard.format == "jsonl"  # the keys of its first line; other lines may have more
        try:
            return formats.recognise(source, objective, names, shard.path, more, ignored_columns)
        except InputError as e:
            raise InputError(f"{e}{header_hint(shard, names)}") from None
    return source


def _examine_all(
    pool: ThreadPoolExecutor,
    files: Sequence[_File],
    sizes: Sequence[int],
    sources: Sequence[Source],
    target_bytes: int,
    most_whole: Sequence[int],
) -> Iterable[_Examined | str]:
    """Yields each file's shard and row groups, or an error message if it cannot be used.

    Args:
        pool: The threads that read the files.
        files: The files.
        sizes: Their sizes.
        sources: The sources.
        target_bytes: The size of row groups to aim for.
        most_whole: Of each source, up to which size a text file is one document.
    """
    decoded = sum(
        size
        for (i, file), size in zip(files, sizes, strict=True)
        if sources[i].encoding or file.path.lower().endswith(tuple(COMPRESSIONS))
    )
    text_columns = [formats.columns_to_read(source) for source in sources]
    filter_columns = [
        sorted({rule.column for rule in source.filters} - set(columns))
        for source, columns in zip(sources, text_columns, strict=True)
    ]

    def examine(item: tuple[int, _File]) -> _Examined | str:
        number, (index, file) = item
        source = sources[index]
        try:
            shard = named_shard(file.path, index, source)
            with storage.open_read(file.path) as opened:
                tail = read_tail(opened)
                shard = replace(shard, fingerprint=tail.fingerprint, version=file.version)
                if shard.format == "txt" and most_whole[index] >= 0:
                    size, _ = _decoded_size(shard, opened)
                    shard = replace(shard, whole=size <= most_whole[index])
                shard = _with_text_format(shard, source, opened)
                groups = split_shard(
                    number,
                    shard,
                    source,
                    text_columns[index],
                    filter_columns[index],
                    target_bytes,
                    opened,
                    tail.data,
                    estimate=decoded > DECOMPRESSED_BYTES,
                )
            return _Examined(shard, groups)
        except InputError as e:
            return str(e)

    return pool.map(examine, enumerate(files))


def _report_whole_files(
    shards: Sequence[Shard],
    sources: Sequence[Source],
    whole: Sequence[bool],
    max_bytes: int,
    reported: set[str],
) -> None:
    """Says how the text files of each source are divided, if that follows from their number."""
    for index, source in enumerate(sources):
        text = [s.whole for s in shards if s.source == index and s.format == "txt"]
        key = f"text files of {source.path}"
        if not whole[index] or not text or key in reported:
            continue
        reported.add(key)
        large, s = "", "" if len(text) == 1 else "s"
        if count := text.count(False):
            large = (
                f"; but {count:,}, larger than {max_bytes / 1e6:g} MB (data.max_document_mb), "
                "one document per line"
            )
        say(
            f"source {source.name}: {len(text):,} text file{s}, each one document{large} "
            '(separator: "\\n" makes each line a document)'
        )


def _decoded_size(shard: Shard, file: storage.Reader) -> tuple[int, bool]:
    if not shard.compression:
        return shard.file_bytes, False
    try:
        return estimated_size(shard, file)
    except (OSError, EOFError) as e:
        raise wrong_content(shard, e) from None


def _with_text_format(shard: Shard, source: Source, file: storage.Reader) -> Shard:
    try:
        return with_text_format(shard, source, file)
    except (pa.ArrowException, OSError, EOFError) as e:
        raise wrong_content(shard, e) from None


def _kept(
    examined: Iterable[_Examined | str], on_bad: Literal["error", "skip"], skipped: list[str]
) -> tuple[list[Shard], np.ndarray]:
    """Returns the shards that are used, and the table of their row groups.

    A shard whose content another one has too is not used, unless it is empty.

    Args:
        examined: What was found in each file, or what is wrong with it.
        on_bad: Whether to raise or to skip.
        skipped: Receives the messages about shards that are left out.
    """
    shards: list[Shard] = []
    rows: list[tuple[int, ...]] = []
    first_paths: dict[str, str] = {}  # by fingerprint
    for item in examined:
        if isinstance(item, str):
            _reject(item, on_bad, skipped)
            continue
        shard = item.shard
        first = first_paths.setdefault(shard.fingerprint, shard.path)
        if first is not shard.path and shard.file_bytes:
            problem = "is listed twice" if first == shard.path else f"is a copy of {first}"
            _reject(f"{shard.path}: {problem}: each file may be used only once", on_bad, skipped)
            continue
        number = len(shards)
        rows += [(number, g.index, g.start, g.end, g.documents, g.bytes) for g in item.groups]
        shards.append(shard)
    return shards, np.array(rows, np.int64).reshape(-1, len(COLUMNS))


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
