"""Reads the rows of data files one by one, to inspect data instead of training on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.data.sources import arrow_batches, csv_cells, csv_rows
from sevenfold.data.sources.json_lines import parse_object
from sevenfold.data.sources.shards import Format, Shard, is_divided_by_files, named_shard
from sevenfold.data.sources.source_files import find_files
from sevenfold.data.sources.text_blocks import blocks, lines
from sevenfold.data.sources.text_encoding import with_text_format
from sevenfold.errors import InputError, first_line
from sevenfold.recipe import Data, Source

TEXT_COLUMNS = ("text", "document", "content")  # usual names of the column with a document's text
_BATCH_ROWS = 256  # read from a parquet file at once
_PIECE_BYTES = 2**20  # read from a CSV file at once
_MAX_DOCUMENT_BYTES = int(Data.model_fields["max_document_mb"].default * 1e6)


@dataclass(frozen=True)
class Record:
    """A row of a file.

    Attributes:
        file: The path or URL of the file.
        row: The number of the row, or of the line; the first is 1.
        columns: Column name -> value. A line of plain text has the single column `text`.
        error: Why the row cannot be read; "" if it can.
    """

    file: str
    row: int
    columns: dict[str, Any]
    error: str = ""

    @property
    def location(self) -> str:
        """The file and the number of the row, for messages."""
        return f"{self.file}: row {self.row}"

    def text(self, column: str | None = None, whole: bool = True) -> str:
        """Returns the text of the row.

        Args:
            column: The column to take it from. Default: the first of TEXT_COLUMNS that the row has.
            whole: Whether to return all strings of the row, also nested ones, one per line, if the
                row has none of these columns.

        Raises:
            ValueError: The row cannot be read, has no such column, or has no text.
        """
        name = column or next((c for c in TEXT_COLUMNS if c in self.columns), None)
        if self.error:
            raise ValueError(self.error)
        if name is None and not whole:
            raise ValueError(
                f"expected one of the columns {', '.join(TEXT_COLUMNS)}, "
                f"found {', '.join(self.columns) or 'none'}"
            )
        if name is not None and name not in self.columns:
            raise ValueError(
                f"expected a column {name!r}, found {', '.join(self.columns) or 'none'}"
            )
        text = "\n".join(_strings(self.columns if name is None else self.columns[name]))
        if not text.strip():
            raise ValueError("no text")
        return text


def records(source: Source) -> Iterator[Record]:
    """Yields the rows of a source: of a file, or all files of a folder or glob, local or at a URL.

    The files may be parquet, Arrow, JSON lines, CSV or text; all but the first two may be
    compressed. A text is one row per line (blank lines are left out), or one row if there are
    several and the source has no separator, as they are trained on. Only a few rows are in memory
    at a time.

    Raises:
        InputError: There are no files, or a file is damaged or not what its name says.
        RunError: The storage keeps failing.
    """
    paths = [file.path for file in find_files(source).files]
    is_whole = is_divided_by_files(source, paths)
    for file in paths:
        shard = replace(named_shard(file, 0, source), whole=is_whole)
        try:
            with storage.open_read(file) as opened:
                shard = with_text_format(shard, source, opened)
            yield from _rows_of(shard)
        except (pa.ArrowException, OSError, EOFError) as e:
            raise InputError(
                f"{file}: expected {shard.format} (by its name), found other or damaged content: "
                f"{first_line(e)}"
            ) from None


def _strings(value: Any) -> Iterator[str]:
    """Yields all strings in a value, also nested ones."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _strings(item)


def _rows_of(shard: Shard) -> Iterator[Record]:
    if shard.has_cells:
        yield from _csv_rows(shard)
    elif not shard.is_binary:
        yield from _lines(shard)
    else:
        with storage.open_read(shard.path) as file:
            yield from _batch_rows(shard.path, _batches(file, shard))


def _batches(file: storage.Reader, shard: Shard) -> Iterator[pa.RecordBatch]:
    if shard.format == "parquet":
        yield from pq.ParquetFile(file).iter_batches(_BATCH_ROWS, use_threads=False)
        return
    layout = arrow_batches.read_layout(file, shard)
    for index in range(len(layout.batches)):
        yield arrow_batches.read_batch(file, shard, layout, index, layout.schema.names)


def _batch_rows(path: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    row = 0
    for batch in batches:
        for i in range(len(batch)):
            row += 1
            try:
                yield Record(path, row, batch.slice(i, 1).to_pylist()[0])
            except UnicodeDecodeError:
                yield Record(path, row, {}, "not UTF-8")


def _csv_rows(shard: Shard) -> Iterator[Record]:
    """Yields the rows below a header."""
    with storage.open_read(shard.path) as file, storage.open_read(shard.path) as again:
        names = csv_cells.column_names(file, shard)
        row = 0
        for piece in csv_rows.split_rows(file, shard, blocks(file, shard), _PIECE_BYTES):
            text = csv_cells.read_piece(again, shard, piece.start, piece.end)
            cells = csv_cells.parse(text, shard, names, names)
            found = [(int(n), i, "") for i, n in enumerate(cells.numbers)]
            found += [(n, -1, reason) for n, reason in cells.ragged.items()]
            for number, index, error in sorted(found):
                try:
                    columns = {} if error else cells.table.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    columns, error = {}, "not UTF-8"
                yield Record(shard.path, row + number + 1, columns, error)
            row += len(found)


def _lines(shard: Shard) -> Iterator[Record]:
    with storage.open_read(shard.path) as file:
        if shard.whole and shard.format == "txt":
            text, is_cut = _whole_text(file, shard)
            if not is_cut:
                columns, error = _parse_line(text, "txt")
                yield Record(shard.path, 1, columns, error)
                return
            file.seek(0)  # a large one has a document per line
        for row, line in enumerate(lines(file, shard), 1):
            if line.strip():
                columns, error = _parse_line(line, shard.format)
                yield Record(shard.path, row, columns, error)


def _whole_text(file: storage.Reader, shard: Shard) -> tuple[bytes, bool]:
    """Returns the text of a file, and whether it is too long to be one document."""
    read: list[bytes] = []
    size = 0
    for line in lines(file, shard):
        read.append(line)
        size += len(line) + 1
        if size > _MAX_DOCUMENT_BYTES:
            return b"", True
    return b"\n".join(read), False


def _parse_line(line: bytes, file_format: Format) -> tuple[dict[str, Any], str]:
    """Returns the columns of a line, and why it cannot be read ("" if it can)."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        value = {"text": text} if file_format == "txt" else parse_object(line)
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    except ValueError as e:
        return {}, first_line(e)
    try:
        "".join(_strings(value)).encode()
    except UnicodeEncodeError:  # JSON escapes can hold one half of a surrogate pair
        return {}, "not text: one half of a surrogate pair"
    return value, ""
