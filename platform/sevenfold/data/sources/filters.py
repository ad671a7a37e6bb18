"""The filters of a source: which documents are read."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sevenfold.errors import InputError, first_line
from sevenfold.recipe import Filter
from sevenfold.recipe.data import number_text


def pass_all(
    columns: Mapping[str, Any], rules: Sequence[Filter], rows: int, path: str, as_text: bool = False
) -> Any:
    """Returns bool [rows], whether each row passes all filters.

    Args:
        columns: Column name -> values, as arrays of Arrow.
        rules: The filters.
        rows: The number of rows.
        path: The file, for messages.
        as_text: Whether numbers and booleans are written as text, as in CSV.

    Raises:
        InputError: A filter cannot be applied to a column of this type.
    """
    passed = np.ones(rows, bool)
    for rule in rules:
        passed &= _passes(columns[rule.column], rule, path, as_text)
    return passed


def _passes(column: Any, rule: Filter, path: str, as_text: bool) -> np.ndarray:
    """Returns bool [rows], whether each value meets all conditions of a filter."""
    if pa.types.is_null(column.type):
        return np.zeros(len(column), bool)
    conditions = []
    numbers = column
    if as_text and (rule.min is not None or rule.max is not None):
        numbers = numbers_of(column)
    try:
        if rule.min is not None:
            conditions.append(pc.greater_equal(numbers, rule.min))
        if rule.max is not None:
            conditions.append(pc.less_equal(numbers, rule.max))
        if rule.one_of is not None:
            values = _written(rule.one_of) if as_text else rule.one_of
            conditions.append(pc.is_in(column, pa.array(values).cast(column.type)))
        if rule.min_chars is not None:
            conditions.append(pc.greater_equal(pc.utf8_length(column), rule.min_chars))
        if rule.max_chars is not None:
            conditions.append(pc.less_equal(pc.utf8_length(column), rule.max_chars))
    except pa.ArrowException as e:
        raise InputError(
            f"{path}: filter on {rule.column!r} cannot be applied to values of type "
            f"{column.type}: {first_line(e)}"
        ) from None
    passed = functools.reduce(pc.and_kleene, conditions)
    return np.asarray(pc.fill_null(passed, False).to_numpy(zero_copy_only=False), bool)


def _written(values: Sequence[str | int | float | bool]) -> list[str]:
    """Returns the forms in which programs write some values as text."""
    texts = [v if isinstance(v, str) else number_text(v) for v in values]
    # Python writes True, Excel TRUE
    return texts + [
        form(str(v)) for v in values if isinstance(v, bool) for form in (str.title, str.upper)
    ]


def numbers_of(column: Any) -> Any:
    """Returns the numbers that a column of strings has; null where it has none."""
    plain = pc.ascii_trim_whitespace(column)
    try:
        numbers = plain.cast(pa.float64())
    except pa.ArrowInvalid:
        # only what these characters make up can be a number
        candidates = pc.match_substring_regex(plain, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
        numbers = pc.if_else(candidates, plain, pa.scalar(None, plain.type)).cast(pa.float64())
    return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)


def why_not_comparable(value: Any, rule: Filter) -> str:
    """Returns why a value of a JSON line cannot be compared by a filter; "" if it can.

    A missing value (None) can: it does not pass.
    """
    if value is None:
        return ""
    expected = ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (rule.min is not None or rule.max is not None) and not is_number:
        expected = "a number"
    if (rule.min_chars is not None or rule.max_chars is not None) and not isinstance(value, str):
        expected = "a string"
    if rule.one_of is not None and not any(_comparable(value, one) for one in rule.one_of):
        expected = f"a value such as {rule.one_of[0]!r}"
    if not expected:
        return ""
    return (
        f"key {rule.column!r}: expected {expected} for the filter on it, found "
        f"{type(value).__name__}"
    )


def _comparable(value: Any, other: Any) -> bool:
    """Returns whether two values of JSON are of the same kind."""
    if isinstance(value, bool) or isinstance(other, bool):
        return isinstance(value, bool) and isinstance(other, bool)
    if isinstance(value, str):
        return isinstance(other, str)
    return isinstance(value, int | float) and isinstance(other, int | float)
