"""Arrow IPC files (also Feather V2) and streams: where their record batches are, and their rows.

A stream is a series of messages: the schema, dictionaries, record batches. A file is a mark, a
stream, and a footer. The headers of the messages are read, without their bodies, to find the record
batches; then each can be read on its own. The format of the headers is a FlatBuffer, of which
pyarrow tells neither the length of a body nor its size without compression.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from sevenfold import storage
from sevenfold.data.sources.shards import (
    MAX_COMPRESSION_RATIO,
    MAX_GROUP_BYTES,
    Shard,
    decompression_bomb,
)
from sevenfold.errors import InputError

# A record batch is read as a whole, whatever part of its rows is needed.
MAX_BATCH_BYTES = 2**30
_FILE_MARK, _FEATHER_V1 = b"ARROW1", b"FEA1"
_CONTINUED = b"\xff\xff\xff\xff"  # begins each message
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # the kinds of messages


class Message(NamedTuple):
    """A message of a stream.

    Attributes:
        kind: _SCHEMA, _DICTIONARY, _BATCH or another number.
        start: Its offset in the file.
        end: The offset of the next one.
        rows: The number of its rows.
        bytes: The size of its body without compression.
    """

    kind: int
    start: int
    end: int
    rows: int
    bytes: int


class Layout(NamedTuple):
    """Where the parts of a file are.

    Attributes:
        schema: Its schema.
        messages: Its messages.
        is_file: Whether it is an IPC file, not a stream.
    """

    schema: pa.Schema
    messages: tuple[Message, ...]
    is_file: bool

    @property
    def batches(self) -> list[Message]:
        """The record batches."""
        return [m for m in self.messages if m.kind == _BATCH]


def read_layout(file: Any, shard: Shard) -> Layout:
    """Finds the record batches of an opened file.

    Raises:
        InputError: It is of the earlier format Feather V1, or a record batch is too large.
        OSError: It is no Arrow IPC.
        EOFError: It is truncated.
    """
    size = file.seek(0, 2)
    file.seek(0)
    mark = file.read(8)
    if mark.startswith(_FEATHER_V1):
        raise InputError(
            f"{shard.path}: expected Arrow IPC, found Feather V1, which is not read: write the "
            "file again with pyarrow.feather.write_feather(pyarrow.feather.read_table(FILE), NEW)"
        )
    is_file = mark.startswith(_FILE_MARK)
    if is_file:
        file.seek(max(0, size - len(_FILE_MARK)))
        if size < 2 * 8 or file.read() != _FILE_MARK:
            raise EOFError("the mark at the end of an Arrow file is missing: it is truncated")
    try:
        messages = tuple(_messages(file, 8 if is_file else 0, size))
    except struct.error as e:
        raise OSError(f"a message has an invalid header ({e})") from None
    if not messages or messages[0].kind != _SCHEMA:
        raise OSError("expected a schema in the first message")
    for number, message in enumerate(m for m in messages if m.kind in (_BATCH, _DICTIONARY)):
        stored = message.end - message.start
        least = max(message.bytes, message.rows)  # the text of a row has at least one byte
        if least > max(MAX_GROUP_BYTES, MAX_COMPRESSION_RATIO * stored) or message.rows < 0:
            raise decompression_bomb(shard, f"record batch {number}", least)
        if max(message.bytes, stored) > MAX_BATCH_BYTES:
            raise InputError(
                f"{shard.path}: record batch {number}: expected at most "
                f"{MAX_BATCH_BYTES >> 20} MiB, found {message.bytes >> 20} MiB: write the file "
                "with smaller record batches (max_chunksize in pyarrow, record_batch_size in "
                "polars)"
            )
    schema = pa.ipc.read_schema(pa.BufferReader(_bytes(file, messages[:1])))
    return Layout(schema, messages, is_file)


@functools.lru_cache(maxsize=64)
def _cached_layout(shard: Shard) -> Layout:
    with storage.open_read(shard.path) as file:
        return read_layout(file, shard)


def read_batch(
    file: Any, shard: Shard, layout: Layout | None, index: int, columns: Sequence[str]
) -> pa.RecordBatch:
    """Reads some columns of a record batch.

    Args:
        file: The opened file.
        shard: Its shard.
        layout: Where the parts of the file are; None: it is found out, and remembered.
        index: The index of the record batch.
        columns: The names of the columns.

    Raises:
        OSError: The record batch is damaged.
        InputError: The file has no such record batch.
    """
    layout = layout or _cached_layout(shard)
    batches = layout.batches
    if index >= len(batches):
        raise InputError(
            f"{shard.path}: has changed since this run began: record batch {index} does not exist "
            "any more"
        )
    batch = batches[index]
    # in a file, dictionaries may follow the batches that need them
    dictionaries = [
        m
        for m in layout.messages
        if m.kind == _DICTIONARY and (layout.is_file or m.start < batch.start)
    ]
    content = _bytes(file, [layout.messages[0], *dictionaries, batch])
    included = [layout.schema.get_field_index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=included, use_threads=False)
    with pa.ipc.open_stream(pa.BufferReader(content), options=options) as reader:
        try:
            read = reader.read_next_batch()
        except StopIteration:
            raise EOFError(f"record batch {index} is missing") from None
    for column in read.columns:
        _check_offsets(column)
    return read


def _check_offsets(column: pa.Array) -> None:
    """Raises ArrowInvalid if an array refers to memory outside its buffers.

    Text that is not UTF-8 is reported later, by its row.
    """
    if pa.types.is_string(column.type):
        column = column.view(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.view(pa.large_binary())
    column.validate(full=True)


def _bytes(file: Any, messages: Sequence[Message]) -> bytes:
    parts = []
    for message in messages:
        file.seek(message.start)
        parts.append(file.read(message.end - message.start))
    return b"".join(parts)


def _messages(file: Any, position: int, size: int) -> Iterator[Message]:
    """Yields the messages from a position on, up to the mark that ends a stream."""
    while position < size:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            raise EOFError(f"the message at byte {position:,} is truncated")
        if head[:4] != _CONTINUED:
            raise OSError(f"expected a message at byte {position:,}, found other content")
        length = int.from_bytes(head[4:], "little", signed=True)
        if length == 0:
            return
        if not 0 < length <= min(size - position - 8, MAX_BATCH_BYTES):
            raise EOFError(f"the message at byte {position:,} is truncated")
        body = position + 8 + length
        metadata = file.read(length)
        root = struct.unpack_from("<I", metadata)[0]
        kind = _number(metadata, root, 1, "<B")
        end = body + _number(metadata, root, 3, "<q")
        if not body <= end <= size:
            raise EOFError(
                f"the message at byte {position:,} is truncated: expected {end - position:,} "
                f"bytes, found {size - position:,}"
            )
        header = _table(metadata, root, 2)
        if kind == _DICTIONARY and header is not None:
            header = _table(metadata, header, 1)
        rows = stored = 0
        if kind in (_BATCH, _DICTIONARY) and header is not None:
            rows = _number(metadata, header, 0, "<q")
            stored = _body_bytes(file, metadata, header, body, end)
        yield Message(kind, position, end, rows, stored)
        position = end


def _body_bytes(file: Any, metadata: bytes, header: int, body: int, end: int) -> int:
    """Returns the size of a body without compression.

    Each compressed buffer begins with its size, which is -1 if it is not compressed after all.
    """
    if _table(metadata, header, 3) is None:
        return end - body
    vector = _table(metadata, header, 2)
    total = 0
    if vector is not None:
        for i in range(struct.unpack_from("<I", metadata, vector)[0]):
            offset, length = struct.unpack_from("<qq", metadata, vector + 4 + 16 * i)
            if not 0 <= offset <= offset + length <= end - body:
                raise OSError("a buffer is outside its message")
            if length >= 8:
                file.seek(body + offset)
                size = struct.unpack("<q", file.read(8))[0]
                if size < -1:
                    raise OSError("a buffer has a negative size")
                total += length if size == -1 else size
    return total


def _field(data: bytes, table: int, index: int) -> int | None:
    """Returns the position of a field of a FlatBuffers table, None if it has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * index
    if vtable < 0 or entry + 2 > struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + entry)[0]
    return table + offset if offset else None


def _number(data: bytes, table: int, index: int, layout: str) -> int:
    position = _field(data, table, index)
    return 0 if position is None else int(struct.unpack_from(layout, data, position)[0])


def _table(data: bytes, table: int, index: int) -> int | None:
    """Returns the position of a table or vector that a field refers to, None without one."""
    position = _field(data, table, index)
    return None if position is None else position + struct.unpack_from("<I", data, position)[0]
