"""CSV and TSV: where rows end.

A cell may be quoted, and then holds delimiters, quotes (doubled) and newlines. So where a row ends
is known only from the beginning of the file, which is read once to find that out, when a run is
started.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sevenfold.data.sources.shards import MAX_GROUP_BYTES, Shard
from sevenfold.data.sources.text_blocks import blocks, count_lines_before, without_bom
from sevenfold.errors import InputError

DELIMITERS = {"csv": ",", "tsv": "\t"}
# A quote opens a cell only where the cell begins; `Q` is a doubled quote or the closing one.
_QUOTED = {
    name: re.compile(rb'(?<![^%b\r\n])"[^"]*+(?:""[^"]*+)*+("?)' % delimiter.encode())
    for name, delimiter in DELIMITERS.items()
}
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


class Rows(NamedTuple):
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


def _row_ends(text: Iterable[bytes], shard: Shard, start: int) -> Iterator[tuple[int, Rows]]:
    """Yields the rows of a text, some at a time, each with the offset that they count from."""
    data, base, lines = b"", start, 0
    for block in text:
        data += block
        found = find_rows(data, shard.format)
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
        found = find_rows(data, shard.format, is_end=True)
        if found.open_quote is not None:
            line = lines + 1 + (count_lines_before(shard, start) if start else 0)
            raise InputError(
                f"{shard.path}: line {line}: expected the end of the row, found the end of the file"
                f"{_describe_quote(data, found, line)}"
            )
        yield base, found


def _describe_quote(data: bytes, found: Rows, line: int) -> str:
    if found.open_quote is None:
        return ""
    opened = line + data.count(b"\n", 0, found.open_quote)
    return (
        f": a quote is opened on line {opened} and never closed: the file is truncated, or a cell "
        'that begins with a quote has to be written in quotes, with its own quotes doubled ("")'
    )


def find_rows(data: bytes, name: str, is_end: bool = False) -> Rows:
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
    return Rows(starts[~is_blank], ends[~is_blank], last, open_quote)


def header(file: Any, shard: Shard) -> tuple[bytes, int]:
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


def split_rows(file: Any, shard: Shard, text: Iterator[bytes], target_bytes: int) -> list[Piece]:
    """Divides the rows of an opened file, below its header, into pieces.

    Args:
        file: The file.
        shard: Its shard.
        text: Its whole text, in blocks.
        target_bytes: The size of a piece.
    """
    file.seek(0)
    _, start = header(file, shard)
    file.seek(0)
    return list(pieces(_skip(text, start), shard, target_bytes, start))


def _skip(text: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yields blocks without their first bytes."""
    for block in text:
        if count < len(block):
            yield block[count:]
        count = max(0, count - len(block))
