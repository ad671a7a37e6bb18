"""Documents set aside: what a run watches, and what it is measured on."""

import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.recipe import Recipe
from sevenfold.runs import prepare
from sevenfold.storage import RunFolder


def recipe(tree: dict[str, Any], at: Path, **test: Any) -> Recipe:
    rows = {"train": range(40), "val": range(40, 50), "test": range(50, 60)}
    lines = [json.dumps({"text": f"the document {i}", "split": split}) for split, numbers in rows.items() for i in numbers]
    (at / "rows.jsonl").write_text("\n".join(lines))
    part = {s: [{"filters": [{"column": "split", "one_of": [s]}]}] for s in rows}
    data = tree["data"] | {"path": str(at / "rows.jsonl"), "sources": part["train"], "validation": part["val"]} | test
    return Recipe.model_validate(tree | {"data": data})


def texts(stream: Any) -> set[str]:
    return {text for (column,) in stream.documents() for text in column}


@pytest.mark.parametrize("given", [True, False])
def test_what_is_watched_and_what_is_measured(tree: dict[str, Any], tmp_path: Path, given: bool) -> None:
    more = {"test": [{"filters": [{"column": "split", "one_of": ["test"]}]}]} if given else {}
    made, folder = recipe(tree, tmp_path, **more), RunFolder(str(tmp_path / "run"))
    found = prepare.settle(made, prepare.inputs(made), folder.tokenizer)
    storage.write(folder.manifest, json.dumps({k: m.to_json() for k, m in found.all.items()}))
    train, watched = prepare.reopen(folder, made)
    _, measured = prepare.reopen(folder, made, test=True)
    assert texts(train) == {f"the document {i}" for i in range(40)}
    assert texts(watched) == {f"the document {i}" for i in range(40, 50)}
    assert texts(measured) == {f"the document {i}" for i in (range(50, 60) if given else range(40, 50))}


def test_a_missing_test_file_is_told_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    made = recipe(tree, tmp_path, test=[{"path": "no.jsonl"}])
    with pytest.raises(InputError, match=r"no\.jsonl: expected a file or folder, found none"):
        prepare.inputs(made)
