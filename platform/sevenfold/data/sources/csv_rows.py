"""CSV and TSV: where rows end, the names of the columns, and the cells of rows as text.

A cell may be quoted, and then holds delimiters, quotes (doubled) and newlines. So where a row ends
is known only from the beginning of the file, which is read once to find that out, when a run is
started. Cells are text, as they are written; an empty cell is a missing value.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from sevenfold import storage
from sevenfold.data.sources.filters import numbers_of, pass_all
from sevenfold.data.sources.shards import (
    MAX_GROUP_BYTES,
    BadDocument,
    RawDocuments,
    RowGroup,
    Shard,
)
from sevenfold.data.sources.text_blocks import (
    blocks,
    blocks_from,
    count_lines_before,
    without_bom,
)
from sevenfold.errors import InputError
from sevenfold.recipe import Filter, Source

DELIMITERS = {"csv": ",", "tsv": "\t"}
# A quote opens a cell only where the cell begins; `Q` is a doubled quote or the closing one.
_QUOTED = {
    name: re.compile(rb'(?<![^%b\r\n])"[^"]*+(?:""[^"]*+)*+("?)' % delimiter.encode())
    for name, delimiter in DELIMITERS.items()
}
NEWLINE = b"\n"
_SMALL_BLOCK = 64 * 2**10  # read for the header


class Piece(NamedTuple):
    """Some rows that follow each other.

    Attributes:
        start: The offset of the first one, in bytes of the decoded text.
        end: The offset where the last one ends.
        rows: Their number, without blank lines.
    """

    start: int
    end: int
    rows: int


class _Ends(NamedTuple):
    """The rows in some text.

    Attributes:
        starts: int64 [rows], where each row begins; blank lines are no rows.
        ends: int64 [rows], where each row ends, after its newline.
        last: Where the last row or blank line ends.
        open_quote: Where a quote opens that is not closed in this text, None if there is none.
    """

    starts: np.ndarray
    ends: np.ndarray
    last: int
    open_quote: int | None


def pieces(
    text: Iterable[bytes], shard: Shard, target_bytes: int, start: int = 0
) -> Iterator[Piece]:
    """Divides rows into pieces of at least `target_bytes`, but for the last one.

    Args:
        text: The text from the beginning of a row on, block by block.
        shard: Its shard.
        target_bytes: The size of a piece.
        start: The offset of the text in the shard.

    Raises:
        InputError: A quote is not closed.
    """
    first, rows = start, 0
    for base, found in _row_ends(text, shard, start):
        ends = found.ends + base
        taken = 0
        while True:
            # the row with which the piece becomes large enough
            last = int(np.searchsorted(ends, first + target_bytes))
            if last >= len(ends):
                break
            yield Piece(first, int(ends[last]), rows + last + 1 - taken)
            first, rows, taken = int(ends[last]), 0, last + 1
        rows += len(ends) - taken
        end = int(ends[-1]) if len(ends) else first
    if rows:
        yield Piece(first, end, rows)


def _row_ends(text: Iterable[bytes], shard: Shard, start: int) -> Iterator[tuple[int, _Ends]]:
    """Yields the rows of a text, some at a time, each with the offset that they count from."""
    data, base, lines = b"", start, 0
    for block in text:
        data += block
        found = _find_rows(data, shard.format)
        if found.last:
            yield base, found
            lines += data.count(b"\n", 0, found.last)
            data, base = data[found.last :], base + found.last
        elif len(data) > MAX_GROUP_BYTES:
            line = lines + 1 + (count_lines_before(shard, start) if start else 0)
            raise InputError(
                f"{shard.path}: line {line}: expected a row of at most {MAX_GROUP_BYTES >> 20} "
                f"MiB, found more{_describe_quote(data, found, line)}"
            )
    if data:
        found = _find_rows(data, shard.format, is_end=True)
        if found.open_quote is not None:
            line = lines + 1 + (count_lines_before(shard, start) if start else 0)
            raise InputError(
                f"{shard.path}: line {line}: expected the end of the row, found the end of the file"
                f"{_describe_quote(data, found, line)}"
            )
        yield base, found


def _describe_quote(data: bytes, found: _Ends, line: int) -> str:
    if found.open_quote is None:
        return ""
    opened = line + data.count(b"\n", 0, found.open_quote)
    return (
        f": a quote is opened on line {opened} and never closed: the file is truncated, or a cell "
        'that begins with a quote has to be written in quotes, with its own quotes doubled ("")'
    )


def _find_rows(data: bytes, name: str, is_end: bool = False) -> _Ends:
    """Finds the rows in text that begins with a row.

    Args:
        data: The text.
        name: The file format.
        is_end: Whether the file ends with this text, else more may follow.
    """
    limit, open_quote = len(data), None
    spans: list[tuple[int, int]] = []
    if b'"' in data:
        for match in _QUOTED[name].finditer(data):
            # a closing quote at the end may be the first half of a doubled one
            if not match[1] or (match.end() == len(data) and not is_end):
                limit = open_quote = match.start()
                break
            spans.append(match.span())
    content = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(content[:limit] == ord("\n"))
    if spans:
        first, stop = np.array(spans).T
        inside = np.searchsorted(first, ends, "right") - 1
        ends = ends[(inside < 0) | (ends >= stop[inside])]
    ends = ends + 1
    if is_end and open_quote is None and (not len(ends) or ends[-1] < len(data)):
        ends = np.append(ends, len(data))
    last = int(ends[-1]) if len(ends) else 0
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    sizes = ends - starts
    is_blank = (sizes == 1) & (content[starts] == ord("\n"))
    is_blank |= (sizes == 2) & (content[starts] == ord("\r"))
    return _Ends(starts[~is_blank], ends[~is_blank], last, open_quote)


def _header_end(file: Any, shard: Shard) -> tuple[bytes, int]:
    """Returns the first row of a file without a byte order mark, and the offset where it ends."""
    head: list[bytes] = []
    skipped = 0

    def text() -> Iterator[bytes]:
        nonlocal skipped
        for block in blocks(file, shard, _SMALL_BLOCK):
            plain = block if head else without_bom(block)
            skipped += len(block) - len(plain)
            head.append(plain)
            yield plain

    for base, found in _row_ends(text(), shard, 0):
        if len(found.ends):
            end = base + int(found.ends[0])
            start = base + int(found.starts[0])
            return b"".join(head)[start:end], end + skipped
    return b"", 0


def column_names(file: Any, shard: Shard) -> list[str]:
    """Returns the names in the header of an opened file.

    A column without a name is called as pandas calls it, which writes its index that way.

    Raises:
        InputError: There is no header, or it names two columns alike.
    """
    file.seek(0)
    row, _ = _header_end(file, shard)
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


def split_rows(file: Any, shard: Shard, text: Iterator[bytes], target_bytes: int) -> list[Piece]:
    """Divides the rows of an opened file, below its header, into pieces.

    Args:
        file: The file.
        shard: Its shard.
        text: Its whole text, in blocks.
        target_bytes: The size of a piece.
    """
    file.seek(0)
    _, start = _header_end(file, shard)
    file.seek(0)
    return list(pieces(_skip(text, start), shard, target_bytes, start))


def _skip(text: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yields blocks without their first bytes."""
    for block in text:
        if count < len(block):
            yield block[count:]
        count = max(0, count - len(block))


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
        return count_lines_before(shard, start), _find_rows(text, shard.format, True).starts

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
