"""Output in the terminal: progress lines and tables."""

import io

import pytest
from rich.console import Console

from sevenfold.report import console


def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Console(record=True, width=200, force_terminal=False)
    monkeypatch.setattr(console, "console", recorder)
    progress = console.Progress("run", 20)
    for step in (1, 10):
        progress.log(
            step,
            {
                "train/loss": 2.5,
                "train/tokens_per_second": 12345.0,
                "train/mfu": 0.4,
                "train/data_wait": 0.01,
            },
        )
    progress.log(10, {"validation/loss": 2.25})
    progress.close()
    lines = recorder.export_text().splitlines()
    assert lines[0] == "run: starting workers"
    assert lines[2].startswith(
        "run: step 10/20  loss 2.500  tok/s 12,345  MFU 40.0%  data wait 1.0%  ETA "
    )
    assert "validation loss 2.250" in lines[3] and len(lines) == 4


def test_one_live_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=output, width=120, force_terminal=True))
    progress = console.Progress("run", 20)
    for step in range(1, 6):
        progress.log(step, {"train/loss": float(step)})
    progress.close()
    assert "step 5/20  loss 5.000" in output.getvalue()
    # The line is redrawn in place; there is no new line per step.
    assert output.getvalue().count("\n") < 3


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Console(record=True, width=120)
    monkeypatch.setattr(console, "console", recorder)
    console.table("t", ["name", "value"], [["a", 0.123456], ["b", None], ["[x]", "text"]])
    text = recorder.export_text()
    assert "0.1235" in text and "[x]" in text and "text" in text
