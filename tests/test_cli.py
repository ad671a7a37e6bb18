"""What is wrong is said in one line, with exit code 2, before anything is started or written."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sevenfold.cli import main


@pytest.fixture
def folder(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_shared_ray: None) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/shard.parquet").write_text("no parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEVENFOLD_HOME", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["pretrain", "none.yaml"], "none.yaml: expected a recipe"),
        (["pretrain", "recipe.yaml", "train.global_bacth=8"], "did you mean 'global_batch'"),
        (["pretrain", "recipe.yaml", "train.steps=x"], "train.steps"),
        (["pretrain", "recipe.yaml", "data.sources.0.path=none"], "expected a file or folder, found none"),
        (["pretrain", "recipe.yaml", "data.sources.0.path=empty"], "in this folder, found none"),
        (["pretrain", "recipe.yaml", "data.sources.0.path=fake"], "shard.parquet: expected a parquet file"),
        (["pretrain", "recipe.yaml", "data.sources.0.text=body"], "expected a column 'body'"),
        (["pretrain", "recipe.yaml", "train.global_batch=9"], "cannot be dealt out"),
        (["pretrain", "recipe.yaml", "model.config.model_type=lama"], "lama"),
        (["pretrain", "recipe.yaml", "model.config.vocab_size=12"], "below the tokenizer's 512"),
        (["finetune", "recipe.yaml"], "run it by jobs/pretrain.py"),
        (["sweep", "recipe.yaml"], "expected a `search` section"),
        (["sweep", "recipe.yaml", "search={trials: 2, space: {optimizer.rate: {uniform: [0, 1]}}}"], "unknown key"),
        (
            ["sweep", "recipe.yaml", "search={trials: 2, metric: x, space: {seed: {choice: [1]}}}"],
            "this recipe reports train/loss",
        ),
        (
            ["sweep", "recipe.yaml", "search={trials: 2, space: {tokenizer.vocab_size: {choice: [512]}}}"],
            "the same for all trials",
        ),
        (["pretrain", "recipe.yaml", "model.config.hidden_size=abc"], "model.config: "),
        (["pretrain", "recipe.yaml", "adapter={rank: 4}"], "adapter needs model.path"),
        (["pretrain", "recipe.yaml", "data.corpus=python", "model.config.model_type=lama"], "lama"),
        (["pretrain", "recipe.yaml", "seed=20261123000"], "seed"),
        (["pretrain", "recipe.yaml", "validation.max_new_tokens=64"], "no room for a prompt"),
        (["evaluate", "empty", "--workers", "0"], "invalid choice"),
        (["evaluate", "empty"], "expected a run"),
        (["evaluate"], "required: runs"),
        (["export", "empty"], "expected a run"),
        (["export", "empty", "--step", "x"], "invalid int value"),
        (["pretrain", "recipe.yaml", "name"], "expected key.path=value"),
        (["corpus", "python", "--out", "empty"], "one that exists"),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    before = sorted(folder.rglob("*"))
    try:
        code = main(argv)
    except SystemExit as e:
        code = int(e.code or 0)
    said = capsys.readouterr().err
    assert code == 2 and says in said, said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["pretrain", "recipe.yaml", "--dry-run", "train.steps=7"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["train"]["steps"] == 7
    for figure in (
        "parameters: 37,024",
        "tokens a step: 512 (8 rows of 64)",
        "steps: 7, 3,584 tokens",
        "chunks: ",
        "needs: 1.25 CPU",
    ):
        assert figure in out, out
    assert sorted(folder.rglob("*")) == before
