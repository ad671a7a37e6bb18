"""Reads shards: the documents of a row group, and the names of a shard's columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.data.sources import arrow_batches, csv_cells
from sevenfold.data.sources.filters import pass_all
from sevenfold.data.sources.json_lines import parse_json_lines, parse_object
from sevenfold.data.sources.shards import (
    MAX_GROUP_BYTES,
    MAX_SHARD_BYTES,
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
from sevenfold.data.sources.shards import separator as between
from sevenfold.data.sources.text_blocks import (
    BLOCK_BYTES,
    DocumentRange,
    Separator,
    first_block,
    read_documents,
    without_bom,
)
from sevenfold.errors import InputError, first_line
from sevenfold.recipe import Filter, Source

_BATCH_ROWS = 256  # few, because a dictionary-encoded column can grow a thousandfold


def read_row_group(
    shard: Shard,
    source: Source,
    group: RowGroup,
    text_columns: Sequence[str],
    max_bytes: int,
) -> RawDocuments:
    """Reads the documents of a row group.

    Args:
        shard: The shard.
        source: The source that it belongs to.
        group: A row group of the shard.
        text_columns: The columns that documents are made from.
        max_bytes: The maximum size of a document.

    Raises:
        UnreadableError: The shard is damaged there.
        InputError: The shard does not exist any more, or it has changed since it was split into row
            groups.
    """
    try:
        if shard.format == "parquet":
            return _read_parquet(shard, source, group, text_columns)
        if shard.format == "arrow":
            return _read_arrow(shard, source, group, text_columns)
        if shard.has_cells:
            with storage.open_read(shard.path) as file:
                check_unchanged(shard, file)
                return csv_cells.read_rows(file, shard, source, group, text_columns)
        return _read_text(shard, source, group, text_columns, max_bytes)
    except (pa.ArrowException, OSError, EOFError) as e:
        raise UnreadableError(
            f"{shard.path}: {describe_location(shard, group)} cannot be read: {first_line(e)}"
        ) from None


def column_names(shard: Shard) -> list[str]:
    """Returns the names of a shard's columns: for JSON lines the first line's keys, for text none.

    In CSV the first line names them.

    Raises:
        InputError: The file is not what its name says.
    """
    try:
        with storage.open_read(shard.path) as file:
            if shard.format == "parquet":
                return list(pq.ParquetFile(file).schema_arrow.names)
            if shard.format == "arrow":
                return list(arrow_batches.read_layout(file, shard).schema.names)
            if shard.has_cells:
                return csv_cells.column_names(file, shard)
            if shard.format == "txt":
                return []
            line = next((line for line in first_block(file, shard) if line.strip()), b"{}")
            return list(parse_object(line))
    except InputError:
        raise
    except (pa.ArrowException, OSError, EOFError) as e:
        raise wrong_content(shard, e) from None
    except ValueError as e:
        raise InputError(f"{shard.path}: first line: {first_line(e)}") from None


def _read_parquet(
    shard: Shard, source: Source, group: RowGroup, text_columns: Sequence[str]
) -> RawDocuments:
    """Reads rows in small batches, of which the filters' columns are not kept."""
    rules, columns = _rules_and_columns(source, text_columns)

    def parts(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        batch_start = 0
        for batch in file.iter_batches(_BATCH_ROWS, [group.index], columns, use_threads=False):
            yield batch[max(0, group.start - batch_start) : max(0, group.end - batch_start)]
            batch_start += len(batch)
            if batch_start >= group.end:
                return
        raise UnreadableError(
            f"{shard.path}: row group {group.index}: expected {group.end:,} rows or more, as its "
            f"footer says, found {batch_start:,}: the file is damaged"
        )

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
        return _from_batches(parts(file), shard, group, rules, columns, text_columns, "row group")


def _read_arrow(
    shard: Shard, source: Source, group: RowGroup, text_columns: Sequence[str]
) -> RawDocuments:
    """Reads the rows of a record batch, decoded in small batches as those of parquet are."""
    rules, columns = _rules_and_columns(source, text_columns)
    with storage.open_read(shard.path) as file:
        check_unchanged(shard, file)
        batch = arrow_batches.read_batch(file, shard, None, group.index, columns)
    if len(batch) < group.end:
        raise UnreadableError(
            f"{shard.path}: record batch {group.index}: expected {group.end:,} rows or more, found "
            f"{len(batch):,}: the file is damaged"
        )
    parts = (
        batch.slice(start, min(_BATCH_ROWS, group.end - start))
        for start in range(group.start, group.end, _BATCH_ROWS)
    )
    return _from_batches(parts, shard, group, rules, columns, text_columns, "record batch")


def _rules_and_columns(
    source: Source, text_columns: Sequence[str]
) -> tuple[list[Filter], list[str]]:
    """Returns the filters on other columns than those of the text, and all columns to read."""
    rules = [rule for rule in source.filters if rule.column not in text_columns]
    return rules, list(dict.fromkeys([*text_columns, *(rule.column for rule in rules)]))


def _from_batches(
    batches: Iterable[pa.RecordBatch],
    shard: Shard,
    group: RowGroup,
    rules: Sequence[Filter],
    columns: Sequence[str],
    text_columns: Sequence[str],
    part: str,
) -> RawDocuments:
    """Returns the documents of small batches; only the columns of the text are kept.

    Args:
        batches: The rows of the row group.
        shard: The file.
        group: The row group.
        rules: The filters on columns that are not kept.
        columns: All columns that are read.
        text_columns: Those that are kept.
        part: What the file's own parts are called, for locations.
    """
    parts: list[pa.Table] = []
    passes: list[np.ndarray] = []
    size = 0
    for batch in batches:
        plain = {name: _plain(batch[name]) for name in columns}
        passes.append(pass_all(plain, rules, len(batch), shard.path))
        parts.append(pa.table({name: plain[name] for name in text_columns}))
        size += parts[-1].nbytes
        if size > 2 * MAX_GROUP_BYTES + 64 * group.bytes:
            raise decompression_bomb(shard, describe_location(shard, group), size)
    table = pa.concat_tables(parts)
    return RawDocuments(
        {column: table[column] for column in text_columns},
        lambda i: f"{part} {group.index}, row {group.start + i}",
        passes=np.concatenate(passes) if rules else None,
    )


def _plain(column: pa.Array) -> pa.Array:
    """Returns a column without dictionaries, runs and views, and with null for NaN.

    pandas and polars write categories as dictionaries, and missing numbers as NaN.
    """
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column


def _read_text(
    shard: Shard,
    source: Source,
    group: RowGroup,
    text_columns: Sequence[str],
    max_bytes: int,
) -> RawDocuments:
    separator = Separator(between(shard, source))
    if not separator.width and group.bytes > max_bytes:
        empty = pa.chunked_array([], pa.large_string())
        return RawDocuments(
            {text_columns[0]: empty}, str, [BadDocument("byte 0", _too_long(max_bytes))]
        )
    with storage.open_read(shard.path) as file:
        check_unchanged(shard, file)
        end, is_open = group.end, group.end == MAX_SHARD_BYTES  # the size was only estimated
        if is_open:
            end = group.start + 2 * MAX_GROUP_BYTES + 64 * group.bytes
        documents = read_documents(file, shard, separator, group.start, end, max_bytes)
    if is_open and documents.start + len(documents.data) >= end:
        raise decompression_bomb(shard, describe_location(shard, group), len(documents.data))
    if documents.start == 0:
        documents = documents._replace(data=without_bom(documents.data))
    bad = []
    if documents.too_long is not None:
        bad.append(BadDocument(f"byte {documents.too_long}", _too_long(max_bytes)))
    if shard.format == "jsonl":
        return parse_json_lines(documents.data, documents.start, shard, source, text_columns, bad)
    return _parse_plain_text(documents, separator, source, bad)


def _too_long(max_bytes: int) -> str:
    return f"longer than {max_bytes / 1e6:g} MB (data.max_document_mb)"


def _parse_plain_text(
    documents: DocumentRange, separator: Separator, source: Source, bad: list[BadDocument]
) -> RawDocuments:
    """Splits plain text into documents; those of white space alone are dropped.

    Args:
        documents: The text.
        separator: What is between documents.
        source: The source.
        bad: Documents known to be bad already; those found here are appended.
    """
    texts: list[str] = []
    offsets: list[int] = []
    for position, piece in separator.split(documents.data):
        offset = documents.start + position
        document = piece.strip(b"\r\n") if separator.width else piece
        if document.strip():
            try:
                texts.append(document.decode("utf-8"))
                offsets.append(offset)
            except UnicodeDecodeError as e:
                bad.append(
                    BadDocument(
                        f"byte {offset + e.start}", "not UTF-8 (see the source's `encoding`)"
                    )
                )
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    return RawDocuments({source.text: column}, lambda i: f"byte {offsets[i]}", bad)
