"""Rows of data files as they lie there, one after the other, for whoever looks at data instead of training on it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.data import shards
from sevenfold.errors import InputError
from sevenfold.recipe import Source

TEXT_COLUMNS = ("text", "document", "content")  # the names that a document's text is known by
_ROWS = 256  # of a parquet file at once


@dataclass(frozen=True)
class Record:
    """A row of a file.

    Attributes:
        row: its number in the file, or its line's; 1 is the first.
        columns: name -> value; a line of plain text is the column `text`.
        error: what is wrong with a row that cannot be read; '' where nothing is.
    """

    file: str
    row: int
    columns: dict[str, Any]
    error: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}: row {self.row}"

    def text(self, column: str | None = None, whole: bool = True) -> str:
        """The string in a column; default: in that of TEXT_COLUMNS which it has; else, where `whole`, all strings of the row,
        nested ones too, a line each. Raises ValueError, with what was expected and found, where there is none."""
        found = column or next((c for c in TEXT_COLUMNS if c in self.columns), None)
        if self.error:
            raise ValueError(self.error)
        if found is None and not whole:
            raise ValueError(
                f"expected one of the columns {', '.join(TEXT_COLUMNS)}, found {', '.join(self.columns) or 'none'}"
            )
        if found is not None and found not in self.columns:
            raise ValueError(f"expected a column {found!r}, found {', '.join(self.columns) or 'none'}")
        made = "\n".join(_strings(self.columns if found is None else self.columns[found]))
        if not made.strip():
            raise ValueError("no text")
        return made


def records(path: str) -> Iterator[Record]:
    """The rows of a file, folder or glob of shards, local or a URL: parquet, JSON lines, text with a row a line (blank lines
    are none); the latter two also compressed. Memory holds a few rows.

    Raises:
        InputError: nothing there, or a file that is not what its name says or is damaged.
        RunError: the storage keeps failing.
    """
    settings = Source(path=path)
    for file in storage.files(storage.locate(path), shards.suffixes(settings)):
        shard = shards.describe(file, 0, settings)
        try:
            yield from _parquet(file) if shard.format == "parquet" else _lines(shard)
        except (pa.ArrowException, OSError, EOFError) as e:
            raise InputError(f"{file}: expected {shard.format}, as its name says, found damage: {shards.line(e)}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _strings(v)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for v in value:
            yield from _strings(v)


def _parquet(file: str) -> Iterator[Record]:
    row = 0
    with storage.open_read(file) as f:
        for batch in pq.ParquetFile(f).iter_batches(_ROWS, use_threads=False):
            for i in range(len(batch)):
                row += 1
                try:
                    yield Record(file, row, batch.slice(i, 1).to_pylist()[0])
                except UnicodeDecodeError:
                    yield Record(file, row, {}, "not UTF-8")


def _lines(shard: shards.Shard) -> Iterator[Record]:
    with storage.open_read(shard.path) as f:
        stream: Any = pa.CompressedInputStream(pa.PythonFile(f, "r"), shard.compression) if shard.compression else f
        for row, line in enumerate(io.BufferedReader(stream), 1):
            if line.strip():
                columns, error = _columns(line, shard.format)
                yield Record(shard.path, row, columns, error)


def _columns(line: bytes, form: shards.Format) -> tuple[dict[str, Any], str]:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        value = {"text": text} if form == "txt" else json.loads(text)
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    except (ValueError, RecursionError) as e:
        return {}, f"expected a JSON object, found something else: {shards.line(e)}"
    if not isinstance(value, dict):
        return {}, f"expected a JSON object, found {type(value).__name__}"
    try:
        "".join(_strings(value)).encode()
    except UnicodeEncodeError:
        return {}, "half of a surrogate pair, which is no text"
    return value, ""
