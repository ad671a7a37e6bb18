"""Text files as streams of bytes, compressed or not, and the documents in a range of their bytes.

All offsets count uncompressed bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from sevenfold import storage
from sevenfold.data.sources.shards import Shard

BLOCK_BYTES = 2**20


class DocumentRange(NamedTuple):
    """The documents that begin in a range of bytes.

    Attributes:
        start: The offset at which the first document begins.
        data: The documents, with the separators between them.
        too_long: The offset of a last document that is longer than allowed, and so missing from
            `data`; else None.
    """

    start: int
    data: bytes
    too_long: int | None


def decompressing(file: Any, compression: str | None) -> Any:
    """Returns an opened file as a stream of its uncompressed bytes."""
    if compression is None:
        return file
    return pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)


def blocks(file: Any, compression: str | None) -> Iterator[bytes]:
    """Yields the uncompressed bytes of an opened file, block by block."""
    stream = decompressing(file, compression)
    while block := stream.read(BLOCK_BYTES):
        yield block


def blocks_from(file: Any, compression: str | None, offset: int) -> Iterator[bytes]:
    """Yields the uncompressed bytes of an opened file from an offset on.

    A compressed file is decompressed from its beginning.
    """
    if not compression:
        file.seek(offset)
        yield from blocks(file, None)
        return
    block_end = 0
    for block in blocks(file, compression):
        block_end += len(block)
        if block_end > offset:
            block_start = block_end - len(block)
            yield block[max(0, offset - block_start) :]


def first_line_blocks(file: Any, compression: str | None) -> Iterator[bytes]:
    """Yields the blocks up to the one in which the first line that is not blank ends."""
    text_seen = False
    for block in blocks(file, compression):
        yield block
        text_seen = text_seen or bool(block.strip())
        if text_seen and b"\n" in block.lstrip():
            return


def count_lines_before(shard: Shard, offset: int) -> int:
    """Returns the number of lines that end before an offset; reads the file up to there."""
    lines = block_start = 0
    with storage.open_read(shard.path) as file:
        for block in blocks(file, shard.compression):
            lines += block[: offset - block_start].count(b"\n")
            block_start += len(block)
            if block_start >= offset:
                break
    return lines


def read_documents(
    file: Any, compression: str | None, separator: bytes, start: int, end: int, max_bytes: int
) -> DocumentRange:
    """Reads the documents that begin in the bytes [start, end) of a text file.

    A document begins at offset 0 and after each separator. So wherever a file is split into ranges,
    each document belongs to exactly one of them. The last document of a range is read to its end,
    also beyond `end`.

    Args:
        file: The opened file.
        compression: As in `Shard`.
        separator: The bytes between documents; b"" if the whole file is one document.
        start: The first offset of the range.
        end: One past its last offset.
        max_bytes: The size at which a document that reaches beyond `end` is left out instead of
            being read to its end.
    """
    width = len(separator)
    # The offset of data[0] in the file. A separator may end exactly at `start`.
    base = max(0, start - width)
    source = blocks_from(file, compression, base)
    data = bytearray()

    def read_more() -> bool:
        block = next(source, b"")
        data.extend(block)
        return bool(block)

    while len(data) < end - base and read_more():
        pass
    first = 0  # where the first document begins in `data`
    if start > 0:
        separator_at = data.find(separator)
        if separator_at < 0 or separator_at + width + base >= end:
            return DocumentRange(start, b"", None)
        first = separator_at + width
    if not width:
        return DocumentRange(start, bytes(data), None)
    # The next range looks for its first document from the same offset on, so that the ranges fit
    # together.
    search_from = max(0, end - width - base)
    while (separator_at := data.find(separator, search_from)) < 0:
        # A separator may lie across the end of the data that has been read so far.
        search_from = max(search_from, len(data) - width + 1)
        previous = data.rfind(separator, first, end - base)
        last = previous + width if previous >= 0 else first
        if len(data) - last > max_bytes:
            return DocumentRange(base + first, bytes(data[first:last]), base + last)
        if not read_more():
            return DocumentRange(base + first, bytes(data[first:]), None)
    return DocumentRange(base + first, bytes(data[first : max(first, separator_at + width)]), None)
