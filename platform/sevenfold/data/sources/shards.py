"""Shards (input files) and row groups: the data classes, and what all file formats share.

A shard is one input file. It is split into row groups, the units in which documents are read. A row
group is a range of rows of one parquet row group or Arrow record batch, or the documents that begin
within a byte range of a text file (offsets always count uncompressed bytes). So any row group can
be read on its own; in a compressed file, everything before it has to be decompressed as well.

`row_groups` splits shards into row groups; `reading` reads the documents of a row group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from sevenfold import storage
from sevenfold.errors import InputError, first_line
from sevenfold.recipe import Source

Format = Literal["parquet", "jsonl", "txt", "csv", "tsv", "arrow"]
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "txt": (".txt",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "arrow": (".arrow", ".feather", ".ipc"),
}
BINARY: tuple[Format, ...] = ("parquet", "arrow")  # not text, and with a compression of their own
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}

MAX_GROUP_BYTES = 64 * 2**20  # of uncompressed text in a row group
# Beyond these limits a compressed shard is refused as a decompression bomb. Text usually shrinks
# 3 to 10 times.
MAX_COMPRESSION_RATIO = 200
MAX_SHARD_BYTES = 64 * 2**30  # uncompressed
CHANGED_HINT = "restore it, or start a run with another name"  # ends errors about changed files

_TAIL_BYTES = 64 * 2**10  # hashed at the end of a file; the footer of most parquet files fits


class UnreadableError(InputError):
    """The bytes of a row group are damaged."""


@dataclass(frozen=True)
class Shard:
    """One input file.

    Attributes:
        path: An absolute path or URL.
        source: The index of the source that it belongs to.
        format: The file format.
        compression: "gzip", "zstd" or None.
        fingerprint: The file's size and a hash of its last 64 KiB; it changes when the file does.
        encoding: Python's name of the encoding of a text file; "" for UTF-8.
        newline: "CR" if only a carriage return ends the lines of a text file, else "".
        version: What the storage reported of the file when the run was started, see
            `storage.version`; "" if it was not recorded.
        content: The hash of the whole content at that time; "" if it was not computed.
        whole: Whether a text file is one document, although its source has a separator.
    """

    path: str
    source: int
    format: Format
    compression: str | None
    fingerprint: str
    encoding: str = ""
    newline: str = ""
    version: str = ""
    content: str = ""
    whole: bool = False

    @property
    def file_bytes(self) -> int:
        """The size of the file, as stored."""
        return int(self.fingerprint.partition("-")[0])

    @property
    def is_binary(self) -> bool:
        """Whether the file is not text."""
        return self.format in BINARY

    @property
    def has_cells(self) -> bool:
        """Whether the rows have cells of text, in which numbers are written too."""
        return self.format in ("csv", "tsv")

    @property
    def is_decoded(self) -> bool:
        """Whether the bytes of the text are not those of the file."""
        return bool(self.compression or self.encoding or self.newline)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields; those that earlier versions do not have only if they are set."""
        later = ("encoding", "newline", "version", "content", "whole")
        return {key: value for key, value in vars(self).items() if value or key not in later}


@dataclass(frozen=True)
class RowGroup:
    """A part of a shard that is read as one unit.

    Attributes:
        shard: The index of its shard in the manifest.
        index: For parquet, the index of the file's own row group, for Arrow that of the record
            batch; for text files, the number of this row group.
        start: The first row within the file's row group or record batch, or the first byte of the
            range in which its documents begin (text).
        end: One past the last row or byte.
        documents: The number of documents; 0 if unknown, because text files are not read to count
            them.
        bytes: The size of its text, uncompressed.
    """

    shard: int
    index: int
    start: int
    end: int
    documents: int
    bytes: int


class Tail(NamedTuple):
    """The end of a file.

    Attributes:
        data: Its last bytes.
        fingerprint: The file's size and the hash of these bytes, as "SIZE-HASH".
    """

    data: bytes
    fingerprint: str


class BadDocument(NamedTuple):
    """A document that cannot be used, for error messages."""

    location: str  # within its shard
    reason: str


@dataclass
class RawDocuments:
    """The documents of a row group as they are stored in the shard.

    Attributes:
        columns: Column name -> strings or other values, one per readable document.
        locate: Describes the location of a document (by its index in the columns) for error
            messages.
        bad: The documents that could not be read, and so are missing from the columns.
        passes: bool [documents], whether each one passes the filters on other columns; None if
            there are none.
    """

    columns: dict[str, pa.ChunkedArray]
    locate: Callable[[int], str]
    bad: list[BadDocument] = field(default_factory=list)
    passes: np.ndarray | None = None


