"""Splits shards into row groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.data.sources import arrow_batches, csv_cells, csv_rows
from sevenfold.data.sources.json_lines import parse_object
from sevenfold.data.sources.shards import (
    MAX_COMPRESSION_RATIO,
    MAX_GROUP_BYTES,
    MAX_SHARD_BYTES,
    RowGroup,
    Shard,
    decompression_bomb,
    separator,
    wrong_content,
)
from sevenfold.data.sources.text_blocks import blocks, first_block
from sevenfold.errors import InputError
from sevenfold.recipe import Source

# The maximum number of parts of a compressed file or a parquet row group: reading a part decodes
# everything before it too.
MAX_PARTS = 8
# Fine-tuning data is small and often sorted. Parquet row groups of up to SMALL_BYTES of it are
# split into up to SMALL_PARTS parts, so that rows from many places of the file can be mixed.
SMALL_BYTES = 8 * 2**20
SMALL_PARTS = 512
_SAMPLE_BYTES = 4 * 2**20  # of decoded text, from which the size of a file is estimated


def split_shard(
    shard_index: int,
    shard: Shard,
    source: Source,
    text_columns: Sequence[str],
    filter_columns: Sequence[str],
    target_bytes: int,
    file: storage.Reader,
    tail: bytes = b"",
    estimate: bool = False,
) -> list[RowGroup]:
    """Splits a shard into row groups of about `target_bytes` of text each.

    Of a parquet file only the footer is read, of other files that are not decoded nothing.

    Args:
        shard_index: The index of the shard in the manifest.
        shard: The shard.
        source: The source that it belongs to.
        text_columns: The columns that documents are made from.
        filter_columns: Other columns, which only the source's filters need.
        target_bytes: The size to aim for, uncompressed.
        file: The opened file.
        tail: The last bytes of the file, as many as are known already.
        estimate: Estimates the size of a file that is decoded from its beginning, instead of
            decoding all of it.

    Raises:
        InputError: The file is not what its name says, or it is truncated, empty or a decompression
            bomb; or a column is missing or has another type.
    """
    if shard.format == "txt" and (filter_columns or list(text_columns) != [source.text]):
        columns = ", ".join([*text_columns, *filter_columns])
        raise InputError(
            f"{shard.path}: expected columns ({columns}), found plain text, whose only column is "
            f"{source.text!r}: filter on that one, or convert the file to JSON lines or parquet"
        )
    try:
        if shard.format == "parquet":
            metadata = _footer(file, tail)
            _check_columns(
                shard, source, metadata.schema.to_arrow_schema(), text_columns, filter_columns
            )
            groups = _split_parquet(
                shard_index, shard, source, text_columns, metadata, target_bytes
            )
        elif shard.format == "arrow":
            layout = arrow_batches.read_layout(file, shard)
            _check_columns(shard, source, layout.schema, text_columns, filter_columns)
            groups = _split_arrow(
                shard_index, shard, source, text_columns, layout, target_bytes, file
            )
        elif shard.has_cells:
            groups = _split_csv(
                shard_index, shard, source, [*text_columns, *filter_columns], target_bytes, file
            )
        else:
            _check_keys(shard, filter_columns, file)
            groups = _split_text(shard_index, shard, source, target_bytes, file, estimate)
    except InputError:
        raise
    except (pa.ArrowException, OSError, EOFError) as e:
        raise wrong_content(shard, e) from None
    if not groups and shard.has_cells:
        raise InputError(f"{shard.path}: expected rows below the header, found none")
    if not groups:
        raise InputError(f"{shard.path}: expected documents, found an empty file")
    return groups


def _footer(file: storage.Reader, tail: bytes) -> pq.FileMetaData:
    """Returns the metadata in the footer of a parquet file, from its end if that holds all of it.

    The last 8 bytes are the length of the footer, and a mark.
    """
    holds_footer = tail[-4:] == b"PAR1" and int.from_bytes(tail[-8:-4], "little") + 8 <= len(tail)
    return pq.ParquetFile(pa.BufferReader(tail) if holds_footer else file).metadata


def _split_parquet(
    shard_index: int,
    shard: Shard,
    source: Source,
    text_columns: Sequence[str],
    metadata: pq.FileMetaData,
    target_bytes: int,
) -> list[RowGroup]:
    # Parquet stores each leaf of a nested column by itself, under a dotted path.
    leaves = [
        leaf
        for leaf in range(metadata.num_columns)
        if metadata.schema.column(leaf).path.partition(".")[0] in text_columns
    ]
    groups = []
    for index in range(metadata.num_row_groups):
        row_group = metadata.row_group(index)
        rows = row_group.num_rows
        chunks = [row_group.column(leaf) for leaf in leaves]
        size = sum(c.total_uncompressed_size for c in chunks)
        compressed_size = sum(c.total_compressed_size for c in chunks)
        if not 0 <= compressed_size <= shard.file_bytes or size < 0 or rows < 0:
            raise InputError(
                f"{shard.path}: row group {index}: expected at most the file's size "
                f"({shard.file_bytes:,} bytes), found {compressed_size:,} bytes in its footer "
                f"({size:,} uncompressed, {rows:,} rows): the file is damaged"
            )
        least = max(size, rows)  # the text of a row has at least one byte
        if least > MAX_GROUP_BYTES and least > MAX_COMPRESSION_RATIO * compressed_size:
            raise decompression_bomb(shard, f"row group {index} ({rows:,} rows)", least)
        groups += _parts_of_rows(shard_index, index, rows, size, source, target_bytes)
    return groups


def _parts_of_rows(
    shard_index: int, index: int, rows: int, size: int, source: Source, target_bytes: int
) -> list[RowGroup]:
    """Splits the rows of a file's own row group or record batch, whose text has a size."""
    is_small = source.shape is not None and size <= SMALL_BYTES
    parts = _part_count(size, target_bytes, SMALL_PARTS if is_small else MAX_PARTS)
    part_rows = -(-rows // max(1, parts))
    groups = []
    for start in range(0, rows, max(1, part_rows)):
        end = min(start + part_rows, rows)
        part_bytes = max(1, size * (end - start) // rows)
        groups.append(RowGroup(shard_index, index, start, end, end - start, part_bytes))
    return groups


def _split_arrow(
    shard_index: int,
    shard: Shard,
    source: Source,
    text_columns: Sequence[str],
    layout: arrow_batches.Layout,
    target_bytes: int,
    file: storage.Reader,
) -> list[RowGroup]:
    """Splits record batches.

    How much of a record batch is text is measured on the first one.
    """
    for name in text_columns:
        if layout.schema.get_field_index(name) < 0:
            raise InputError(f"{shard.path}: expected one column {name!r}, found several")
    groups: list[RowGroup] = []
    share: float | None = None
    for index, batch in enumerate(layout.batches):
        if share is None and batch.rows:
            first = arrow_batches.read_batch(file, shard, layout, index, text_columns)
            if len(first) != batch.rows:
                raise OSError(f"record batch {index} has {len(first)} rows, not {batch.rows}")
            share = first.nbytes / max(1, batch.bytes)
        size = max(batch.rows, int((share or 0) * batch.bytes))
        groups += _parts_of_rows(shard_index, index, batch.rows, size, source, target_bytes)
    return groups


def _split_csv(
    shard_index: int,
    shard: Shard,
    source: Source,
    columns: Sequence[str],
    target_bytes: int,
    file: storage.Reader,
) -> list[RowGroup]:
    names = csv_cells.column_names(file, shard)
    for column in columns:
        if column not in names:
            raise _missing_column(shard, column, names)
    text = _checked_blocks(shard, file) if shard.is_decoded else blocks(file, shard)
    pieces = csv_rows.split_rows(file, shard, text, target_bytes)
    if shard.is_decoded and pieces:  # reading a piece decodes everything before it
        size = pieces[-1].end - pieces[0].start
        least = -(-size // _part_count(size, target_bytes))
        merged = [pieces[0]]
        for piece in pieces[1:]:
            last = merged[-1]
            if last.end - last.start < least:
                merged[-1] = csv_rows.Piece(last.start, piece.end, last.rows + piece.rows)
            else:
                merged.append(piece)
        pieces = merged
    return [
        RowGroup(shard_index, index, p.start, p.end, p.rows, p.end - p.start)
        for index, p in enumerate(pieces)
    ]


def _missing_column(shard: Shard, column: str, names: Sequence[str]) -> InputError:
    return InputError(
        f"{shard.path}: expected a column {column!r}, found {', '.join(names)}: "
        f"correct the source's `text`, `columns` or `filters`{csv_cells.header_hint(shard, names)}"
    )


def _check_columns(
    shard: Shard,
    source: Source,
    schema: pa.Schema,
    text_columns: Sequence[str],
    filter_columns: Sequence[str],
) -> None:
    """Raises InputError if a column is missing, or pretraining text does not hold strings."""
    for column in (*text_columns, *filter_columns):
        if column not in schema.names:
            raise _missing_column(shard, column, schema.names)
        column_type = schema.field(column).type
        if pa.types.is_dictionary(column_type):
            column_type = column_type.value_type
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        is_string = any(is_kind(column_type) for is_kind in kinds)
        if column in text_columns and source.shape is None and not is_string:
            raise InputError(
                f"{shard.path}: column {column!r}: expected strings, found {column_type}"
            )


def _check_keys(shard: Shard, filter_columns: Sequence[str], file: storage.Reader) -> None:
    """Raises InputError if a filter is on a key that no line of the first block has."""
    if shard.format != "jsonl" or not filter_columns:
        return
    keys: dict[str, None] = {}
    file.seek(0)
    for line in first_block(file, shard):
        with contextlib.suppress(ValueError, RecursionError):  # reported when they are read
            keys |= dict.fromkeys(parse_object(line)) if line.strip() else {}
    for column in filter_columns:
        if keys and column not in keys:
            raise InputError(
                f"{shard.path}: expected a key {column!r}, which a filter needs, found "
                f"{', '.join(map(str, keys))} in its first lines: correct the source's `filters`"
            )


def _part_count(size: int, target_bytes: int, max_parts: int = MAX_PARTS) -> int:
    """Returns into how many parts to split data that is decoded from its beginning.

    Reading a part also decodes everything before it, so parts are few: more than `max_parts` only
    if a part would otherwise be larger than MAX_GROUP_BYTES, which is too much for memory.
    """
    return max(1, min(max_parts, round(size / (2 * target_bytes))), -(-size // MAX_GROUP_BYTES))


def _split_text(
    shard_index: int,
    shard: Shard,
    source: Source,
    target_bytes: int,
    file: storage.Reader,
    estimate: bool,
) -> list[RowGroup]:
    documents = 0  # unknown
    is_estimated = False
    if shard.is_decoded:
        if estimate:
            size, is_estimated = estimated_size(shard, file)
        else:
            size, documents = _decoded_size(shard, file)
        parts = _part_count(size, target_bytes)
    else:
        size = shard.file_bytes
        parts = -(-size // target_bytes)
    between = separator(shard, source)
    if between != "\n":
        documents = 0  # lines were counted
    if not between:  # the whole file is one document
        parts, documents = min(1, size), 1
    part_bytes = -(-size // max(1, parts))
    groups = []
    for index, start in enumerate(range(0, size, max(1, part_bytes))):
        end = min(start + part_bytes, size)
        # 0 would mean that their number is not known
        count = max(1, documents // parts) if documents else 0
        groups.append(RowGroup(shard_index, index, start, end, count, end - start))
    if groups and is_estimated:  # the last part reaches to the end, wherever that is
        groups[-1] = replace(groups[-1], end=MAX_SHARD_BYTES)
    return groups


def _decoded_size(shard: Shard, file: storage.Reader) -> tuple[int, int]:
    """Decodes a file without keeping its content, and returns its (bytes, lines)."""
    size = lines = 0
    file.seek(0)
    for block in _checked_blocks(shard, file):
        size += len(block)
        lines += block.count(b"\n")
    return size, lines


def _checked_blocks(shard: Shard, file: storage.Reader) -> Iterator[bytes]:
    """Yields the text of a file that is decoded; raises InputError if it becomes too long."""
    size = 0
    for block in blocks(file, shard):
        size += len(block)
        if size > MAX_SHARD_BYTES:
            raise _too_much_text(shard)
        if size > MAX_GROUP_BYTES and size > MAX_COMPRESSION_RATIO * shard.file_bytes:
            raise decompression_bomb(shard, f"byte {size}", size)
        yield block


def estimated_size(shard: Shard, file: storage.Reader) -> tuple[int, bool]:
    """Estimates the decoded size of a file from its first megabytes.

    gzip files end with their size modulo 2^32 (RFC 1952), which makes the estimate exact, unless
    they were put together from several.

    Returns:
        The bytes of its text, and whether that is an estimate: it is exact if the file is short.

    Raises:
        InputError: The file seems to be a decompression bomb, or too large.
    """
    size = 0
    file.seek(0)
    for block in blocks(file, shard):
        size += len(block)
        if size >= _SAMPLE_BYTES:
            break
    else:
        return size, False
    read = file.tell()  # with what the decompressor has read ahead
    estimate = max(size, size * shard.file_bytes // max(1, read))
    if shard.compression == "gzip":
        file.seek(-4, 2)
        last = int.from_bytes(file.read(4), "little")
        exact = last + round((estimate - last) / 2**32) * 2**32
        # far below the estimate it is the size of the last of several; too high does no harm
        if 0.6 * estimate < exact < 8 * estimate:
            estimate = exact
    if estimate > MAX_SHARD_BYTES:
        raise _too_much_text(shard)
    if estimate > MAX_GROUP_BYTES and estimate > MAX_COMPRESSION_RATIO * shard.file_bytes:
        raise decompression_bomb(shard, f"about byte {estimate}", estimate)
    return estimate, True


def _too_much_text(shard: Shard) -> InputError:
    return InputError(
        f"{shard.path}: expected at most {MAX_SHARD_BYTES >> 30} GiB of text in a file that is "
        "read from its beginning, found more: split the file, or write it without compression and "
        "in UTF-8"
    )
