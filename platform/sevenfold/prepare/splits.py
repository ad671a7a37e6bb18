"""Divides rows into training, validation and test data by a column (data.split_column)."""

from __future__ import annotations

from collections import Counter

from sevenfold.data.sources.records import records
from sevenfold.errors import InputError
from sevenfold.recipe import Filter, Recipe, Source
from sevenfold.report.console import say

# The usual names of the parts, as `datasets` and others write them.
PARTS = {
    "sources": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def with_splits(recipe: Recipe) -> Recipe:
    """Returns the recipe with filters in place of data.split_column.

    Without the column, the data is divided by data.held_out. With it, held_out has no effect unless
    there are no rows for validation.

    Raises:
        InputError: Only some rows have the column, it has values that name no part, or none of its
            rows is for training.
    """
    data, column = recipe.data, recipe.data.split_column
    if column is None:
        return recipe
    values = _count_values(data.sources, column)
    missing = values.pop(None, 0)
    if not values:
        return recipe.override({"data.split_column": None})
    if missing:
        raise InputError(
            f"data.split_column: {missing:,} of {missing + values.total():,} rows have no "
            f"{column!r}: fill it in, or divide all rows by a hash (data.split_column=null)"
        )
    known = {name for names in PARTS.values() for name in names}
    unknown = [value for value in values if str(value).lower() not in known]
    if unknown:
        raise InputError(
            f"data.split_column: expected {', '.join(sorted(known))} in the column {column!r}, "
            f"found {unknown[0]!r}: rename it, or divide all rows by a hash "
            "(data.split_column=null)"
        )
    parts = {
        key: sorted(str(value) for value in values if str(value).lower() in names)
        for key, names in PARTS.items()
    }
    if not parts["sources"]:
        raise InputError(
            f"data.split_column: no row has {' or '.join(PARTS['sources'])} in the column "
            f"{column!r}; it has {', '.join(map(str, values))}"
        )
    filtered = {
        f"data.{key}": [_filtered(source, column, names) for source in data.sources]
        for key, names in parts.items()
        if names
    }
    held_out = 0.0 if parts["validation"] else data.held_out
    counts = ", ".join(f"{count:,} {value}" for value, count in values.items())
    rest = f"; {held_out:.0%} of the training rows are for validation" if held_out else ""
    say(f"rows by their column {column!r}: {counts}{rest}")
    return recipe.override({**filtered, "data.held_out": held_out, "data.split_column": None})


def _count_values(sources: list[Source], column: str) -> Counter[object]:
    """Counts the values of a column; rows without one count as None."""
    return Counter(
        record.columns.get(column)
        for source in sources
        for record in records(source)
        if not record.error
    )


def _filtered(source: Source, column: str, names: list[str]) -> dict[str, object]:
    """Returns a source with one more filter."""
    rule = Filter(column=column, one_of=list(names))
    return source.model_copy(update={"filters": [*source.filters, rule]}).model_dump(mode="json")
