"""JSON lines: the columns of documents, and what is wrong with lines that cannot be read."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json

from sevenfold.data.sources.filters import pass_all, why_not_comparable
from sevenfold.data.sources.messages import to_json
from sevenfold.data.sources.shards import BadDocument, RawDocuments, Shard
from sevenfold.data.sources.text_blocks import count_lines_before
from sevenfold.errors import first_line
from sevenfold.recipe import Filter, Source


def parse_json_lines(
    data: bytes,
    start: int,
    shard: Shard,
    source: Source,
    text_columns: Sequence[str],
    bad: list[BadDocument],
) -> RawDocuments:
    """Parses JSON lines: with pyarrow if all are good, else line by line to find the bad ones.

    Args:
        data: The lines.
        start: Their offset in the shard, in uncompressed bytes.
        shard: The shard, whose lines are counted when a location has to be named.
        source: Its source.
        text_columns: The keys that documents are made from.
        bad: Documents known to be bad already; those found here are appended.
    """
    rules = [rule for rule in source.filters if rule.column not in text_columns]
    filter_columns = sorted({rule.column for rule in rules})

    @functools.cache
    def lines_before() -> int:  # reads the shard up to `start`: only if needed, and once
        return count_lines_before(shard, start)

    def locate_line(index: int) -> str:
        return f"line {lines_before() + index + 1}"

    table = _parse_with_pyarrow(data, text_columns, filter_columns) if data.strip() else None
    if table is not None:
        columns = {c: table[c] for c in text_columns}
        tested = {name: table[name] for name in filter_columns}
        passes = pass_all(tested, rules, len(table), shard.path) if rules else None
        return RawDocuments(columns, locate_line, bad, passes)
    rows: list[dict[str, Any]] = []
    line_indices: list[int] = []
    for index, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        try:
            rows.append(_parse_line(line, text_columns, rules, source.shape is not None))
            line_indices.append(index)
        except UnicodeError:
            bad.append(BadDocument(locate_line(index), "not UTF-8"))
        except (ValueError, RecursionError) as e:
            bad.append(BadDocument(locate_line(index), first_line(e)))
    columns = {}
    for column in text_columns:
        values = pa.array([row[column] for row in rows], pa.large_string())
        columns[column] = pa.chunked_array([values])
    tested = {c: pa.array([row[c] for row in rows]) for c in filter_columns}
    passes = pass_all(tested, rules, len(rows), shard.path) if rules else None
    return RawDocuments(columns, lambda i: locate_line(line_indices[i]), bad, passes)


def _parse_with_pyarrow(
    data: bytes, text_columns: Sequence[str], filter_columns: Sequence[str]
) -> pa.Table | None:
    """Returns the table of some JSON lines, or None if anything about them needs a closer look."""
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(c, pa.large_string()) for c in text_columns]),
                unexpected_field_behavior="infer" if filter_columns else "ignore",
            ),
        )
        table.validate(full=True)
    except pa.ArrowException:
        return None
    # pyarrow accepts two objects on one line, and skips blank lines: then the line numbers would be
    # wrong.
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if len(table) != lines:
        return None
    if any(column not in table.column_names for column in filter_columns):
        return None
    if any(table[column].null_count for column in text_columns):
        return None
    return table


def _parse_line(
    line: bytes, text_columns: Sequence[str], rules: Sequence[Filter], any_type: bool
) -> dict[str, Any]:
    """Returns the columns of one line.

    Args:
        line: The line.
        text_columns: The keys of text.
        rules: The filters on other keys, which are returned too; None where a line has none.
        any_type: Whether text may be missing (None), and other values than strings are converted to
            strings, as JSON.

    Raises:
        ValueError: The line is no JSON object, a key of text is missing or holds no string, or a
            filter cannot be applied to a value; UnicodeError, which is a ValueError too, if the
            line is not UTF-8.
    """
    row = {key: None if _is_nan(value) else value for key, value in parse_object(line).items()}
    for key in text_columns:
        if any_type and not isinstance(row.get(key), str):
            row[key] = None if row.get(key) is None else to_json(row[key])
        if key not in row:
            raise ValueError(
                f"expected a key {key!r}, found {', '.join(map(str, row)) or 'none'}: correct the "
                "source's `text` or `columns`"
            )
        if not isinstance(row[key], str | None):
            raise ValueError(f"key {key!r}: expected a string, found {type(row[key]).__name__}")
        # JSON escapes can hold one half of a surrogate pair, which raises UnicodeEncodeError here.
        (row[key] or "").encode("utf-8")
    for rule in rules:
        if reason := why_not_comparable(row.get(rule.column), rule):
            raise ValueError(reason)
    return {column: row.get(column) for column in (*text_columns, *(r.column for r in rules))}


def _is_nan(value: Any) -> bool:
    """Returns whether a value is NaN, which some programs write for a missing one."""
    return isinstance(value, float) and math.isnan(value)


def parse_object(line: bytes) -> dict[str, Any]:
    """Returns the JSON object in a line. Raises ValueError if it holds none."""
    if line.lstrip().startswith(b"["):
        raise ValueError(
            "expected one JSON object per line, found an array: convert it with: jq -c '.[]' FILE"
        )
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"expected a JSON object, found invalid JSON: {e.msg}") from None
    except UnicodeError:
        raise
    except ValueError:  # Python converts no integer with more digits than its limit
        limit = sys.get_int_max_str_digits()
        raise ValueError(
            f"expected a JSON object, found an integer of over {limit} digits"
        ) from None
    except RecursionError:
        raise ValueError("expected a JSON object, found one that is nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return row
