"""The folder of a run belongs to one recipe."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sevenfold.errors import InputError
from sevenfold.prepare.job import claim_folder
from sevenfold.recipe import loads
from sevenfold.run_folder import RunFolder


def test_a_run_may_be_resumed_with_another_micro_batch(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = loads(yaml.safe_dump(tree), "")
    folder = RunFolder(str(tmp_path / "run"))
    identity = claim_folder(folder, recipe)
    assert identity == recipe.hash()
    for micro_batch in (2, 1, 4):
        changed = recipe.override({"train.micro_batch": micro_batch})
        # The checkpoints still know the run by its first recipe.
        assert claim_folder(folder, changed) == identity
        stored = yaml.safe_load(Path(folder.recipe).read_text())
        assert stored["train"]["micro_batch"] == micro_batch
    with pytest.raises(InputError, match=r"another recipe .*seed: 3 in that run, 4 in this"):
        claim_folder(folder, recipe.override({"seed": 4, "train.micro_batch": 2}))


def test_settings_of_later_versions_change_no_hash_while_unset(tree: dict[str, Any]) -> None:
    recipe = loads(yaml.safe_dump(tree), "")
    identity = recipe.identity()
    assert "ignore_columns" not in identity["data"]
    assert all("encoding" not in source for source in identity["data"]["sources"])
    assert recipe.override({"data.ignore_columns": ["id"]}).hash() != recipe.hash()
    assert recipe.override({"data.sources.0.encoding": "gb18030"}).hash() != recipe.hash()
    # how answers are measured changes no weight; earlier versions had this default
    assert identity["validation"]["bleu_tokenize"] == "13a"
    assert recipe.override({"validation.bleu_tokenize": "zh"}).hash() == recipe.hash()
