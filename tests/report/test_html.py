"""The page of a sweep is written whatever the names and values of its settings are."""

import json
from pathlib import Path
from typing import Any

import pytest

from sevenfold.recipe import Sweep
from sevenfold.report import html
from sevenfold.run_folder import RunFolder


def _page(folder: Path, choices: dict[str, list[Any]], metric: str = "validation/loss") -> str:
    """Returns the page of a sweep of four trials; each setting has two choices."""
    trials = []
    for i in range(4):
        name = f"t{i}"
        (folder / "trials" / name).mkdir(parents=True)
        reports = [{"step": step, metric: i + 1 / step} for step in (1, 2)]
        (folder / "trials" / name / "reports.json").write_text(json.dumps(reports))
        trials.append(
            {
                "trial": name,
                "config": {key: values[i % 2] for key, values in choices.items()},
                "step": 2,
                "score": i + 0.5,
                "metrics": {},
                "error": None,
                "status": "finished",
            }
        )
    (folder / "trials.json").write_text(json.dumps(trials))
    space = {key: {"choice": values} for key, values in choices.items()}
    html.write(
        RunFolder(str(folder)),
        Sweep.model_validate({"trials": len(trials), "space": space, "metric": metric}),
    )
    return (folder / "report.html").read_text(encoding="utf-8")


def test_names_and_choices_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {
        "$a$": "$a$",
        r"$\frac{$": r"$\frac{$",
        "cost $5, not $6_^": "cost $5, not $6_^",
        r"\$x\$ $$": r"\$x\$ $$",
        "{a}_b^c%d#&": "{a}_b^c%d#&amp;",
        "<script>$</script>$": "&lt;script&gt;$&lt;/script&gt;$",
        "_hidden": "_hidden",
        "a\x1b[31m\nb\u202e": r"a\x1b[31m\nb\u202e",
        "\ud800": r"\ud800",
        "中文 🙂": "中文 🙂",
    }
    choices = {f"data.$k{i}_^$": [text, "other"] for i, text in enumerate(shown)}
    page = _page(tmp_path, choices, metric="validation/$x^{$")
    assert page.count("<svg") == 3 and "left out" not in page
    assert page.count(">$k0_^$</text>") == 1 and ">data.$k0_^$</text>" in page
    assert ">validation/$x^{$</text>" in page
    for text in shown.values():
        assert f"<td>{text}</td>" in page, text
        assert f">{text}</text>" in page, text  # beside its axis, not as a formula
    assert capsys.readouterr().out == ""


def test_a_picture_that_fails_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = _page(tmp_path, {"seed": [10**400, 1]})  # above the largest float
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"report.html: the picture of the {name} is left out: int too large to convert to float"
        for name in ("hyperparameters", "importance")
    ]
    assert page.count("<svg") == 1 and page.count("left out: int too large") == 2
    assert "<td>t3</td>" in page
