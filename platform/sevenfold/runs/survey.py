"""A report of training data, before anything is trained on it. In this process, without Ray."""

from __future__ import annotations

import json
from typing import Any

from sevenfold import storage
from sevenfold.data.records import records
from sevenfold.errors import InputError
from sevenfold.evaluate.survey import PLACES, Survey
from sevenfold.report.console import counting, say, table

WIDEST = 50  # characters of a bar


def run(path: str, column: str | None = None, near: int = 10_000, out: str | None = None) -> dict[str, Any]:
    """Prints what is in data, and returns it: sizes, duplicates, scripts, personal data (masked), lengths, bad rows.

    Args:
        path: file, folder or glob, local or a URL: see data.records.
        column: of the text; default: as Record.text.
        near: texts that are looked at for near duplicates, the first ones; 0: none.
        out: JSON file for all figures.

    Raises:
        InputError: nothing there, a damaged file, not one row with text.
    """
    if near < 0:
        raise InputError(f"--near: expected 0 or more, found {near}")
    survey, rows, bad = Survey(near), 0, 0
    first: list[str] = []
    files: set[str] = set()
    with counting("reading", "rows") as told:
        for record in records(path):
            rows += 1
            files.add(record.file)
            try:
                survey.add(record.text(column), record.file, record.row)
            except ValueError as e:
                bad += 1
                if len(first) < PLACES:
                    first.append(f"{record.place}: {e}")
            if rows % 100 == 0:
                told(rows)
    if rows == bad:
        raise InputError(f"{path}: expected rows with text, found none" + (f": {first[0]}" if first else ""))
    figures = {"path": path, "files": len(files), "rows": rows, "bad_rows": {"rows": bad, "first": first}, **survey.figures()}
    _show(figures)
    if out:
        storage.write(storage.place(out), json.dumps(figures, ensure_ascii=False, indent=1))
        say(f"all figures: {storage.place(out)}")
    return figures


def _show(figures: dict[str, Any]) -> None:
    same, near, bad = figures["exact_duplicates"], figures["near_duplicates"], figures["bad_rows"]
    texts = figures["texts"]
    table(figures["path"], ["measure", "value"], [
        ("files", f"{figures['files']:,}"), ("texts", f"{texts:,}"), ("bytes (UTF-8)", f"{figures['bytes']:,}"),
        ("characters a text, mean", f"{figures['characters'] / texts:,.0f}"),
        ("rows without a text", f"{bad['rows']:,}"),
        ("copies of a text before", f"{same['texts']:,} ({same['texts'] / texts:.1%})"),
        (f"near duplicates among the first {near['looked_at']:,}", f"{near['texts']:,}"),
    ])  # fmt: skip
    for line in bad["first"]:
        say(f"  no text: {line}")
    for found in same["most"]:
        say(f"  {found['copies']:,} times: {found['place']}")
    for found in near["first"]:
        say(f"  alike ({found['jaccard']:.0%}): {found['place']} and {found['like']}")
    table("scripts", ["script", "letters", "share", "texts mostly in it"], [
        (s["script"], f"{s['letters']:,}", f"{s['share']:.2%}", f"{s['texts']:,}") for s in figures["scripts"]
    ])  # fmt: skip
    persons = figures["personal"].items()
    table(
        "personal data (by pattern)",
        ["kind", "found", "texts"],
        [(k, f"{v['found']:,}", f"{v['texts']:,}") for k, v in persons],
    )
    for kind, told in persons:
        for found in told["first"]:
            say(f"  {kind}: {found['place']}: {found['value']}")
    _draw(figures)


def _draw(figures: dict[str, Any]) -> None:
    """The lengths, a bar each power of two."""
    say("characters of a text")
    most = max(row["texts"] for row in figures["lengths"])
    for row in figures["lengths"]:
        bar = "█" * -(-WIDEST * row["texts"] // most)
        say(f"{row['from']:>12,} to {row['below'] - 1:<12,} {row['texts']:>10,} {bar}".rstrip())
    for which in ("shortest", "longest"):
        say(f"{which}: {figures[which]['characters']:,} characters, {figures[which]['place']}")
