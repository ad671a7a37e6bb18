"""Held-out data: documents for the validations during training, and for the final test."""

import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.prepare.data import find_inputs
from sevenfold.prepare.streams import open_streams
from sevenfold.prepare.tokenizer import prepare_tokenizer
from sevenfold.recipe import Recipe
from sevenfold.run_folder import RunFolder


def recipe(tree: dict[str, Any], folder: Path, **test: Any) -> Recipe:
    """A recipe over one file whose column `split` says which document is for what."""
    rows = {"train": range(40), "val": range(40, 50), "test": range(50, 60)}
    lines = [
        json.dumps({"text": f"the document {i}", "split": split})
        for split, indices in rows.items()
        for i in indices
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    filters = {split: [{"filters": [{"column": "split", "one_of": [split]}]}] for split in rows}
    data = (
        tree["data"]
        | {
            "path": str(folder / "rows.jsonl"),
            "sources": filters["train"],
            "validation": filters["val"],
        }
        | test
    )
    return Recipe.model_validate(tree | {"data": data})


def texts(stream: Any) -> set[str]:
    """The set of all texts of a stream."""
    return {text for (column,) in stream.documents() for text in column}


@pytest.mark.parametrize("given", [True, False])
def test_validation_and_test_read_their_own_documents(
    tree: dict[str, Any], tmp_path: Path, given: bool
) -> None:
    test_data = {"test": [{"filters": [{"column": "split", "one_of": ["test"]}]}]} if given else {}
    parsed, folder = recipe(tree, tmp_path, **test_data), RunFolder(str(tmp_path / "run"))
    manifests = prepare_tokenizer(parsed, find_inputs(parsed), folder.tokenizer)
    storage.write(
        folder.manifest,
        json.dumps({name: manifest.to_json() for name, manifest in manifests.all.items()}),
    )
    train, validation = open_streams(folder, parsed)
    _, test = open_streams(folder, parsed, test=True)
    assert texts(train) == {f"the document {i}" for i in range(40)}
    assert texts(validation) == {f"the document {i}" for i in range(40, 50)}
    assert texts(test) == {f"the document {i}" for i in (range(50, 60) if given else range(40, 50))}


def test_a_missing_test_file_is_refused_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    parsed = recipe(tree, tmp_path, test=[{"path": "no.jsonl"}])
    with pytest.raises(InputError, match=r"no\.jsonl: expected a file or folder, found none"):
        find_inputs(parsed)
