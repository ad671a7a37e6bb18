"""Parsing and validation of recipes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from sevenfold.errors import InputError
from sevenfold.recipe import Recipe, parse


@pytest.fixture
def path(tree: dict[str, Any], tmp_path: Path) -> str:
    recipe_path = tmp_path / "recipe.yaml"
    recipe_path.write_text(yaml.safe_dump(tree))
    return str(recipe_path)


@pytest.mark.parametrize("name", [p.name for p in sorted((ROOT / "jobs/recipes").glob("*.yaml"))])
def test_shipped_recipes_are_valid(name: str) -> None:
    path = str(ROOT / "jobs/recipes" / name)
    # Some recipes have no data path of their own; the user gives it on the command line.
    needs_path = "data.path=FILE" in Path(path).read_text()
    if needs_path:
        with pytest.raises(InputError, match=r"give data\.path=FILE_OR_FOLDER"):
            parse(path)
    recipe = parse(path, ["data.path=/data/rows.parquet"] if needs_path else [])
    paths = {s.path for s in [*recipe.data.sources, *recipe.data.validation]}
    assert not needs_path or paths == {"/data/rows.parquet"}
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_overrides(path: str) -> None:
    recipe = parse(
        path,
        [
            "optimizer.learning_rate=1e-3",
            "data.sources.0.path=elsewhere",
            "train.steps=11",
            "cluster.num_workers=2",
        ],
    )
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.data.sources[0].path == "elsewhere"
    assert (recipe.steps, recipe.cluster.num_workers) == (11, 2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "train.global_bacth=8",
            "unknown key 'train.global_bacth'; did you mean 'train.global_batch'",
        ),
        ("trian.steps=8", "unknown key 'trian'; did you mean 'train'"),
        ("data.sources.0.pth=x", "did you mean 'data.sources.0.path'"),
        ("train.steps=many", "train.steps: input should be a valid integer"),
        ("train.steps=-1", "greater than 0"),
        ("train.tokens=100", "either steps or tokens"),
        ("data.classes=[a, b]", "data.classes is for objective classify, found causal"),
        (
            "data.languages={source: en_XX, target: de_DE}",
            "data.languages is for objective seq2seq",
        ),
        (
            "data.sources.0.columns={source: text, target: text}",
            "expected a column of its own for each role, found 'text' for source and target",
        ),
        ("train.global_batch=6", "global_batch (6) must be a multiple of data.lanes (4)"),
        ("cluster.num_workers=5", "data.lanes (4) must be at least"),
        ("data.sources.3.path=x", "unknown key 'data.sources.3.path'"),
        ("train.steps", "expected key.path=value"),
        ("train.steps=[1", "expected YAML"),
        ("name=a/b", "name: string should match pattern"),
        ("model.path=x", "either config"),
        ("optimizer.name=adam", "optimizer.name: input should be 'adamw' or 'muon'"),
        ("parallel.tensor=2", "parallel.tensor (2) must divide cluster.num_workers"),
        ("cluster.num_workers=[3, 2]", "[fewest, most] or auto, found [3, 2]"),
        ("cluster.num_workers=[1, 5]", "data.lanes (4) must be at least"),
        ("cluster.num_workers=0", "expected a number above 0"),
        (
            "checkpoint.every=0",
            "checkpoint.every: expected a number of steps above 0, or auto, found 0",
        ),
        ("checkpoint.every=often", "above 0, or auto, found 'often'"),
        ("checkpoint.every=true", "above 0, or auto, found True"),
        ("checkpoint.mtbf_hours=0", "checkpoint.mtbf_hours: input should be greater than 0"),
        ("train.dtype=fp8", "train.dtype: input should be 'float32' or 'bfloat16'"),
        ("sweep.space.x.loguniform=[1, 1e-3]", "the space is empty"),
    ],
)
def test_invalid_override_gives_a_one_line_error(path: str, override: str, says: str) -> None:
    with pytest.raises(InputError) as e:
        parse(path, [override, *(["sweep.trials=2"] if "sweep" in override else [])])
    assert says in str(e.value) and "\n" not in str(e.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no file"):
        parse(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="found list"):
        parse(str(tmp_path / "list.yaml"))


def test_hash_covers_only_settings_that_change_results(path: str) -> None:
    recipe = parse(path)
    assert parse(path, ["cluster.num_workers=[1, 4]"]).workers == (1, 4)
    assert recipe.workers == (1, 1)
    for same in (
        "cluster.num_workers=3",
        "cluster.num_workers=[1, 4]",
        "storage=/elsewhere",
        "checkpoint.keep=5",
        "checkpoint.every=auto",
        "data.executor=inline",
        "name=other",
    ):
        assert parse(path, [same]).hash() == recipe.hash(), same
    for other in (
        "seed=4",
        "train.steps=9",
        "optimizer.learning_rate=0.5",
        "data.sequence_length=32",
    ):
        assert parse(path, [other]).hash() != recipe.hash(), other


def test_class_labels_may_be_numbers(tree: dict[str, Any]) -> None:
    tree["objective"], tree["data"]["classes"] = "classify", [0, True, "spam"]
    # Numbers and booleans become strings, as they do when a label column is read.
    assert Recipe.model_validate(tree).data.classes == ["0", "true", "spam"]


def test_tokens_are_rounded_up_to_steps(tree: dict[str, Any]) -> None:
    tree["train"] |= {"steps": None, "tokens": 8 * 64 * 3 + 1}
    assert Recipe.model_validate(tree).steps == 4
