"""Each key of a recipe is explained; the page and the JSON Schema of all keys are the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from sevenfold import recipe as recipe_package
from sevenfold.cli import main
from sevenfold.data.sources.formats import SHAPES
from sevenfold.recipe import parse
from sevenfold.recipe.explain import (
    default_text,
    description,
    explain,
    listed_keys,
    markdown,
    schema,
    schema_text,
    type_text,
)
from sevenfold.recipe.keys import all_keys, as_path, find
from sevenfold.recipe.synonyms import SECTIONS, SYNONYMS
from sevenfold.recipe.units import unit_of

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = Path(recipe_package.__file__).with_name("schema.json")
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.path)
def test_each_key_is_described(key: Any) -> None:
    text = description(key)
    assert len(text) > 10 and text.endswith((".", "!")), "write a description"
    assert not re.search(r"[a-z_]+\.py\b(?!\))", text.replace("jobs/tokenize.py", "")), text
    numbers = {"whole number", "number"}
    if key.section is None and numbers & set(
        re.split(r"[\[\], ]{1,2}(?=whole|number)|[\]]| (?:or|above|at|below) ", type_text(key))
    ):
        assert unit_of(key.path), "give the number a unit in units.py"
    if not key.field.is_required() and key.field.get_default() is None and key.section is None:
        assert "Default: " in text, "say what happens without it"
    shown = explain(key.path)
    assert shown.startswith(f"{key.path}\n") and f"  default: {default_text(key)}" in shown
    assert f"  type:    {type_text(key)}" in shown
    assert key.section is not None or f"  example: {key.path.split('.KEY')[0]}" in shown


def test_units_are_those_of_keys() -> None:
    from sevenfold.recipe import units

    known = {key.path for key in listed_keys()}
    assert set(units._UNIT_OF) <= known and set(units.EXAMPLES) <= known


def test_the_shapes_of_rows_are_listed() -> None:
    text = description(find(as_path("data.sources.0.shape")))  # type: ignore[arg-type]
    for objective, shapes in SHAPES.items():
        assert f"{objective}: {', '.join(shape.name for shape in shapes)}" in text


@pytest.mark.parametrize("name", sorted({*SYNONYMS, *SECTIONS} - {k.name for k in all_keys()}))
def test_settings_of_other_tools_are_explained(name: str) -> None:
    head = explain(name).splitlines()[0]
    assert head.startswith(f"{name} is ") or head.startswith(f"{name}: ")
    assert len(head) > len(name) + 10


def test_words_and_short_names_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("learning_rate") == explain("optimizer.learning_rate")
    assert explain("--learning-rate") == explain("optimizer.learning_rate=1e-3")
    assert explain("data.sources.3.path") == explain("data.sources.path")
    assert {"validation.every", "checkpoint.every"} <= set(
        re.findall(r"^\S+", explain("every"), re.M)
    )
    assert "guard.spike_factor" in explain("spike")
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [key.path for key in listed_keys()]
    assert max(map(len, listed)) <= 100
    assert main(["explain", "zzzq"]) == 2
    assert "`sevenfold explain` lists all keys" in capsys.readouterr().err


def test_the_page_and_the_schema_are_those_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """Run `sevenfold explain --markdown > docs/recipe.md` and `sevenfold schema > SCHEMA`."""
    assert (ROOT / "docs/recipe.md").read_text() == markdown()
    assert SCHEMA.read_text() == schema_text()
    for command, text in ((["explain", "--markdown"], markdown()), (["schema"], schema_text())):
        assert main(command) == 0
        assert capsys.readouterr().out == text
    page = markdown()
    assert all(f"| `{key.name}` |" in page for key in all_keys())


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_shipped_recipes(path: Path, validator: Any) -> None:
    tree = yaml.safe_load(path.read_text())
    assert [e.message for e in validator.iter_errors(tree)] == []
    tree["data"]["path"] = "/data"
    validator.validate(tree)
    changes = ["data.path=/data"] if "data.path=FILE" in path.read_text() else []
    validator.validate(yaml.safe_load(parse(str(path), changes).to_yaml()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_editors_find_the_schema_of_shipped_recipes(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named and not Path(named[1]).is_absolute()
    assert (path.parent / named[1]).resolve() == SCHEMA.resolve()


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"lr": 1}},
        {"optimizer": {"name": "adam"}},
        {"optimiser": {}},
        {"train": {"global_batch": "8", "micro_batch": 1}},
        {"data": {"sources": [{"pth": "a"}], "sequence_length": 8}},
        {"model": 3},
        {"name": None},
    ],
)
def test_the_schema_refuses_mistakes(change: dict[str, Any], validator: Any) -> None:
    tree = yaml.safe_load((ROOT / "jobs/recipes/quickstart.yaml").read_text())
    assert validator.is_valid(tree) and not validator.is_valid(tree | change)


def test_dictionaries_stay_open(validator: Any) -> None:
    tree = yaml.safe_load((ROOT / "jobs/recipes/classify.yaml").read_text())
    tree["model"]["config"] |= {"anything": [{"x": None}]}
    tree["data"] |= {"classes": [0, 1, True, "x"]}
    tree["cluster"] = {"num_workers": [1, 4], "worker_labels": {"pool": "a"}}
    tree["checkpoint"] = {"every": "auto"}
    validator.validate(json.loads(json.dumps(tree)))
