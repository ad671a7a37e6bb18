"""CSV and TSV: the names of the columns, and the cells of rows, which pyarrow parses.

Cells are text, as they are written; an empty cell is a missing value.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from sevenfold import storage
from sevenfold.data.sources.csv_rows import DELIMITERS, find_rows, header
from sevenfold.data.sources.filters import numbers_of, pass_all
from sevenfold.data.sources.shards import BadDocument, RawDocuments, RowGroup, Shard
from sevenfold.data.sources.text_blocks import blocks_from, count_lines_before
from sevenfold.errors import InputError
from sevenfold.recipe import Filter, Source

NEWLINE = b"\n"


def column_names(file: Any, shard: Shard) -> list[str]:
    """Returns the names in the header of an opened file.

    A column without a name is called as pandas calls it, which writes its index that way.

    Raises:
        InputError: There is no header, or it names two columns alike.
    """
    file.seek(0)
    row, _ = header(file, shard)
    if not row:
        raise InputError(f"{shard.path}: expected a header, found an empty file")
    try:
        row.decode()
    except UnicodeDecodeError as e:
        raise InputError(
            f"{shard.path}: first line: not UTF-8 at its byte {e.start} (see the source's "
            "`encoding`)"
        ) from None
    row = row.rstrip(b"\r\n") + NEWLINE
    names = pyarrow.csv.read_csv(
        pa.BufferReader(row),
        pyarrow.csv.ReadOptions(use_threads=False, block_size=len(row) + 1),
        _parse_options(shard),
    ).column_names
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{shard.path}: first line: expected a name of its own for each column, found "
            f"{', '.join(map(repr, twice))} twice: rename one of them"
        )
    return names


def header_hint(shard: Shard, names: Sequence[str]) -> str:
    """Returns what may be wrong with a file whose header lacks a column; "" if it is no CSV."""
    if shard.format not in DELIMITERS:
        return ""
    only = names[0] if len(names) == 1 else ""
    for mark, what in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
        if mark in only:
            kind = {"\t": "tsv", ",": "csv"}.get(mark)
            fix = f"set the source's `format` to {kind}" if kind else "write it with commas"
            return f"; its first line is divided by {what}: {fix}"
    return f"; the first line of a {shard.format.upper()} file names its columns"


def _parse_options(shard: Shard, **more: Any) -> Any:
    return pyarrow.csv.ParseOptions(
        delimiter=DELIMITERS[shard.format], newlines_in_values=True, **more
    )


def read_rows(
    file: Any, shard: Shard, source: Source, group: RowGroup, text_columns: Sequence[str]
) -> RawDocuments:
    """Reads the rows of a row group from an opened file."""
    text = read_piece(file, shard, group.start, group.end)
    needed = [*text_columns, *(rule.column for rule in source.filters)]
    cells = parse(text, shard, _cached_names(shard), needed)
    return _to_documents(cells, text, group.start, shard, text_columns, source.filters)


def read_piece(file: Any, shard: Shard, start: int, end: int) -> bytes:
    """Returns a range of bytes of the decoded text of an opened file."""
    data = bytearray()
    for block in blocks_from(file, shard, start):
        data += block
        if len(data) >= end - start:
            return bytes(data[: end - start])
    raise EOFError(f"ended at byte {start + len(data)}")


@functools.lru_cache(maxsize=1024)
def _cached_names(shard: Shard) -> list[str]:
    with storage.open_read(shard.path) as file:
        return column_names(file, shard)


class Cells(NamedTuple):
    """The cells of some rows.

    Attributes:
        table: The cells of the rows that have as many as the header.
        numbers: int64 [rows of the table], the number of each among all rows; the first is 0.
        ragged: What is wrong with the other rows, by their numbers.
    """

    table: pa.Table
    numbers: np.ndarray
    ragged: dict[int, str]


def parse(text: bytes, shard: Shard, names: Sequence[str], columns: Iterable[str]) -> Cells:
    """Parses rows, with pyarrow.

    Args:
        text: The rows.
        shard: The shard that they are from.
        names: The names of all its columns.
        columns: The columns to return.
    """
    ragged: dict[int, str] = {}  # by the number of the row

    def reject(row: Any) -> str:
        found, expected = row.actual_columns, row.expected_columns
        ragged[row.number - 1] = f"expected {expected} cells, as in the header, found {found}"
        return "skip"

    needed = list(dict.fromkeys(columns))
    table = pyarrow.csv.read_csv(
        pa.BufferReader(text),
        pyarrow.csv.ReadOptions(
            use_threads=False, block_size=len(text) + 1, column_names=list(names)
        ),
        _parse_options(shard, invalid_row_handler=reject),
        pyarrow.csv.ConvertOptions(
            check_utf8=False,  # bad text is named later, by its row
            include_columns=needed,
            column_types=dict.fromkeys(needed, pa.large_string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    return Cells(table, np.delete(np.arange(len(table) + len(ragged)), sorted(ragged)), ragged)


def _to_documents(
    cells: Cells,
    text: bytes,
    start: int,
    shard: Shard,
    columns: Sequence[str],
    filters: Sequence[Filter],
) -> RawDocuments:
    """Returns rows as documents.

    Args:
        cells: Their cells.
        text: Their text.
        start: Its offset in the shard, in decoded bytes.
        shard: The shard, whose lines are counted when a location has to be named.
        columns: The columns that documents are made from.
        filters: The filters of the source.
    """
    table, numbers, ragged = cells

    @functools.cache
    def starts() -> tuple[int, np.ndarray]:
        return count_lines_before(shard, start), find_rows(text, shard.format, True).starts

    def locate(number: int) -> str:
        before, begins = starts()
        return f"line {before + text[: int(begins[number])].count(NEWLINE) + 1}"

    reasons = {int(numbers[i]): reason for i, reason in _not_comparable(table, columns, filters)}
    keep = np.flatnonzero(~np.isin(numbers, list(reasons)))
    table, numbers = table.take(pa.array(keep)), numbers[keep]
    bad = [BadDocument(locate(i), reason) for i, reason in sorted((ragged | reasons).items())]
    rules = [rule for rule in filters if rule.column not in columns]
    passes = pass_all(table, rules, len(table), shard.path, True) if rules else None
    return RawDocuments(
        {name: table[name] for name in columns}, lambda i: locate(int(numbers[i])), bad, passes
    )


def _not_comparable(
    table: pa.Table, columns: Sequence[str], filters: Sequence[Filter]
) -> Iterator[tuple[int, str]]:
    """Yields the (index, reason) of rows with a cell to which a filter cannot be applied."""
    for rule in filters:
        column = table[rule.column]
        raw = None
        if rule.column not in columns:  # the columns of text are checked later
            try:
                column.validate(full=True)
            except pa.ArrowInvalid:
                raw = column.cast(pa.large_binary()).to_pylist()
                for i, cell in enumerate(raw):
                    try:
                        (cell or b"").decode()
                    except UnicodeDecodeError as e:
                        yield i, f"not UTF-8 at its byte {e.start} in {rule.column!r}"
        if raw is None and (rule.min is not None or rule.max is not None):
            wrong = pc.and_(pc.is_valid(column), pc.is_null(numbers_of(column)))
            for i in np.flatnonzero(wrong.to_numpy(zero_copy_only=False)).tolist():
                found = column[i].cast(pa.large_binary()).as_py().decode(errors="replace")[:40]
                yield (
                    i,
                    f"column {rule.column!r}: expected a number for the filter on it, found "
                    f"{found!r}",
                )
