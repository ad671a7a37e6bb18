"""Reads shards: the documents of a row group, and the names of a shard's columns."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.data.sources.json_lines import parse_json_lines, parse_object
from sevenfold.data.sources.shards import (
    MAX_GROUP_BYTES,
    BadDocument,
    RawDocuments,
    RowGroup,
    Shard,
    UnreadableError,
    check_unchanged,
    decompression_bomb,
    describe_location,
    wrong_content,
)
from sevenfold.data.sources.text_blocks import BLOCK_BYTES, first_line_blocks, read_documents
from sevenfold.errors import InputError, first_line
from sevenfold.recipe import Source

_BATCH_ROWS = 256  # few, because a dictionary-encoded column can grow a thousandfold


def read_row_group(
    shard: Shard,
    source: Source,
    group: RowGroup,
    text_columns: Sequence[str],
    filter_columns: Sequence[str],
    max_bytes: int,
) -> RawDocuments:
    """Reads the documents of a row group.

    Args:
        shard: The shard.
        source: The source that it belongs to.
        group: A row group of the shard.
        text_columns: The columns that documents are made from.
        filter_columns: Other columns, which only the source's filters need.
        max_bytes: The maximum size of a document.

    Raises:
        UnreadableError: The shard is damaged there.
        InputError: The shard does not exist any more, or it has changed since it was split into row
            groups.
    """
    try:
        if shard.format == "parquet":
            return _read_parquet(shard, group, [*text_columns, *filter_columns])
        return _read_text(shard, source, group, text_columns, filter_columns, max_bytes)
    except (pa.ArrowException, OSError, EOFError) as e:
        raise UnreadableError(
            f"{shard.path}: {describe_location(shard, group)} cannot be read: {first_line(e)}"
        ) from None


def column_names(shard: Shard) -> list[str]:
    """Returns the names of a shard's columns: for JSON lines the first line's keys, for text none.

    Raises:
        InputError: The file is not what its name says.
    """
    try:
        with storage.open_read(shard.path) as file:
            if shard.format == "parquet":
                return list(pq.ParquetFile(file).schema_arrow.names)
            head = b"".join(first_line_blocks(file, shard.compression))
            line = next((line for line in head.splitlines() if line.strip()), b"{}")
            return list(parse_object(line)) if shard.format == "jsonl" else []
    except (pa.ArrowException, OSError, EOFError) as e:
        raise wrong_content(shard, e) from None
    except ValueError as e:
        raise InputError(f"{shard.path}: first line: {first_line(e)}") from None


def _read_parquet(shard: Shard, group: RowGroup, columns: Sequence[str]) -> RawDocuments:
    with storage.open_read(shard.path) as f:
        check_unchanged(shard, f)
        file = pq.ParquetFile(
            f,
            page_checksum_verification=True,
            # 0: each column chunk is read with a single request
            buffer_size=0 if group.start == 0 else BLOCK_BYTES,
        )
        if group.index >= file.num_row_groups:
            raise InputError(
                f"{shard.path}: has changed since this run began: row group {group.index} does not "
                "exist any more"
            )
        parts = []
        batch_start = size = 0
        for batch in file.iter_batches(
            _BATCH_ROWS, [group.index], list(columns), use_threads=False
        ):
            part = batch[max(0, group.start - batch_start) : max(0, group.end - batch_start)]
            batch_start += len(batch)
            size += part.get_total_buffer_size() if len(part) else 0
            if size > 2 * MAX_GROUP_BYTES + 64 * group.bytes:
                raise decompression_bomb(shard, describe_location(shard, group), size)
            parts.append(part)
            if batch_start >= group.end:
                break
    table = pa.Table.from_batches(parts)
    return RawDocuments(
        {column: table[column] for column in columns},
        lambda i: f"row group {group.index}, row {group.start + i}",
    )


def _read_text(
    shard: Shard,
    source: Source,
    group: RowGroup,
    text_columns: Sequence[str],
    filter_columns: Sequence[str],
    max_bytes: int,
) -> RawDocuments:
    separator = b"\n" if shard.format == "jsonl" else source.separator.encode()
    if not separator and group.bytes > max_bytes:
        empty = pa.chunked_array([], pa.large_string())
        return RawDocuments(
            {text_columns[0]: empty}, str, [BadDocument("byte 0", _too_long(max_bytes))]
        )
    with storage.open_read(shard.path) as file:
        check_unchanged(shard, file)
        documents = read_documents(
            file, shard.compression, separator, group.start, group.end, max_bytes
        )
    bad = []
    if documents.too_long is not None:
        bad.append(BadDocument(f"byte {documents.too_long}", _too_long(max_bytes)))
    if shard.format == "jsonl":
        return parse_json_lines(
            documents.data, documents.start, shard, source, text_columns, filter_columns, bad
        )
    return _parse_plain_text(documents.data, documents.start, source, bad)


def _too_long(max_bytes: int) -> str:
    return f"longer than {max_bytes / 1e6:g} MB (data.max_document_mb)"


def _parse_plain_text(
    data: bytes, start: int, source: Source, bad: list[BadDocument]
) -> RawDocuments:
    """Splits plain text into documents; empty ones are dropped.

    Args:
        data: The text.
        start: Its offset in the shard, in uncompressed bytes.
        source: The source, which names the separator.
        bad: Documents known to be bad already; those found here are appended.
    """
    separator = source.separator.encode()
    texts: list[str] = []
    offsets: list[int] = []
    offset = start
    for piece in data.split(separator) if separator else [data]:
        document = piece.strip(b"\r\n") if separator else piece
        if document:
            try:
                texts.append(document.decode("utf-8"))
                offsets.append(offset)
            except UnicodeDecodeError as e:
                bad.append(BadDocument(f"byte {offset + e.start}", "not UTF-8"))
        offset += len(piece) + len(separator)
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    return RawDocuments({source.text: column}, lambda i: f"byte {offsets[i]}", bad)
