"""Looks at the rows of data files: their columns, lengths, scripts and duplicates."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sevenfold import storage
from sevenfold.data.sources.messages import to_json
from sevenfold.data.sources.records import records
from sevenfold.errors import InputError
from sevenfold.inspect.survey import Survey
from sevenfold.recipe import Source
from sevenfold.report.console import counting

MAX_ROWS = 200_000  # that are read; larger data is judged by its first rows
NEAR_DUPLICATES = 2_000  # rows that are compared with each other
MAX_DISTINCT = 1_000  # values of a column that are counted
EXAMPLE_CHARS = 60
SAMPLE_ROWS = 500  # whose texts are kept, to count their tokens


@dataclass
class Column:
    """What a column holds.

    Attributes:
        example: The beginning of its first value.
        texts: The number of its values that are strings.
        lists: The number of its values that are lists or objects, also as JSON.
        filled: The number of its values that are not missing or empty.
        characters: The characters of all values.
        values: How often each value occurs; no more are added after MAX_DISTINCT.
    """

    example: str = ""
    texts: int = 0
    lists: int = 0
    filled: int = 0
    characters: int = 0
    values: Counter[str] = field(default_factory=Counter)

    def add(self, value: Any) -> None:
        """Adds the value of a row."""
        if value is None or value == "":
            return
        text = value if isinstance(value, str) else to_json(value, marked=False)
        self.filled += 1
        self.texts += isinstance(value, str)
        self.lists += isinstance(value, list | dict) or _is_json_list(text)
        self.characters += len(text)
        if not self.example:
            flat = " ".join(text.split())
            self.example = flat[:EXAMPLE_CHARS] + ("..." if len(flat) > EXAMPLE_CHARS else "")
        if len(text) <= 100 and (text in self.values or len(self.values) < MAX_DISTINCT):
            self.values[text] += 1

    @property
    def mean_characters(self) -> float:
        """The mean length of its values in characters."""
        return self.characters / max(1, self.filled)

    @property
    def is_class(self) -> bool:
        """Whether it could hold classes: few values, each of which occurs several times."""
        counted = self.values.total()
        return (
            self.lists == 0
            and counted == self.filled > 0
            and 2 <= len(self.values) <= min(100, self.filled / 4)
        )


@dataclass
class Rows:
    """What the rows of a file or folder hold.

    Attributes:
        path: The path, as it was given.
        formats: The number of files by their suffix.
        rows: The number of rows that were read.
        bad: The number of rows that cannot be read, and the first of them.
        is_complete: Whether all rows were read.
        columns: The columns by name.
        survey: Figures of the texts, see `inspect.survey`.
        sample: The first rows.
    """

    path: str
    formats: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    bad: int = 0
    first_bad: str = ""
    is_complete: bool = True
    columns: dict[str, Column] = field(default_factory=dict)
    survey: dict[str, Any] = field(default_factory=dict)
    sample: list[dict[str, Any]] = field(default_factory=list)


def look(path: str) -> Rows:
    """Reads rows, at most MAX_ROWS, and returns what they hold.

    Args:
        path: A file, folder or glob, local or a URL.

    Raises:
        InputError: There are no files, a file is damaged, or no row can be read.
    """
    found = Rows(path)
    survey = Survey(NEAR_DUPLICATES)
    last_file = ""
    with counting("reading", "rows") as show_count:
        for record in records(Source(path=path)):
            if found.rows + found.bad >= MAX_ROWS:
                found.is_complete = False
                break
            if record.file != last_file:
                last_file = record.file
                found.formats[_suffix(last_file)] += 1
            if record.error:
                found.bad += 1
                found.first_bad = found.first_bad or f"{record.location}: {record.error}"
                continue
            found.rows += 1
            for name, value in record.columns.items():
                found.columns.setdefault(name, Column()).add(value)
            if len(found.sample) < SAMPLE_ROWS:
                found.sample.append(record.columns)
            survey.add(row_text(record.columns), record.file, record.row)
            if found.rows % 100 == 0:
                show_count(found.rows)
    if not found.rows:
        first = f": {found.first_bad}" if found.bad else ""
        raise InputError(f"{path}: expected rows to train on, found none that can be read{first}")
    found.survey = survey.figures()
    return found


def row_text(columns: dict[str, Any]) -> str:
    """Returns all strings of a row."""
    return "\n".join(
        value if isinstance(value, str) else to_json(value, marked=False)
        for value in columns.values()
        if value is not None
    )


def _is_json_list(text: str) -> bool:
    if text[:1] not in "[{":
        return False
    try:
        return isinstance(json.loads(text), list | dict)
    except ValueError:
        return False


def _suffix(file: str) -> str:
    name = os.path.basename(storage.without_secrets(file))
    return os.path.splitext(name.removesuffix(".gz").removesuffix(".zst"))[1].lstrip(".") or "file"
