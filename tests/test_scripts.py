"""Text in every script: what is measured, found, trained on and shown."""
# ruff: noqa: RUF001

import random
import time
from pathlib import Path
from typing import Any

import pytest
import regex
from helpers import tiny_models

from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.text import UNSPACED
from sevenfold.data.tokenizer import sample, train_tokenizer
from sevenfold.evaluate.baselines import Dictionary
from sevenfold.evaluate.held_out_text import beginning
from sevenfold.inspect import personal_data
from sevenfold.inspect.survey import NearDuplicates, normalised
from sevenfold.recipe import Source

# Characters or words of which texts are made.
SCRIPTS = {
    "English": [
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "that",
        "it",
        "was",
        "for",
        "on",
        "are",
        "as",
        "with",
        "his",
        "they",
        "at",
        "be",
        "this",
    ],
    "Chinese": list("的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会"),
    "Japanese": list("のにはをたがでてとしれさあるいもする時間日本人大年中学生国会東京車山川"),
    "Korean": [
        "오늘",
        "날씨가",
        "아주",
        "좋다",
        "나는",
        "학교에",
        "간다",
        "그는",
        "책을",
        "읽고",
        "우리는",
        "집에",
        "있다",
    ],
    "Thai": list("กขคงจฉชซญดตถทนบปผพฟมยรลวสหอ"),
}
# Before and after: words of other scripts that touch what is between them.
NEIGHBOURS = ["邮箱{}谢谢", "連絡先は{}です", "이메일은{}입니다", "ที่อยู่{}ครับ", "（{}）", " {} "]


def text_of(script: str, length: int, rng: random.Random) -> list[str]:
    return rng.choices(SCRIPTS[script], k=length)


@pytest.mark.parametrize("script", SCRIPTS)
def test_planted_near_duplicates_are_found(script: str) -> None:
    """Of 300 texts with one change in a hundred parts, nearly all; of others none."""
    rng = random.Random(script)
    between = " " if script in ("English", "Korean") else ""
    near = NearDuplicates(1000)
    for i in range(300):
        parts = text_of(script, 200, rng)
        changed = list(parts)
        changed[rng.randrange(200)] = "7"
        near.add(normalised(between.join(parts)), f"original {i}")
        near.add(normalised(between.join(changed)), f"copy {i}")
    found = {copy for copy, original, _ in near.places if copy.split()[1] == original.split()[1]}
    assert len(found) >= 297 and len(near.places) == len(found)


@pytest.mark.parametrize("around", NEIGHBOURS)
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("e-mail", "anna.li@example.com.cn"),
        ("IPv4", "192.168.0.17"),
        ("phone", "+8613912345678"),
        ("phone", "13912345678"),
        ("phone", "139-1234-5678"),
        ("credit card", "4111 1111 1111 1111"),
        ("Chinese ID", "11010519491231002X"),  # the example of GB 11643-1999
        ("IBAN", "GB82 WEST 1234 5698 7654 32"),
    ],
)
def test_personal_data_is_found_beside_letters(kind: str, value: str, around: str) -> None:
    assert (kind, value) in list(personal_data.found(around.format(value)))


@pytest.mark.parametrize(
    "text",
    [
        "110105194912310021",  # a wrong check digit
        "order 213912345678 and 1391234567 and 139123456789",
        "version 1.139.1234.5678",
        "naïvé@",
    ],
)
def test_other_numbers_are_no_personal_data(text: str) -> None:
    assert list(personal_data.found(text)) == []


def test_an_unspaced_line_of_any_length_trains_a_tokenizer(tmp_path: Path) -> None:
    """In the time of the same text in lines; nothing of it is lost."""
    rng = random.Random(0)
    characters = rng.choices(SCRIPTS["Chinese"], k=400_000)
    seconds = {}
    for name, between in (("lines", "\n"), ("line", "")):
        lines = ["".join(characters[i : i + 20]) for i in range(0, len(characters), 20)]
        (tmp_path / f"{name}.txt").write_text(between.join(lines), encoding="utf-8")
        manifest = scan([Source(path=str(tmp_path / f"{name}.txt"))], "causal")
        start = time.process_time()
        trained = train_tokenizer(manifest, Selection(), 1000, 4, 0)
        seconds[name] = time.process_time() - start
        text = "".join(characters[:1000])
        assert trained.decode(trained.encode(text, add_special_tokens=False)) == text
        assert len(trained) == 1000
    assert seconds["line"] < 10 * seconds["lines"] + 5


@pytest.mark.parametrize("script", ["English", "Chinese"])
def test_the_sample_of_a_tokenizer_is_in_bytes(script: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    lines = [" ".join(text_of(script, 100, rng)) for _ in range(4000)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    manifest = scan([Source(path=str(tmp_path))], "causal", chunks=64)
    sampled = [t for column in sample(manifest, Selection(), 0, 0.2, 0) for t in column]
    assert 0.2e6 <= sum(len(t.encode()) for t in sampled) < 0.4e6


def test_the_dictionary_writes_no_spaces_into_chinese() -> None:
    sources = ["the cat sleeps", "the dog sleeps", "the cat eats", "the dog eats"] * 3
    targets = ["猫睡觉", "狗睡觉", "猫吃饭", "狗吃饭"] * 3
    for translated in Dictionary(sources, targets).predict(["the cat sleeps", "the dog eats"]):
        assert regex.fullmatch(f"[{UNSPACED}]+", translated)


@pytest.mark.parametrize("text", [" 床前明月光", "床前明月光疑是地上霜" * 60, "a b c " * 200, "x"])
def test_a_sample_prompt_is_a_beginning_that_is_not_empty(text: str) -> None:
    prompt = beginning(text, tiny_models.tokenizer())
    assert prompt and text.lstrip().startswith(prompt) and len(prompt) <= 300
    assert len(prompt) < len(text.strip()) or len(text) == 1


def test_the_bytes_of_a_character_are_shown() -> None:
    from sevenfold.inspect import model

    class Loaded:
        tokenizer: Any = tiny_models.tokenizer()

    ids = Loaded.tokenizer.encode("鼎a", add_special_tokens=False)
    shown = [model._decode(Loaded(), i) for i in ids]  # type: ignore[arg-type]
    assert shown == ["\\xe9", "\\xbc", "\\x8e", "a"]


def test_a_terminal_in_another_encoding_ends_no_command(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    env = {**os.environ, "PYTHONIOENCODING": "gbk", "SEVENFOLD_HOME": str(tmp_path)}
    (tmp_path / "a.txt").write_text("中文 🙂\n" * 2, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("sevenfold")), "inspect", "--data", "a.txt"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_pages_show_names_in_any_script(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    from sevenfold.report import html

    plt.switch_backend("svg")
    html.use_fonts_of_the_reader()
    figure, axes = plt.subplots()
    axes.set_title("试验 一")
    assert "试验 一" in html._svg(figure)
