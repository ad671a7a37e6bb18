"""The command `inspect --data`: a report on training data. It runs without Ray."""

from __future__ import annotations

from typing import Any

from sevenfold import storage
from sevenfold.data.sources.records import records
from sevenfold.errors import InputError
from sevenfold.inspect.survey import PLACES, Survey
from sevenfold.recipe import Source
from sevenfold.report.console import counting, say, table

BAR_WIDTH = 50  # characters of the longest bar of the histogram


def run(
    path: str, column: str | None = None, near: int = 10_000, out: str | None = None
) -> dict[str, Any]:
    """Prints a report on data: sizes, duplicates, scripts, personal data, lengths, bad rows.

    Personal data is masked.

    Args:
        path: A file, folder or glob, local or a URL; see `records`.
        column: The column of the text; by default as in `Record.text`.
        near: The number of texts that are checked for near duplicates: the first distinct ones;
            0 for none.
        out: The path of a JSON file for all numbers of the report.

    Returns:
        The numbers of the report.

    Raises:
        InputError: The path does not exist, a file is damaged, or no row has a text.
    """
    if near < 0:
        raise InputError(f"--near: expected 0 or more, found {near}")
    path = storage.keep_secrets(path)
    survey = Survey(near)
    rows = bad_rows = 0
    first_errors: list[str] = []
    files: set[str] = set()
    with counting("reading", "rows") as show_count:
        for record in records(Source(path=path)):
            rows += 1
            files.add(record.file)
            try:
                survey.add(record.text(column), record.file, record.row)
            except ValueError as e:
                bad_rows += 1
                if len(first_errors) < PLACES:
                    first_errors.append(f"{record.location}: {e}")
            if rows % 100 == 0:
                show_count(rows)
    if rows == bad_rows:
        example = f": {first_errors[0]}" if first_errors else ""
        raise InputError(f"{path}: expected rows with text, found none{example}")
    report = {
        "path": path,
        "files": len(files),
        "rows": rows,
        "bad_rows": {"rows": bad_rows, "first": first_errors},
        **survey.figures(),
    }
    _show(report)
    if out:
        storage.write_json(storage.resolve_output(out), report)
        say(f"full report: {storage.resolve_output(out)}")
    return report


def _show(report: dict[str, Any]) -> None:
    _show_sizes(report)
    table(
        "scripts",
        ["script", "letters", "share of letters", "texts mainly in it"],
        [
            (s["script"], f"{s['letters']:,}", f"{s['share']:.2%}", f"{s['texts']:,}")
            for s in report["scripts"]
        ],
    )
    kinds = report["personal"].items()
    table(
        "personal data (found by pattern)",
        ["kind", "matches", "texts"],
        [(kind, f"{v['found']:,}", f"{v['texts']:,}") for kind, v in kinds],
    )
    for kind, counts in kinds:
        for match in counts["first"]:
            say(f"  {kind}: {match['place']}: {match['value']}")
    _show_lengths(report)


def _show_sizes(report: dict[str, Any]) -> None:
    """Prints sizes, bad rows and duplicates."""
    exact, near, bad = report["exact_duplicates"], report["near_duplicates"], report["bad_rows"]
    texts = report["texts"]
    table(
        report["path"],
        ["statistic", "value"],
        [
            ("files", f"{report['files']:,}"),
            ("texts", f"{texts:,}"),
            ("bytes (UTF-8)", f"{report['bytes']:,}"),
            ("characters per text, mean", f"{report['characters'] / texts:,.0f}"),
            ("rows without text", f"{bad['rows']:,}"),
            ("exact duplicates", f"{exact['texts']:,} ({exact['texts'] / texts:.1%})"),
            (
                f"near duplicates in the first {near['looked_at']:,} distinct texts",
                f"{near['texts']:,}",
            ),
        ],
    )
    for error in bad["first"]:
        say(f"  no text: {error}")
    for group in exact["most"]:
        say(f"  {group['copies']:,} copies: {group['place']}")
    for pair in near["first"]:
        say(f"  near duplicates ({pair['jaccard']:.0%}): {pair['place']} and {pair['like']}")


def _show_lengths(report: dict[str, Any]) -> None:
    """Prints a histogram of the lengths, with a bar for each power of two."""
    say("characters per text")
    most = max(row["texts"] for row in report["lengths"])
    for row in report["lengths"]:
        bar = "█" * -(-BAR_WIDTH * row["texts"] // most)
        say(f"{row['from']:>12,} to {row['below'] - 1:<12,} {row['texts']:>10,} {bar}".rstrip())
    for extreme in ("shortest", "longest"):
        say(f"{extreme}: {report[extreme]['characters']:,} characters, {report[extreme]['place']}")
