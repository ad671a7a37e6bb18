"""Text that is not ours does not reach the terminal as anything but text."""

import csv
import io
import json
import logging
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import RECIPE
from helpers import tiny_models
from rich.console import Console

from sevenfold.cli import main
from sevenfold.engine.decode import Sampling
from sevenfold.inference import chat
from sevenfold.recipe import Sweep
from sevenfold.report import console, ranking
from sevenfold.run_folder import RunFolder

# A foreign text, and how it is printed where a message has one line.
HOSTILE = {
    "a\x1b[31mred\x1b[0m": r"a\x1b[31mred\x1b[0m",
    "title\x1b]0;x\x07": r"title\x1b]0;x\x07",
    "link\x1b]8;;http://x\x1b\\": "link\\x1b]8;;http://x\\x1b\\",
    "over\rwritten": r"over\rwritten",
    "back\b\b\bspace": r"back\x08\x08\x08space",
    "two\nlines": r"two\nlines",
    "a\ttab": r"a\ttab",
    "nul\0": r"nul\x00",
    "del\x7f": r"del\x7f",
    "c1\x9b2J\x85": r"c1\x9b2J\x85",
    "exe\u202egnp.txt": r"exe\u202egnp.txt",
    "mark\u200f\u061c\u2067": "mark\u200f\u061c" + r"\u2067",
    "line\u2028separator": r"line\u2028separator",
    "file\udcff": r"file\udcff",
    "[red]markup[/red]": "[red]markup[/red]",
    "[/]": "[/]",
    "[link=http://x]a": "[link=http://x]a",
    ":smile: {task}": ":smile: {task}",
}
ORDINARY = (
    "Grüße, naïve Ωμέγα, Привет, e\u0301 o\u0308",
    "中文 日本語 ゴジラ 한국어",
    "שָׁלוֹם עולם, مرحبا بالعالم, می\u200cخواهم",  # noqa: RUF001
    "नमस्ते क्\u200dष ไทย\u200bภาษา မြန်မာ አማርኛ",
    "👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f ❤\ufe0f 👍🏽 🇩🇪",
    "C:\\new\\x1b, a\u00a0b, soft\u00adhyphen, 1\u2009000 €",
)
OVERRIDES = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def _is_control(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
        or unicodedata.bidirectional(character) in OVERRIDES
    )


def test_only_control_characters_are_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        escaped = console.escape(character)
        assert (escaped != character) == _is_control(character), hex(code)
        assert escaped.isascii() or escaped == character
    for text in ORDINARY:
        assert console.escape(text) == console.escape(text, lines=True) == text
    assert console.escape("a\r\n\tb\x1b", lines=True) == "a\\r\n\tb\\x1b"


