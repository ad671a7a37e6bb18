"""Columns of every type that programs write: as text, as labels, and in filters."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sevenfold.data.examples import ENCODERS
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import BadDocumentsError, Selection
from sevenfold.errors import InputError
from sevenfold.prepare.data import with_classes
from sevenfold.recipe import Recipe, Source, loads

STRINGS = {
    "string": pa.array(["a b", "c d", "e f"]),
    "large_string": pa.array(["a b", "c d", "e f"], pa.large_string()),
    "string_view": pa.array(["a b", "c d", "e f"], pa.string_view()),
    "categorical": pa.array(["a b", "c d", "e f"]).dictionary_encode(),
}


def rows(
    path: Path, objective: str = "causal", on_bad: str = "error", **settings: Any
) -> list[Any]:
    """Returns the fields of all rows of a file."""
    manifest = scan([Source.model_validate({"path": str(path), **settings})], objective)
    selection = Selection(ENCODERS[objective].fields, on_bad=on_bad)  # type: ignore[arg-type]
    read = [selection.read(manifest, i).fields for i in range(len(manifest))]
    return [row for fields in read for row in zip(*(f.to_pylist() for f in fields), strict=True)]


@pytest.mark.parametrize("kind", STRINGS)
def test_strings_of_every_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": STRINGS[kind], "split": STRINGS[kind]}), path)
    assert rows(path) == [("a b",), ("c d",), ("e f",)]
    for rule in ({"one_of": ["c d"]}, {"min_chars": 3, "one_of": ["c d", "x"]}):
        assert rows(path, filters=[{"column": "split", **rule}]) == [("c d",)]
        assert rows(path, filters=[{"column": "text", **rule}]) == [("c d",)]
    assert rows(path, "classify", columns={"label": "split"})[1] == ("c d", "c d")


LABELS = {
    "integers": pa.array([1, 2, 10]),
    "whole floats": pa.array([1.0, 2.0, 10.0]),
    "text": pa.array(["1", "2", "10"]),
    "categories of integers": pa.array([1, 2, 10]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_number_is_one_label_in_every_form(kind: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": LABELS[kind]}), tmp_path / "a.pq")
    assert [label for _, label in rows(tmp_path / "a.pq", "classify")] == ["1", "2", "10"]
    lines = [{"text": t, "label": v} for t, v in zip("abc", LABELS[kind].to_pylist(), strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [label for _, label in rows(tmp_path / "a.jsonl", "classify")] == ["1", "2", "10"]


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize("objective", ["classify", "sft"])
def test_a_missing_value_is_a_bad_row(missing: Any, objective: str, tmp_path: Path) -> None:
    names = {"classify": ("text", "label"), "sft": ("prompt", "completion")}[objective]
    columns = [["a", "b"], pa.array([1.5, missing], pa.float64(), from_pandas=False)]
    pq.write_table(pa.table(columns, list(names)), tmp_path / "a.parquet")
    lines = [dict(zip(names, row, strict=True)) for row in (("a", 1.5), ("b", missing))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, where in (("a.parquet", "row group 0, row 1"), ("a.jsonl", "line 2")):
        with pytest.raises(BadDocumentsError, match=f"{where}: no text in '{names[1]}'"):
            rows(tmp_path / name, objective)
        assert len(rows(tmp_path / name, objective, "skip")) == 1


def test_classes_are_in_numeric_order(tree: dict[str, Any], tmp_path: Path) -> None:
    lines = [{"text": f"t {i}", "label": i % 12} for i in range(24)]
    lines += [{"text": "u", "label": name} for name in ("no", "yes", "2b", "1.5")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = loads(yaml.safe_dump(tree), "").override(
        {"objective": "classify", "data.sources": [{"path": str(tmp_path)}], "data.held_out": 0}
    )
    manifest = scan(recipe.data.sources, "classify")
    found = with_classes(recipe, manifest).data.classes
    numbers = ["0", "1", "1.5", *map(str, range(2, 12))]
    assert found == [*numbers, "2b", "no", "yes"]


def test_plain_words_of_a_recipe_are_text(tree: dict[str, Any]) -> None:
    words = "no, yes, off, y, 12:30, 2024-01-31, 007, 1.0, true"
    text = yaml.safe_dump(tree | {"objective": "classify"}, sort_keys=False)
    text = text.replace("data:\n", f"data:\n  classes: [{words}]\n", 1)
    recipe: Recipe = loads(text, "")
    assert recipe.data.classes == [
        *("no", "yes", "off", "y", "12:30", "2024-01-31", "007", "1", "true")
    ]
    again = loads(recipe.to_yaml(), "")
    assert again.data.classes == recipe.data.classes and again.hash() == recipe.hash()


def test_mixed_types_in_a_filter_cost_one_row(tmp_path: Path) -> None:
    values = [5, "high", 7.5, None, 1]
    lines = [{"text": f"t{i}", "score": v} for i, v in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"filters": [{"column": "score", "min": 2}]}
    with pytest.raises(BadDocumentsError) as error:
        rows(tmp_path / "a.jsonl", **settings)
    assert error.value.bad == [
        ("line 2", "key 'score': expected a number for the filter on it, found str")
    ]
    assert rows(tmp_path / "a.jsonl", on_bad="skip", **settings) == [("t0",), ("t2",)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_filter_on_a_column_that_a_file_lacks(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": ["a"], "language": ["en"]}), path)
    else:
        path.write_text('{"text": "a", "language": "en"}\n')
    with pytest.raises(InputError, match=r"'lang'.* found text, language"):
        rows(path, filters=[{"column": "lang", "one_of": ["en"]}])
    if suffix == "jsonl":  # not every line needs to have it
        path.write_text('{"text": "a"}\n{"text": "b", "lang": "en"}\n')
        assert rows(path, filters=[{"column": "lang", "one_of": ["en"]}]) == [("b",)]


def test_long_values_are_no_decompression_bomb(tmp_path: Path) -> None:
    """Dictionaries of long values, and filters on columns that are much larger than the text."""
    long = [f"{i:06} " + "lorem ipsum " * 1300 for i in range(1500)]
    indices = pa.array([i % 1500 for i in range(20_000)], pa.int32())
    completions = pa.DictionaryArray.from_arrays(indices, pa.array(long[:400] * 4).slice(0, 1500))
    table = pa.table({"prompt": [f"p{i}" for i in range(20_000)], "completion": completions})
    pq.write_table(table.slice(0, 4000), tmp_path / "a.parquet")
    assert len(rows(tmp_path / "a.parquet", "sft")) == 4000
    bodies = pa.table({"text": [f"t{i}" for i in range(15_000)], "body": long * 10})
    pq.write_table(bodies, tmp_path / "b.parquet", row_group_size=15_000)
    settings = {"filters": [{"column": "body", "min_chars": 10}]}
    assert len(rows(tmp_path / "b.parquet", **settings)) == 15_000
