"""Text files as streams of bytes in UTF-8, and the documents in a range of their bytes.

A file that is compressed, or in another encoding than UTF-8, is decoded from its beginning. All
offsets count bytes of the decoded text.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from sevenfold import storage
from sevenfold.data.sources.shards import Shard

try:
    from compression import zstd
except ImportError:  # Python before 3.14
    from backports import zstd

BLOCK_BYTES = 2**20
_WINDOW_LOG = 31  # of `zstd --long=31`, the maximum; each file uses as much memory as it asks for


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


class Separator:
    r"""The text between two documents.

    Lines may end with \n or \r\n, in the separator and in the file, whichever the other has.

    Args:
        text: The text; "" if each file is one document.

    Attributes:
        width: The maximum number of its bytes in a file.
    """

    def __init__(self, text: str):
        self._plain = text.replace("\r\n", "\n").encode()
        self.width = len(self._plain)
        # A \r before a newline that comes first is left to the document, whose end is stripped.
        first, rest = self._plain[:1], self._plain[1:]
        self._pattern = None
        if b"\n" in rest:
            self.width += rest.count(b"\n")
            pattern = re.escape(first) + re.escape(rest).replace(b"\\\n", b"\r?\n")
            self._pattern = re.compile(pattern)

    def find(self, data: bytes | bytearray, start: int) -> tuple[int, int] | None:
        """Returns where the first separator from an offset on begins and ends, None without one."""
        if self._pattern is not None:
            match = self._pattern.search(data, start)
            return None if match is None else match.span()
        position = data.find(self._plain, start)
        return None if position < 0 else (position, position + self.width)

    def last_end(self, data: bytes | bytearray, start: int, stop: int) -> int | None:
        """Returns where the last separator in a range of the data ends, None without one."""
        if self._pattern is not None:
            ends = [match.end() for match in self._pattern.finditer(data, start, stop)]
            return ends[-1] if ends else None
        position = data.rfind(self._plain, start, stop)
        return None if position < 0 else position + self.width

    def split(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yields the offset and the bytes of each part of the data between separators."""
        start = 0
        while self.width and (found := self.find(data, start)) is not None:
            yield start, data[start : found[0]]
            start = found[1]
        yield start, data[start:]


def blocks(file: Any, shard: Shard, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yields the text of an opened file from where it is, in UTF-8, block by block.

    Args:
        file: The file.
        shard: Its shard.
        size: The bytes of a block, before other encodings are converted.

    Raises:
        OSError: The file is damaged, or is not in the shard's encoding.
        EOFError: It is truncated.
    """
    raw = _decompressed(file, shard.compression, size)
    decoded = _in_utf8(raw, shard.encoding) if shard.encoding else raw
    for block in decoded:
        yield block.replace(b"\r", b"\n") if shard.newline == "CR" else block


def _decompressed(file: Any, compression: str | None, size: int) -> Iterator[bytes]:
    stream = file
    if compression == "gzip":
        stream = gzip.GzipFile(fileobj=file)  # reads several members, and zeros after the last one
    elif compression == "zstd":
        limit = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
        stream = zstd.ZstdFile(file, options=limit)
    try:
        while block := stream.read(size):
            yield block
    except (zlib.error, zstd.ZstdError) as e:
        raise OSError(str(e)) from None


def _in_utf8(raw: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Yields text of another encoding in UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    try:
        for block in raw:
            yield decoder.decode(block).encode()
            offset += len(block)
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as e:  # a lone surrogate, too, has no form in UTF-8
        near = offset + getattr(e, "start", 0)
        raise OSError(f"not {encoding} near its byte {near:,}") from None


def without_bom(data: bytes) -> bytes:
    """Returns the beginning of a text without the byte order mark that some programs write."""
    return data.removeprefix(codecs.BOM_UTF8)


def blocks_from(file: Any, shard: Shard, offset: int) -> Iterator[bytes]:
    """Yields the text of an opened file from an offset on.

    A file that is compressed or not in UTF-8 is decoded from its beginning.
    """
    if not shard.is_decoded:
        file.seek(offset)
        yield from blocks(file, shard)
        return
    block_end = 0
    for block in blocks(file, shard):
        block_end += len(block)
        if block_end > offset:
            block_start = block_end - len(block)
            yield block[max(0, offset - block_start) :]


def lines(file: Any, shard: Shard) -> Iterator[bytes]:
    """Yields the lines of an opened file without their ends, and without a byte order mark."""
    for index, line in enumerate(_split_lines(blocks(file, shard))):
        yield line if index else without_bom(line)


def _split_lines(text: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that may reach over many blocks
    for block in text:
        first, *others = block.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    if rest := b"".join(parts):
        yield rest


def first_block(file: Any, shard: Shard) -> list[bytes]:
    """Returns the lines of the first block of an opened file; at least one that is not blank."""
    head: list[bytes] = []
    has_text = False
    for block in blocks(file, shard):
        head.append(block)
        text = block if has_text else block.lstrip()
        has_text = bool(text)
        if b"\n" in text:
            break
    found = without_bom(b"".join(head)).split(b"\n")
    return found if len(found) == 1 else found[:-1]


def count_lines_before(shard: Shard, offset: int) -> int:
    """Returns the number of lines that end before an offset; reads the file up to there."""
    count = block_start = 0
    with storage.open_read(shard.path) as file:
        for block in blocks(file, shard):
            count += block[: offset - block_start].count(b"\n")
            block_start += len(block)
            if block_start >= offset:
                break
    return count


def read_documents(
    file: Any, shard: Shard, separator: Separator, start: int, end: int, max_bytes: int
) -> DocumentRange:
    """Reads the documents that begin in the bytes [start, end) of a text file.

    A document begins at offset 0 and after each separator. So wherever a file is split into ranges,
    each document belongs to exactly one of them. The last document of a range is read to its end,
    also beyond `end`.

    Args:
        file: The opened file.
        shard: Its shard.
        separator: What is between documents.
        start: The first offset of the range.
        end: One past its last offset.
        max_bytes: The size at which a document that reaches beyond `end` is left out instead of
            being read to its end.
    """
    width = separator.width
    # The offset of data[0] in the file. A separator may end exactly at `start`.
    base = max(0, start - width)
    source = blocks_from(file, shard, base)
    data = bytearray()

    def read_more() -> bool:
        block = next(source, b"")
        data.extend(block)
        return bool(block)

    while len(data) < end - base and read_more():
        pass
    first = 0  # where the first document begins in `data`
    if start > 0:
        found = separator.find(data, 0)
        if found is None or found[1] + base >= end:
            return DocumentRange(start, b"", None)
        first = found[1]
    if not width:
        return DocumentRange(start, bytes(data), None)
    # The next range looks for its first document from the same offset on, so that the ranges fit
    # together.
    search_from = max(0, end - width - base)
    last: int | None = None  # where the last document begins
    while (found := separator.find(data, search_from)) is None:
        # A separator may lie across the end of the data that has been read so far.
        search_from = max(search_from, len(data) - width + 1)
        if last is None:
            last = separator.last_end(data, first, end - base) or first
        if len(data) - last > max_bytes:
            return DocumentRange(base + first, bytes(data[first:last]), base + last)
        if not read_more():
            return DocumentRange(base + first, bytes(data[first:]), None)
    return DocumentRange(base + first, bytes(data[first : max(first, found[1])]), None)