@pytest.mark.parametrize(
    ("text", "shown"), [*HOSTILE.items(), *zip(ORDINARY, ORDINARY, strict=True)]
)
def test_messages_and_tables(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"a {text} b")
    console.say(text, stderr=True)
    output = capsys.readouterr()
    assert output.out == f"a {shown} b\n" and output.err == f"{shown}\n"
    console.table(text, [text, "n"], [[text, 1]])
    output = capsys.readouterr()
    assert output.out.count(shown) == 3 and output.out.count("\n") == 6
    console.Progress(text, 3).log(1, {"train/loss": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        f"{shown}: starting workers",
        f"{shown}: step 1/3  loss 1.000",
    ]
    console.print_text(f"{text}\n\tb")
    lines = text if "\n" in text or "\t" in text else shown
    assert capsys.readouterr().out == f"{lines}\n\tb\n"


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_a_terminal_gets_only_our_own_escapes(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    terminal = Console(file=output, width=200, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(console, "console", terminal)
    monkeypatch.setattr(ranking, "console", terminal)
    progress = console.Progress(text, 3)
    progress.log(1, {"train/loss": 1.0})
    progress.close()
    sweep = Sweep.model_validate({"trials": 1, "space": {text: {"choice": [text]}}})
    live = ranking.Live(sweep)
    result = {"step": 1, "validation/loss": 1.0}
    live.show(
        [SimpleNamespace(trial_id=text, config={text: text}, last_result=result, status="RUNNING")]
    )
    live.close()
    console.table(text, [text], [[text]])
    console.print_styled([(text, "black on red"), ("plain", "")])
    printed = output.getvalue()
    assert "\x1b[30;41m" in printed  # the color that the program itself adds
    # a styled text may have several lines
    assert printed.count(shown) == 8 - ("\n" in text or "\t" in text)
    if shown != text:
        assert text not in printed
    if "\x1b" in text:
        assert "\x1b[31m" not in printed and "\x1b]" not in printed


@pytest.mark.parametrize("text", HOSTILE)
def test_json_keeps_its_values(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json(json.dumps({text: [text]}, ensure_ascii=False, indent=1))
    output = capsys.readouterr().out
    assert json.loads(output) == {text: [text]}
    assert not any(_is_control(character) for character in output.replace("\n", ""))


def test_logs_and_tracebacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logger, handler = logging.getLogger("foreign"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logging.setLogRecordFactory(logging.LogRecord)
    try:
        console.escape_logs_and_tracebacks()
        logger.warning("file %s", "a\x1b[31m\x9b")
        sys.excepthook(ValueError, ValueError("b\x1b[31m"), None)
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "file a\\x1b[31m\\x9b\nValueError: b\\x1b[31m\n"


def _unknown_command(text: str, folder: Path) -> list[str]:
    return [text]


def _missing_recipe(text: str, folder: Path) -> list[str]:
    return ["plan", f"{text}.yaml"]


def _bad_option(text: str, folder: Path) -> list[str]:
    return ["corpus", text]


def _bad_override(text: str, folder: Path) -> list[str]:
    data = RECIPE["data"] | {"sources": [{"path": "texts"}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"data": data}))
    return ["plan", "recipe.yaml", text]


def _bad_model_type(text: str, folder: Path) -> list[str]:
    tiny_models.save(folder / "model", "llama")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | {"model_type": text}))
    return ["generate", "model", "--prompt", "a"]


def _bad_folder(text: str, folder: Path) -> list[str]:
    (folder / text).mkdir()
    return ["inspect", "--data", text]


def _bad_columns(text: str, folder: Path) -> list[str]:
    (folder / "a.jsonl").write_text(json.dumps({text: 1}) + "\n")
    return ["inspect", "--data", "a.jsonl", "--text-column", "body"]


@pytest.mark.parametrize("text", ["a\x1b[31m\x9b", "two\nlines\u202e", "[red]a"])
@pytest.mark.parametrize(
    "command",
    [
        _unknown_command,
        _missing_recipe,
        _bad_option,
        _bad_override,
        _bad_model_type,
        _bad_folder,
        _bad_columns,
    ],
)
def test_errors_are_one_line(
    command: Callable[[str, Path], list[str]],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(text, tmp_path)
    capsys.readouterr()
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1, output.err
    assert not any(_is_control(character) for character in output.err[:-1] + output.out)
    assert text.partition("\x1b")[0].partition("\n")[0] in output.err


def test_reports_on_data_and_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "d\x1b[2J\u202e[red]"
    (tmp_path / name).mkdir()
    rows = [{"text": f"mail a@example.com {name}"}] * 2 + [{"x": name}]
    (tmp_path / name / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--data", name]) == 0
    trial = {
        "trial": "t0",
        "config": {"seed": name},
        "step": 1,
        "score": 1.0,
        "metrics": {f"validation/{name}": 1.0},
        "status": "failed",
        "error": name,
    }
    folder = RunFolder(str(tmp_path / name))
    ranking.write(folder, [trial])
    ranking.show(folder)
    output = capsys.readouterr().out
    assert r"d\x1b[2J\u202e[red]" in output
    assert not any(_is_control(character) for character in output.replace("\n", ""))


def test_generated_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.save(tmp_path / "model", "llama", tiny_models.TEMPLATE)
    capsys.readouterr()
    sampling = Sampling(max_new_tokens=120, temperature=50.0, top_k=0)
    text = chat.generate(folder, "the quick", sampling)
    assert any(_is_control(c) and c not in "\n\t" for c in text)
    assert capsys.readouterr().out == console.escape(text, lines=True) + "\n"
    messages = chat.chat(folder, "a\x1bb", ["say\x1b[31m\nit"], sampling)
    answer = console.escape(messages[-1]["content"], lines=True)
    assert capsys.readouterr().out == f"> say\\x1b[31m\nit\n{answer}\n\n"


def _write(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    trial = {
        "trial": "t0",
        "config": {},
        "step": 1,
        "score": 1.0,
        "metrics": {},
        "status": "finished",
        "error": None,
    }
    trials = [trial | changes]
    ranking.write(RunFolder(str(folder)), trials)
    return trials


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("=cmd|'/c calc'!A1", "'=cmd|'/c calc'!A1"),
        ("+a", "'+a"),
        ("-a", "'-a"),
        ("-1+1", "'-1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-5", "-5"),
        ("+1.5e-3", "+1.5e-3"),
        (-0.25, "-0.25"),
        (-3, "-3"),
        ("plain = text", "plain = text"),
        (None, ""),
    ],
)
def test_no_cell_of_the_trials_is_a_formula(tmp_path: Path, value: Any, cell: str) -> None:
    key = value if isinstance(value, str) and value != "plain = text" else "seed"
    trials = _write(tmp_path, config={key: value}, error=value and str(value))
    with open(tmp_path / "trials.csv", newline="") as f:
        header, row = csv.reader(f)
    assert row[2] == row[-1] == cell
    assert header[2] == (cell if key == value else "seed")
    assert ranking.read_trials(RunFolder(str(tmp_path))) == trials
