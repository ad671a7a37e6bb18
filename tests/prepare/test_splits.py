"""Rows are divided by their column `split`, or else by a hash; named recipes need no override."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refused

from sevenfold.cli import main
from sevenfold.errors import InputError
from sevenfold.prepare.splits import with_splits
from sevenfold.recipe import Recipe, parse

NAMED = {
    "chat": {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    },
    "classify": {"text": "so good", "label": "good"},
    "retrieval": {"query": "what is it", "document": "it is that"},
    "summarize": {"document": "a long text", "summary": "text"},
    "translate-en-de": {"source": "one", "target": "eins"},
}


def rows(kind: str, splits: list[str | None]) -> list[dict[str, Any]]:
    return [NAMED[kind] | ({"split": s} if s else {}) for s in splits]


def divided(tmp_path: Path, splits: list[str | None], kind: str = "classify") -> Recipe:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, splits)))
    return with_splits(parse(kind, [f"data.path={path}"]))


def kept(sources: Any) -> list[list[str]]:
    return [source.filters[0].one_of for source in sources]


@pytest.mark.parametrize("kind", NAMED)
def test_a_named_recipe_takes_data_with_and_without_splits(tmp_path: Path, kind: str) -> None:
    data = divided(tmp_path, ["train", "train", "val", "test"], kind).data
    assert kept(data.sources) == [["train"]] and kept(data.validation) == [["val"]]
    assert kept(data.test) == [["test"]] and data.held_out == 0 and data.split_column is None
    data = divided(tmp_path, [None] * 4, kind).data
    assert data.held_out > 0 and data.split_column is None
    assert not (data.sources[0].filters or data.validation or data.test)


def test_the_usual_names_of_parts(tmp_path: Path) -> None:
    data = divided(tmp_path, ["training", "Train", "validation", "dev"]).data
    assert kept(data.sources) == [["Train", "training"]]
    assert kept(data.validation) == [["dev", "validation"]] and not data.test
    # without rows for validation, a part of the training rows is held out
    data = divided(tmp_path, ["train", "test"]).data
    assert data.held_out == 0.1 and not data.validation and kept(data.test) == [["test"]]


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        (["train", None, "test"], "1 of 3 rows have no 'split'"),
        (["train", "holdout"], "found 'holdout'"),
        (["test", "val"], "no row has train or training"),
    ],
)
def test_parts_that_are_unclear_are_refused(
    tmp_path: Path, splits: list[str | None], says: str
) -> None:
    with pytest.raises(InputError) as error:
        divided(tmp_path, splits)
    assert says in str(error.value) and "data.split_column" in str(error.value)


def test_a_split_column_does_not_change_the_hash_of_a_recipe(tmp_path: Path) -> None:
    """A run that was started with filters resumes with a recipe that has split_column."""
    path = tmp_path / "rows.jsonl"
    recipe = divided(tmp_path, ["train", "val", "test"])
    parts = {"sources": "train", "validation": "val", "test": "test"}
    filters = {
        f"data.{key}": [{"path": str(path), "filters": [{"column": "split", "one_of": [value]}]}]
        for key, value in parts.items()
    }
    explicit = parse("classify", [f"data.path={path}", "data.split_column=null"])
    assert recipe.hash() == explicit.override({**filters, "data.held_out": 0}).hash()


def test_recipes_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'classify'?" in refused(capsys, "finetune", "clasify", "data.path=x")
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in (*NAMED, "quickstart", "llama-7b"):
        assert f"\n{name} " in "\n" + listed
    assert main(["recipes", "chat"]) == 0
    (tmp_path / "chat").write_text(capsys.readouterr().out.replace("name: chat", "name: mine"))
    # a file of the user's own takes precedence over a name
    assert parse("chat", ["data.path=x"]).name == "mine"
    assert main(["cluster-files", "cluster"]) == 0
    assert (tmp_path / "cluster/cluster.yaml").exists()
    assert (tmp_path / "cluster/deploy/aws.yaml").exists()
    assert "exists already" in refused(capsys, "cluster-files", "cluster")