def is_divided_by_files(source: Source, paths: Sequence[str]) -> bool:
    """Returns whether each text file of a source is one document: of several, without separator."""
    if source.separator is not None or len(paths) < 2:
        return False
    return sum(_is_text(path, source) for path in paths) > 1


def _is_text(path: str, source: Source) -> bool:
    try:
        return named_shard(path, 0, source).format == "txt"
    except InputError:
        return False  # reported when it is examined


def named_shard(path: str, source_index: int, source: Source) -> Shard:
    """Returns the shard at a path, with what its name says: the format and the compression.

    Raises:
        InputError: The file's name does not give the format.
    """
    name = (path.partition("?")[0] if storage.is_url(path) else path).lower()
    compression = next((c for suffix, c in COMPRESSIONS.items() if name.endswith(suffix)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    by_name = (f for f, suffixes in SUFFIXES.items() if name.endswith(suffixes))
    file_format = source.format or next(by_name, None)
    if file_format is None or (file_format in BINARY and compression):
        supported = ", ".join(s for suffixes in SUFFIXES.values() for s in suffixes)
        raise InputError(
            f"{path}: unsupported file type; supported: {supported}, text also with .gz or .zst: "
            "rename the file, or set the source's `format`"
        )
    if source.encoding is not None and file_format in BINARY:
        raise InputError(
            f"{path}: encoding: expected text, JSON lines or CSV, found {file_format}, whose text "
            "is always UTF-8: remove the source's `encoding`"
        )
    return Shard(path, source_index, file_format, compression, fingerprint="")


def separator(shard: Shard, source: Source) -> str:
    """Returns what is between two documents of a text file; "" if it is one document."""
    if shard.format == "txt":
        return "" if shard.whole else source.lines
    return "\n"


def fingerprint(path: str) -> str:
    """Returns a file's size in bytes and a hash of its end, as "SIZE-HASH"."""
    with storage.open_read(path) as file:
        return read_tail(file).fingerprint


def content_hash(path: str) -> str:
    """Returns the hash (blake2b, 16 bytes) of a file's whole content."""
    with storage.open_read(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_unchanged(shard: Shard, file: Any) -> None:
    """Checks that an opened file is still the one of its shard, and seeks to its beginning.

    Raises:
        InputError: The file has changed since the shard was described.
    """
    if read_tail(file).fingerprint != shard.fingerprint:
        raise InputError(f"{shard.path}: has changed since this run began: {CHANGED_HINT}")
    file.seek(0)


def read_tail(file: Any) -> Tail:
    """Reads the end of an opened file."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _TAIL_BYTES))
    data = file.read(_TAIL_BYTES)
    return Tail(data, f"{size}-{hashlib.sha256(data).hexdigest()[:16]}")


def describe_location(shard: Shard, group: RowGroup) -> str:
    """Returns where a row group is within its shard, for messages and the ledger."""
    if shard.is_binary:
        part = "row group" if shard.format == "parquet" else "record batch"
        return f"{part} {group.index}, rows {group.start}-{group.end - 1}"
    if group.end == MAX_SHARD_BYTES:  # the file's size was only estimated
        return f"from byte {group.start} on"
    return f"bytes {group.start}-{group.end - 1}"


def wrong_content(shard: Shard, error: Exception) -> InputError:
    """Returns the error to raise for a file whose content is not what its name promises."""
    plain = {"parquet": "a parquet file", "arrow": "an Arrow IPC file or stream"}
    expected = shard.compression or plain.get(shard.format, "text")
    return InputError(
        f"{shard.path}: expected {expected} (by its name), found other or damaged content: "
        f"{first_line(error)}"
    )


def decompression_bomb(shard: Shard, location: str, size: int) -> InputError:
    """Returns the error to raise where data decompresses to an implausible size.

    Args:
        shard: The shard that is being read.
        location: Where in the shard.
        size: The number of bytes decompressed so far.
    """
    return InputError(
        f"{shard.path}: {location}: expected text that decompresses to at most "
        f"{MAX_COMPRESSION_RATIO} times its size, found {size:,} bytes or more: possible "
        "decompression bomb; if the text is right, write the file again without compression"
    )
