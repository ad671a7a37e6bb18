"""Changes of a recipe as arguments: key=value, --key value, and what is misspelt among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
import yaml

from sevenfold.cli import app, main
from sevenfold.commands.arguments import with_recipe_options
from sevenfold.errors import InputError
from sevenfold.recipe import parse

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RECIPE = """\
name: x
data: {sources: [{path: a}], sequence_length: 64}
tokenizer: {vocab_size: 512}
model: {config: {model_type: llama}}
train: {global_batch: 8, micro_batch: 4, steps: 10}
adapter:
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return "r.yaml"


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--train.steps", "100"], {"train.steps": 100}),
        (["--train.steps=100"], {"train.steps": 100}),
        (["--train.global-batch=4", "--dry-run"], {"train.global_batch": 4}),
        (["--train.compile", "true", "-v"], {"train.compile": True}),
        (["--model.config.hidden_size", "32"], {"model.config.hidden_size": 32}),
        (["--data.sources.0.path", "b=c"], {"data.sources.0.path": "b=c"}),
        (["--seed", "7", "train.steps=11"], {"seed": 7, "train.steps": 11}),
        (["--name", "y", "--trust-remote-code", "train"], {"name": "y"}),
        (["--tokenizer.train-mb=1e-3"], {"tokenizer.train_mb": 1e-3}),
        (["--", "train.steps=12"], {"train.steps": 12}),
        (
            ["model.path=m", "model.config=null", "tokenizer={}", "adapter.rank=4"],
            {"adapter.rank": 4, "model.config": None},
        ),
    ],
)
def test_a_key_may_be_an_option(
    recipe: str,
    arguments: list[str],
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed = []
    monkeypatch.setattr("sevenfold.train.launch.pretrain", lambda recipe, _: parsed.append(recipe))
    monkeypatch.setattr(
        "sevenfold.prepare.dry_run.describe", lambda recipe, rows: parsed.append(recipe) or ""
    )
    orders = [[recipe, *arguments]]
    if arguments[0] != "--" and all(a.startswith("-") or "=" not in a for a in arguments):
        orders.append([*arguments, recipe])
    for given in orders:
        assert main(["pretrain", *given]) == 0
    for result in parsed:
        tree = result.model_dump(mode="json")
        for key, value in settings.items():
            node = tree
            for part in key.split("."):
                node = node[int(part)] if isinstance(node, list) else node[part]
            assert node == value
    assert len(parsed) == len(orders)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--learning-rate=1e-3"],
            "'--learning-rate=1e-3': unknown key 'learning_rate'; did you "
            "mean 'optimizer.learning_rate'?",
        ),
        (["--lr", "3"], "'--lr=3': unknown key 'lr': write optimizer.learning_rate=3"),
        (["--bf16"], "'--bf16=true': unknown key 'bf16': write train.dtype=bfloat16"),
        (
            ["--per_device_train_batch_size", "4", "--gradient-accumulation-steps=8"],
            "write train.global_batch=32 and train.micro_batch=4",
        ),
        (["--train.stepz", "3"], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (["--optimizer.name=adam"], "found 'adam'; did you mean 'adamw'?"),
        (["--train.steps"], "'--train.steps': expected a value"),
        (["--train.compile"], "'--train.compile': expected a value"),
        (["--dry-rnu"], "unknown option --dry-rnu; did you mean '--dry-run'?"),
        (["--zzzz"], "unknown option --zzzz; see"),
        (
            ["train.steps", "=", "100"],
            "'train.steps = 100': expected key.path=value, write 'train.steps=100",
        ),
        (["train.steps", "=100"], "'train.steps =100': expected key.path=value, write 'train.ste"),
        (["train.steps=", "100"], "'train.steps= 100': expected key.path=value, write 'train.ste"),
        (["train.steps", "100"], "'train.steps 100': expected key.path=value, write 'train.steps"),
        (["train.steps = 100"], "'train.steps = 100': expected key.path=value, write 'train.steps"),
        (
            ["train.steps: 100"],
            "'train.steps: 100': expected key.path=value, write 'train.steps=100",
        ),
        (["train.steps"], "'train.steps': expected key.path=value, for example train.steps=VALUE"),
        (["=3"], "'=3': expected key.path=value, for example train.steps=100"),
        (["train.steps.x=3"], "unknown key 'train.steps.x': train.steps has no keys"),
        (["data.sources.path=3"], "data.sources is a list: write data.sources.0.path"),
        (["name=a #b"], "'name=a #b': in YAML a comment begins at ' #'"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(
    recipe: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", recipe, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") and says in line for line in lines), lines
    assert len(lines) == max(1, sum(a.startswith("--") for a in arguments))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["pretain"], "sevenfold: unknown command 'pretain'; did you mean 'pretrain'?"),
        (["ledger", "x", "whihc", "--step", "1"], "did you mean 'which'?; see sevenfold ledger"),
        (
            ["evaluate", "x", "--wrokers", "3"],
            "unknown option --wrokers; did you mean '--workers'?",
        ),
        (["base", "smolm2-135m", "f"], "did you mean 'smollm2-135m'?"),
        (["drill", "r.yaml", "--faults", "workre"], "did you mean 'worker'?"),
        (["plan", "--train.steps=3"], "sevenfold plan: expected RECIPE, a YAML file, before"),
        (["pretrain", "train.steps=3", "r.yaml"], "expected RECIPE, a YAML file, before its cha"),
        (["pretrain", "r.yaml", "r.yaml"], "'r.yaml': expected key.path=value, for example train"),
        (["explain", "optimzer"], "did you mean 'optimizer'?"),
    ],
)
def test_a_misspelt_name_is_told_with_the_nearest(
    recipe: str, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_options_of_commands_are_no_changes() -> None:
    """No option that a command has is taken for a recipe's key."""
    for name, command in COMMANDS.items():
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--"):
                    argv = [name, "r.yaml", option, "--x"]
                    assert with_recipe_options(argv, COMMANDS)[:3] == argv[:3]


@pytest.mark.parametrize(
    ("text", "value"),
    [("", ""), ("null", None), ("~", None), (" ", " "), ("\n", "\n"), ("###", "###"), ("''", "")],
)
def test_an_empty_value_is_an_empty_string(recipe: str, text: str, value: object) -> None:
    if value is not None:
        parsed = parse(recipe, [f"data.sources.0.separator={text}"])
        assert parsed.data.sources[0].separator == value
    assert parse(recipe, [f"model.config.x={text}"]).model.config["x"] == value  # type: ignore[index]
    with pytest.raises(
        InputError, match=r"train.steps: input should be a valid integer|train: give"
    ):
        parse(recipe, [f"train.steps={text}"])


def test_changes_apply_in_their_order(recipe: str) -> None:
    assert parse(recipe, ["train.steps=3", "train.steps=4"]).steps == 4
    tree = yaml.safe_load(RECIPE)
    assert parse(recipe, [f"train={tree['train'] | {'steps': 5}}", "train.steps=6"]).steps == 6
