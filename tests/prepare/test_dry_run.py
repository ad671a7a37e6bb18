"""A dry run does what a start does before its workers, and shows rows as the model sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused

from sevenfold.cli import main


@pytest.fixture
def recipe(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_dry_run_reads_the_data_and_leaves_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    steps = ["train.steps=null", "data.epochs=2"]
    assert main(["pretrain", str(recipe), *steps, "--preview", "2"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["name"] == "tiny"  # what follows the recipe are comments
    assert "row 2: " in shown and "row 3: " not in shown and "    learns " in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("# steps: ")]
    assert int(line.split()[2].strip(",").replace(",", "")) > 100
    assert sorted(tmp_path.rglob("*")) == before


def test_the_preview_shows_what_is_learned(
    tree: dict[str, Any], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"number {i} is odd or even", "label": "ab"[i % 2]} for i in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.path={data}", "tokenizer.vocab_size=300", "data.sequence_length=32"]
    assert main(["finetune", "classify", *changes, "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    documents = [line.split(None, 2)[2] for line in shown.splitlines() if "#     reads" in line]
    labels = [line.split(None, 2)[2] for line in shown.splitlines() if "#     learns" in line]
    assert documents and len(documents) == len(labels)
    for document, label in zip(documents, labels, strict=True):
        number = int("".join(c for c in document if c.isdigit()))
        assert label == repr("ab"[number % 2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # only a run found these before
        (
            ["data.held_out=0.5", "data.validation=[]", "data.sources=[{path: one.jsonl}]"],
            "held_out",
        ),
        (["model.config.hidden_size=65536", "model.config.num_hidden_layers=48"], "GB for weights"),
    ],
)
def test_what_would_fail_at_the_start_fails_in_a_dry_run(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"text": "one document"}\n')
    assert says in refused(capsys, "pretrain", str(recipe), *changes, "--dry-run")
