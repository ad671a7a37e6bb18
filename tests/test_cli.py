"""Invalid input gives a one-line error and exit code 2, before anything is started or written."""

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from sevenfold.cli import main


@pytest.fixture
def folder(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_shared_ray: None
) -> Path:
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
        (["pretrain", "recipe.yaml", "train.global_bacth=8"], "did you mean 'train.global_batch'"),
        (["pretrain", "recipe.yaml", "train.steps=x"], "train.steps"),
        (
            ["pretrain", "recipe.yaml", "data.sources.0.path=none"],
            "expected a file or folder, found none",
        ),
        (["pretrain", "recipe.yaml", "data.sources.0.path=empty"], "in this folder, found none"),
        (
            ["pretrain", "recipe.yaml", "data.sources.0.path=fake"],
            "shard.parquet: expected a parquet file",
        ),
        (["pretrain", "recipe.yaml", "data.sources.0.text=body"], "expected a column 'body'"),
        (
            ["pretrain", "recipe.yaml", "train.global_batch=9"],
            "must be a multiple of data.lanes (4)",
        ),
        (["pretrain", "recipe.yaml", "model.config.model_type=lama"], "lama"),
        (["pretrain", "recipe.yaml", "model.config.vocab_size=12"], "below the tokenizer's 512"),
        (["finetune", "recipe.yaml"], "run it with jobs/pretrain.py"),
        (["sweep", "recipe.yaml"], "has no `sweep` section"),
        (
            [
                "sweep",
                "recipe.yaml",
                "sweep={trials: 2, space: {optimizer.rate: {uniform: [0, 1]}}}",
            ],
            "unknown key",
        ),
        (
            ["sweep", "recipe.yaml", "sweep={trials: 2, metric: x, space: {seed: {choice: [1]}}}"],
            "this recipe reports train/loss",
        ),
        (
            [
                "sweep",
                "recipe.yaml",
                "sweep={trials: 2, space: {tokenizer.vocab_size: {choice: [512]}}}",
            ],
            "the same for all trials",
        ),
        (["pretrain", "recipe.yaml", "model.config.hidden_size=abc"], "model.config: "),
        (["pretrain", "recipe.yaml", "adapter={rank: 4}"], "adapter needs model.path"),
        (["pretrain", "recipe.yaml", "data.corpus=python", "model.config.model_type=lama"], "lama"),
        (["pretrain", "recipe.yaml", "seed=20261123000"], "seed"),
        (
            ["finetune", "recipe.yaml", "objective=sft", "validation.max_new_tokens=64"],
            "no room for a prompt",
        ),
        (["evaluate", "empty", "--workers", "0"], "greater than or equal to 1"),
        (["evaluate", "empty"], "expected a run"),
        (["evaluate"], "Missing argument"),
        (["export", "empty"], "expected a run"),
        (["export", "empty", "--step", "x"], "valid integer"),
        (["pretrain", "recipe.yaml", "name"], "expected key.path=value"),
        (["corpus", "python", "--out", "empty"], "one that exists"),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    before = sorted(folder.rglob("*"))
    try:
        code = main(argv)
    except SystemExit as e:
        code = int(e.code or 0)
    stderr = capsys.readouterr().err
    assert code == 2 and says in stderr, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["pretrain", "recipe.yaml", "--dry-run", "train.steps=7"]) == 0
    output = capsys.readouterr().out
    assert yaml.safe_load(output)["train"]["steps"] == 7
    for line in (
        "parameters: 37,024",
        "tokens per step: 512 (8 sequences of 64)",
        "steps: 7, 3,584 tokens",
        "chunks: ",
        "needs: 1.25 CPU",
    ):
        assert line in output, output
    assert sorted(folder.rglob("*")) == before


def test_a_dry_run_shows_foreign_text_as_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = r'storage="a\x1b[31m\u202e\nsteps: 9"'
    assert main(["pretrain", "recipe.yaml", "--dry-run", storage]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\u202e" not in output
    # a newline in a name does not end the comment that the name is in
    assert r"a\x1b[31m\u202e\nsteps: 9/tiny" in output.rstrip().splitlines()[-1]
    assert "steps" not in yaml.safe_load(output)


@pytest.mark.parametrize("argument", ["a\x1b[31m", "a\nb", "[red]a\u202e"])
def test_an_echoed_argument_is_text(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([argument], ["corpus", argument], ["plan", f"--{argument}"]):
        assert main(argv) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: sevenfold") and stderr.endswith(" --help\n")
        assert stderr.count("\n") == 1 and "\x1b" not in stderr and "\u202e" not in stderr
    assert main(["corpus"]) == 2
    assert "Choose from: python; see" in capsys.readouterr().err


def test_an_interrupted_command_has_the_exit_code_of_ctrl_c(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sevenfold.plan.command.run", interrupt)
    assert main(["plan", "recipe.yaml"]) == 130
    assert "Stopped; run the same command to resume" in capsys.readouterr().err
