"""`sevenfold init`: which task rows are for, and a recipe that passes its checks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused
from helpers import tiny_models

from sevenfold.cli import main
from sevenfold.cluster.auto import fill
from sevenfold.init.command import is_data
from sevenfold.init.settings import run_name
from sevenfold.init.tasks import TASKS, Match, matches
from sevenfold.init.text import _flow
from sevenfold.recipe import parse

R = random.Random(5)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def words(count: int) -> str:
    return " ".join(R.choice(WORDS) for _ in range(count)) + "."


def talk(*keys: str) -> list[dict[str, str]]:
    role, content, user, assistant = keys
    return [{role: user, content: words(9)}, {role: assistant, content: words(9)}]


# What people bring -> the task, and the columns that a recipe has to name.
KINDS: dict[str, tuple[Any, str, dict[str, str]]] = {
    "openai": (lambda: {"messages": talk("role", "content", "user", "assistant")}, "chat", {}),
    "sharegpt": (lambda: {"conversations": talk("from", "value", "human", "gpt")}, "chat", {}),
    "alpaca": (lambda: {"instruction": words(6), "input": "", "output": words(9)}, "chat", {}),
    "completion": (lambda: {"prompt": words(6), "completion": words(9)}, "chat", {}),
    "answers": (
        lambda: {"question": words(6), "answer": words(9)},
        "chat",
        {"prompt": "question", "completion": "answer"},
    ),
    "labels": (lambda: {"text": words(20), "label": R.choice("ab")}, "classify", {}),
    "stars": (
        lambda: {"Review": words(20), "Stars": R.choice([1, 2, 5])},
        "classify",
        {"text": "Review", "label": "Stars"},
    ),
    "unusual names": (
        lambda: {"verbatim": words(20), "dept": R.choice(["hr", "it"])},
        "classify",
        {"text": "verbatim", "label": "dept"},
    ),
    "news": (lambda: {"article": words(60), "highlights": words(6)}, "summarize", {}),
    "papers": (
        lambda: {"article": words(60), "abstract": words(6)},
        "summarize",
        {"source": "article", "target": "abstract"},
    ),
    "languages": (
        lambda: {"en": words(8), "de": words(8)},
        "translate",
        {"source": "en", "target": "de"},
    ),
    "pairs": (lambda: {"src": words(8), "tgt": words(8)}, "translate", {}),
    "queries": (lambda: {"query": words(5), "document": words(60)}, "retrieve", {}),
    "passages": (
        lambda: {"question": words(5), "passage": words(60)},
        "retrieve",
        {"query": "question", "document": "passage"},
    ),
    "preferences": (
        lambda: {"prompt": words(5), "chosen": words(7), "rejected": words(8)},
        "prefer",
        {},
    ),
    "text": (lambda: {"text": words(50)}, "pretrain", {}),
}


def write(path: Path, row: Any, count: int = 60) -> Path:
    path.write_text("".join(json.dumps(row()) + "\n" for _ in range(count)))
    return path


def found(path: Path) -> Match:
    from sevenfold.init.rows import look

    return matches(look(str(path)))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_of_rows(tmp_path: Path, kind: str) -> None:
    row, task, columns = KINDS[kind]
    match = found(write(tmp_path / "rows.jsonl", row))
    assert match.task.name == task
    if match.is_usual:
        assert not columns
    else:
        assert match.columns == columns


# One kind of each objective; the others differ from these in the names of their columns.
FEW = ("openai", "stars", "papers", "queries", "text")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in FEW else pytest.mark.nightly)
        for kind, (_, task, _) in KINDS.items()
        if task != "prefer"
    ],
)
def test_the_recipe_passes_a_dry_run(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, task, columns = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my rows.jsonl", row)
    assert main(["init", "my rows.jsonl", "--yes"]) == 0
    shown = capsys.readouterr().out
    recipe = parse("my-rows.yaml", (), fill)
    assert f"task: {task}" in shown and "60 rows" in shown
    assert recipe.objective == TASKS[task].objective and recipe.data.held_out > 0
    assert recipe.data.sources[0].columns == columns
    lines = Path("my-rows.yaml").read_text().splitlines()
    assert 15 <= len(lines) <= 25 and any(line.startswith("#") for line in lines)
    job = "pretrain" if task == "pretrain" else "finetune"
    assert main([job, "my-rows.yaml", "--dry-run"]) == 0
    # the same without the file in between
    assert main([job, "my rows.jsonl", "--dry-run", "name=my-rows"]) == 0
    described = [
        out for out in capsys.readouterr().out.split("name: my-rows\n") if "# steps" in out
    ]
    assert len(described) == 2 and described[0].split("# ")[0] in described[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.jsonl"], "missing.jsonl"),
        (["rows.jsonl", "--task", "sing"], "expected one of chat"),
        (["rows.jsonl", "--task", "translate"], "needs columns for source and target"),
        (["tiny.jsonl"], "at least 2,000 characters"),
        (["few.jsonl"], "at least 10 rows"),
        (["numbers.jsonl"], "found no task for the columns a, b"),
        (["preferences.jsonl"], "--model"),
        (["rows.jsonl", "--model", "nothing"], "expected a run, a Hugging Face directory"),
    ],
)
def test_what_init_refuses(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", KINDS["labels"][0])
    write(tmp_path / "tiny.jsonl", lambda: {"text": "a b"}, 20)
    write(tmp_path / "few.jsonl", KINDS["labels"][0], 3)
    write(tmp_path / "numbers.jsonl", lambda: {"a": R.random(), "b": R.random()}, 90)
    write(tmp_path / "preferences.jsonl", KINDS["preferences"][0])
    before = sorted(tmp_path.iterdir())
    assert says in refused(capsys, "init", *arguments, "--yes")
    assert sorted(tmp_path.iterdir()) == before


def test_a_recipe_of_ones_own_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", KINDS["labels"][0])
    assert main(["init", "rows.jsonl", "--yes"]) == 0
    assert main(["init", "rows.jsonl", "--yes"]) == 0  # the same recipe
    Path("rows.yaml").write_text("mine")
    assert "exists already" in refused(capsys, "init", "rows.jsonl", "--yes")
    assert Path("rows.yaml").read_text() == "mine"
    assert "--task" in refused(capsys, "finetune", "classify", "data.path=x", "--task", "chat")


def test_values_of_a_recipe_survive_yaml() -> None:
    values = [
        "",
        "a b",
        "no",
        "1",
        "1.5",
        "é",
        "a: b",
        "{x}",
        "#",
        "-",
        "~",
        "null",
        "'",
        '"',
        "\\",
    ]
    values += [
        "a,b",
        "[",
        "2024-01-01",
        "/a/b.c",
        "x\ny",
        "\u2028",
        "😀",
        "*a",
        "&a",
        "!",
        "%",
        "@",
    ]
    tree = {"list": values, "map": dict.fromkeys(values, 1), "n": [1, 2.5e-05, True, None]}
    assert yaml.safe_load(_flow(tree)) == tree


def test_names_of_runs() -> None:
    assert run_name("data/My rows (2).jsonl.gz") == "My-rows-2"
    assert run_name("/a/folder/") == "folder"
    assert run_name("s3://bucket/x/*.parquet") == "x"
    assert run_name("...") == "run"


def test_what_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", KINDS["labels"][0], 1)
    assert is_data("rows.jsonl") and is_data(".") and is_data("s3://bucket/rows.jsonl")
    assert not is_data("r.yaml") and not is_data("chat") and not is_data("missing.jsonl")


def test_copies_in_a_folder_of_texts_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        text = "\n".join(words(20) for _ in range(5))
        (tmp_path / f"texts/{i}.txt").write_text("same\n" * 200 if i % 10 == 0 else text)
    assert main(["pretrain", "texts", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "40 rows" in shown and "on_bad_document: skip" in shown
    assert "3 files" in shown


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("kind", ["completion", "answers", "papers"])
def test_a_chat_model_is_asked_in_its_template(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row, _, _ = KINDS[kind]
    write(tmp_path / "rows.jsonl", row)
    tiny_models.save(tmp_path / "model", "llama", TEMPLATE)
    assert main(["init", "rows.jsonl", "--model", "model", "--yes"]) == 0
    assert main(["finetune", "rows.yaml", "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    assert "[user]" in shown and "[assistant]" in shown
