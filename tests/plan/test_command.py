"""The command `sevenfold plan`, as a person runs it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from helpers.plans import LLAMA, VOCABULARY

from sevenfold.cli import main
from sevenfold.errors import InputError
from sevenfold.plan.write import with_settings, write_settings
from sevenfold.recipe import parse

RECIPE = """# what it is for
name: planned
data:
  sources:
    - path: s3://bucket/text # not there
  sequence_length: 64
tokenizer:
  path: none
model:
  config: CONFIG

# how it is trained
train:
  steps: 1000
  global_batch: 2
  micro_batch: 1  # rows
  dtype: bfloat16
  compile: true
  # the last of its section
cluster: {num_workers: 2, max_failures: 5}  # all of it
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.replace("CONFIG", yaml.safe_dump(LLAMA, default_flow_style=True, width=1000).strip())
    )
    return path


def plan(*words: str) -> int:
    try:
        return main(["plan", *words])
    except SystemExit as e:
        return int(e.code or 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected RECIPE, or --budget USD alone"),
        (["none.yaml", "--gpu", "l4"], "none.yaml: expected a recipe"),
        (["recipe.yaml"], "expected --cluster FILE, or --gpus N --gpu NAME (one of a100-40gb"),
        (["recipe.yaml", "--gpu", "h1000"], "GPU h1000: expected one of a100-40gb"),
        (["recipe.yaml", "--gpu", "l4", "--gpus", "0"], "expected a number above 0, found 0"),
        (["recipe.yaml", "--gpu", "l4", "--cluster", "c.yaml"], "not both"),
        (["recipe.yaml", "--cluster", "c.yaml"], "c.yaml: expected a cluster.yaml, found no file"),
        (
            ["recipe.yaml", "--gpu", "l4", "--hardware", "h.yaml"],
            "h.yaml: expected a hardware table",
        ),
        (
            ["recipe.yaml", "--gpu", "l4", "train.global_bacth=8"],
            "did you mean 'train.global_batch'",
        ),
        (["recipe.yaml", "--gpu", "l4", "model.config.model_type=lama"], "lama"),
        (["recipe.yaml", "--gpu", "t4"], "train.dtype bfloat16: t4 has no fast matmuls"),
        (["--budget", "0", "--gpu", "l4"], "--budget: expected an amount above 0, found 0"),
        (["--budget", "5", "--gpu", "h100-pcie"], "no price is known"),
        (["--budget", "5"], "expected --cluster FILE"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    before = recipe.read_text()
    assert plan(*words) == 2
    message = capsys.readouterr().err
    assert says in message and message.startswith("error: ") and message.count("\n") == 1, message
    assert recipe.read_text() == before


def test_a_cluster_without_gpus_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for name in ("train", "train_spot"):
        del config["available_node_types"][name]
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert plan("recipe.yaml", "--cluster", "c.yaml") == 2
    assert "c.yaml: expected a pool of workers with GPUs" in capsys.readouterr().err


def test_a_plan_is_shown_and_written(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = recipe.read_text()
    assert plan("recipe.yaml", "--gpus", "1", "--gpu", "l4", "--write") == 0
    output = " ".join(capsys.readouterr().out.split())
    for text in (
        "planned: ",
        "assumed: ",
        "chosen: ",
        "tokens/s per GPU",
        "checkpoint: ",
        "data: ",
        "price: g6.xlarge",
    ):
        assert text in output, output
    after = recipe.read_text()
    written = parse(str(recipe))
    (layout,) = re.findall(
        r"chosen: (?:FSDP|HSDP)[^,]*, micro-batch (\d+), (\w+) checkpointing",
        output.replace(" no check", " none check"),
    )
    assert (str(written.train.micro_batch), written.train.activation_checkpointing) == layout
    assert (
        written.workers == (1, 1)
        and written.cluster.gpus_per_worker == 1
        and written.cluster.max_failures == 5
    )
    for comment in re.findall(r"#.*", before):
        assert comment in after
    capsys.readouterr()
    assert plan("recipe.yaml", "--gpus", "1", "--gpu", "l4", "--write") == 0
    assert recipe.read_text() == after  # the file already has the settings that it would choose


def test_a_recipe_that_fits_no_gpu_is_refused_with_the_closest_layout(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = recipe.read_text()
    Path("h.yaml").write_text("gpus: {l4: {memory_gib: 0.001}}")
    assert plan("recipe.yaml", "--gpus", "1", "--gpu", "l4", "--hardware", "h.yaml", "--write") == 2
    message = capsys.readouterr().err
    assert re.search(
        r"planned does not fit on 1 l4 of 0.0 GiB: .* needs [\d.]+ GiB per GPU; it would fit on 1 ",
        message,
    )
    assert recipe.read_text() == before


def with_changes(text: str, **changes: Any) -> str:
    """The text with these settings, whose dots are written as double underscores."""
    return with_settings(text, {key.replace("__", "."): value for key, value in changes.items()})


def test_comments_and_order_are_kept() -> None:
    text = with_changes(
        RECIPE,
        train__micro_batch=4,
        train__activation_checkpointing="full",
        cluster__num_workers=8,
        parallel__tensor=2,
    )
    assert text.splitlines()[-5:] == [
        "  activation_checkpointing: full",
        "  # the last of its section",
        "cluster: {num_workers: 8, max_failures: 5}  # all of it",
        "parallel:",
        "  tensor: 2",
    ]
    assert "  micro_batch: 4  # rows\n" in text and "\n\n# how it is trained\ntrain:\n" in text
    unchanged = [
        line for line in RECIPE.splitlines() if not line.startswith(("  micro_batch", "cluster"))
    ]
    assert [line for line in text.splitlines() if line in unchanged] == unchanged


def test_a_new_key_is_added_before_the_comment_of_the_next_section() -> None:
    text = "a:\n  b: 1\n\n# of c\nc:\n  d:\n    - 1\n    - 2\n  e: 3\n"
    assert (
        with_changes(text, a__x=2)
        == "a:\n  b: 1\n  x: 2\n\n# of c\nc:\n  d:\n    - 1\n    - 2\n  e: 3\n"
    )
    assert with_changes(text, c__d=[4]) == "a:\n  b: 1\n\n# of c\nc:\n  d:\n    - 4\n  e: 3\n"


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "jobs/recipes").glob("*.yaml")))
def test_settings_can_be_written_to_the_provided_recipes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = (ROOT / "jobs/recipes" / name).read_text()
    path.write_text(text.replace("data:\n", "data:\n  path: somewhere\n", 1))
    try:
        before = parse(str(path))
    except InputError:
        path.write_text(text)
        before = parse(str(path))
    changes = {
        "train.micro_batch": 3,
        "cluster.num_workers": 1,
        "train.activation_checkpointing": "full",
        "parallel.tensor": 1,
    }
    write_settings(str(path), changes)
    assert parse(str(path)) == before.override(changes)


def test_invalid_settings_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        RECIPE.replace("CONFIG", str(LLAMA | {"vocab_size": VOCABULARY}).replace("False", "false"))
    )
    before = path.read_text()
    with pytest.raises(InputError, match=r"nothing was written"):
        write_settings(str(path), {"cluster.num_workers": 1000})
    assert path.read_text() == before
    # a section in braces that spans several lines
    path.write_text(before.replace("{num_workers: 2, ", "{num_workers: 2,\n  "))
    write_settings(str(path), {"cluster.num_workers": 1})
    assert parse(str(path)).workers == (1, 1) and "# all of it" in path.read_text()
