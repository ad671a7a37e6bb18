"""The survey of data: personal data, scripts, duplicates and bad rows."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sevenfold.cli import main
from sevenfold.data.sources.records import records
from sevenfold.inspect import personal_data
from sevenfold.inspect.data import run
from sevenfold.inspect.survey import letters
from sevenfold.recipe import Source

LONG = " ".join(f"word{i}" for i in range(200))
MAIL, CARD, IBAN = "jane.doe@example.org", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00"


@pytest.mark.parametrize(
    ("number", "passes"),
    [
        ("4111111111111111", True),
        ("4111 1111 1111 1111", True),
        ("378282246310005", True),
        ("5555-5555-5555-4444", True),
        ("4222222222222", True),
        ("4111111111111112", False),
        ("79927398713", False),
        ("41111111111111111111", False),
    ],
)
def test_the_luhn_check(number: str, passes: bool) -> None:
    assert personal_data.luhn(number) == passes


@pytest.mark.parametrize(
    ("number", "passes"),
    [
        ("GB82 WEST 1234 5698 7654 32", True),
        ("DE89370400440532013000", True),
        ("FR1420041010050500013M02606", True),
        ("NO9386011117947", True),
        ("GB82 WEST 1234 5698 7654 33", False),
        ("DE8937040044", False),
        ("de89370400440532013000", False),
    ],
)
def test_the_iban_check(number: str, passes: bool) -> None:
    assert personal_data.iban(number) == passes


@pytest.mark.parametrize(
    ("text", "finds"),
    [
        (f"write to {MAIL}.", [("e-mail", MAIL)]),
        ("a@b, @decorator, x@y.z", []),
        (
            f"card {CARD}, or 4111111111111111!",
            [("credit card", CARD), ("credit card", "4111111111111111")],
        ),
        (
            "4111111111111112 and 1234567890123456789012345 "
            "and 0.4111111111111111 and 0000000000000000",
            [],
        ),
        (f"pay {IBAN} AND MORE NOW", [("IBAN", IBAN)]),
        ("GB82WEST12345698765433 UPPER CASE AB12 CDEF GHIJ KLMN", []),
        ("from 192.168.0.17. Or 10.0.0.1:80", [("IPv4", "192.168.0.17"), ("IPv4", "10.0.0.1")]),
        ("version 1.2.3.4.5, 256.1.1.1, v1.2.3.4x", []),
        (
            "call +49 (30) 1234-5678 or +14155550123",
            [("phone", "+49 (30) 1234-5678"), ("phone", "+14155550123")],
        ),
        ("1+1234, +12 a, 030 123456", []),
    ],
)
def test_personal_data_is_found(text: str, finds: list[tuple[str, str]]) -> None:
    assert list(personal_data.found(text)) == finds


def test_no_text_takes_long_to_search() -> None:
    for text in (
        "a" * 300_000,
        "a." * 150_000,
        "+1 " * 100_000,
        "1234 " * 60_000,
        "AB12 " * 60_000,
        "x@" + "a." * 100_000,
    ):
        list(personal_data.found(text))


def test_letters_are_counted_by_script() -> None:
    text = "abé 中文字 Привет עברית ελ हिन्दी ไทย 한국어 ひらカナ عربي ԱԲ 123 🙂!"
    assert letters(text) == {
        "Latin": 3,
        "Han": 3,
        "Cyrillic": 6,
        "Arabic": 4,
        "Hangul": 3,
        "Kana": 4,
        "Devanagari": 3,
        "Greek": 2,
        "Hebrew": 5,
        "Thai": 3,
        "other": 2,
    }
    assert letters("12 \n") == {}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files with copies that differ in case and space, a near copy, bad rows, and secrets."""
    folder = tmp_path / "data"
    folder.mkdir()
    near_copy = LONG.replace("word100 ", "changed ")
    pq.write_table(
        pa.table({"text": [LONG, "Once  upon a time", f"mail {MAIL} or {MAIL}"], "n": [1, 2, 3]}),
        folder / "a.parquet",
    )
    rows = [
        "once upon A TIME",
        near_copy,
        "once upon a time\n",
        f"card {CARD}",
        f"{IBAN} is mine",
        "Привет мир",
    ]
    lines = [json.dumps({"text": row}) for row in rows] + [
        "not json",
        "",
        json.dumps({"text": None}),
        "[1]",
    ]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def test_a_survey_of_two_files(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert main(["inspect", "--data", str(data), "--json", str(path)]) == 0
    output, result = capsys.readouterr().out, json.loads(path.read_text())
    assert (result["files"], result["rows"], result["texts"]) == (2, 12, 9)
    assert result["exact_duplicates"] == {
        "texts": 2,
        "most": [{"copies": 3, "place": f"{data}/a.parquet: row 2"}],
    }
    (near_duplicate,) = result["near_duplicates"]["first"]
    assert (near_duplicate["place"], near_duplicate["like"]) == (
        f"{data}/b.jsonl.gz: row 2",
        f"{data}/a.parquet: row 1",
    ) and near_duplicate["jaccard"] > 0.8
    assert result["near_duplicates"]["looked_at"] == 7
    bad = result["bad_rows"]
    assert (
        bad["rows"] == 3
        and "row 7: expected a JSON object" in bad["first"][0]
        and "row 10: expected" in bad["first"][2]
    )
    assert result["personal"]["e-mail"]["found"] == 2 and result["personal"]["e-mail"]["texts"] == 1
    assert [
        result["personal"][kind]["found"] for kind in ("credit card", "IBAN", "IPv4", "phone")
    ] == [1, 1, 0, 0]
    assert (
        result["scripts"][0]["script"] == "Latin"
        and {script["script"]: script["texts"] for script in result["scripts"]}["Cyrillic"] == 1
    )
    assert (
        sum(row["texts"] for row in result["lengths"]) == 9
        and result["lengths"][-1]["from"] == 1024
    )
    assert result["longest"] == {"characters": len(LONG), "place": f"{data}/a.parquet: row 1"}
    assert result["shortest"]["characters"] == 10
    for secret in (MAIL, CARD, IBAN):
        assert secret not in output and secret not in path.read_text()
    assert f"e-mail: {data}/a.parquet: row 3: j******************g" in output and "█" in output


def test_nested_rows_are_one_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    pq.write_table(
        pa.Table.from_pylist([{"messages": messages, "n": 1}, {"messages": messages[:1], "n": 2}]),
        tmp_path / "m.parquet",
    )
    words = [sorted(record.text().split()) for record in records(Source(path=str(tmp_path)))]
    assert words == [["assistant", "one", "two", "user"], ["one", "user"]]
    assert run(str(tmp_path), "messages")["texts"] == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data", "none"], "expected a file or folder, found none"),
        (["--data", "data", "--text-column", "body"], "expected rows with text, found none: "),
        (["--data", "data", "--near", "-1"], "--near: expected 0 or more"),
        (["--data", "data", "--text", "x"], "not allowed with"),
        (["--data", "fake.parquet"], "expected parquet (by its name)"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(data.parent)
    monkeypatch.delenv("SEVENFOLD_HOME", raising=False)
    Path("fake.parquet").write_text("no parquet at all")
    try:
        code = main(["inspect", *argv])
    except SystemExit as error:
        code = int(error.code or 0)
    message = capsys.readouterr().err
    assert code == 2 and says in message and message.count("\n") == 1, message
