"""Terminal output: messages, texts, tables, and one live line per run (plain without a terminal).

Everything that is printed passes through this module. Names, labels, messages of libraries and
generated text come from elsewhere, and a terminal obeys the control characters in them: it would
clear lines, change colors or show text in another order. They are printed as their escapes.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sevenfold.storage import hide_secrets

console = Console(highlight=False, soft_wrap=True)

# metric, its label, its format; in the order of the line
_SHOWN = (
    ("train/loss", "loss", "{:.3f}"),
    ("validation/loss", "validation loss", "{:.3f}"),
    ("validation/bits_per_byte", "bits/byte", "{:.3f}"),
    ("validation/accuracy", "accuracy", "{:.1%}"),
    ("validation/f1_macro", "F1", "{:.3f}"),
    ("validation/rougeL", "ROUGE-L", "{:.3f}"),
    ("validation/bleu", "BLEU", "{:.1f}"),
    ("validation/chrf", "chrF", "{:.1f}"),
    ("train/grad_norm", "grad norm", "{:.2f}"),
    ("train/sparsity", "zeros", "{:.1%}"),
    ("train/tokens_per_second", "tok/s", "{:,.0f}"),
    ("train/mfu", "MFU", "{:.1%}"),
    ("train/data_wait", "data wait", "{:.1%}"),
)


# What a terminal obeys instead of showing it: control characters (C0, DEL, C1), Unicode's
# embeddings, overrides and isolates, which show text in another order, and line separators; and
# lone surrogates, which cannot be encoded. The marks U+200E, U+200F and U+061C stay: Arabic and
# Hebrew texts have them.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str, lines: bool = False) -> str:
    r"""Returns a text with its control characters as Python's escapes, such as \x1b and \u202e.

    All other characters stay as they are, including those that join emoji and letters. A backslash
    stays too, so that escaping a text twice changes nothing.

    Args:
        text: The text.
        lines: Whether the text may have several lines: its newlines and tabs stay.
    """

    def escaped(match: re.Match[str]) -> str:
        if lines and match[0] in "\n\t":
            return match[0]
        return match[0].encode("unicode_escape").decode()

    return _CONTROL.sub(escaped, text)


def say(message: str, stderr: bool = False) -> None:
    """Prints a message on one line, as it is apart from `escape`: without rich's markup or emoji.

    Args:
        message: The message. A newline in it is escaped, and the secrets of URLs are left out.
        stderr: Prints on standard error, as errors are.
    """
    message = hide_secrets(message)
    if stderr:
        print(escape(message), file=sys.stderr, flush=True)
    else:
        console.print(escape(message), markup=False, emoji=False)


def print_text(text: str, end: str = "\n") -> None:
    """Prints a text that may have several lines, or a piece of one, apart from `escape` as it is.

    Args:
        text: The text.
        end: What is printed after it.
    """
    print(escape(text, lines=True), end=end, flush=True)


def print_styled(pieces: Iterable[tuple[str, str]]) -> None:
    """Prints the pieces of a text, each with a style of rich; nothing if there is no terminal."""
    if console.is_terminal:
        console.print(Text.assemble(*[(escape(piece, lines=True), s) for piece, s in pieces]))


def print_json(text: str) -> None:
    """Prints JSON with the characters that `escape` escapes as JSON's escapes: the same values."""
    print(
        _CONTROL.sub(lambda m: m[0] if m[0] == "\n" else json.dumps(m[0])[1:-1], text), flush=True
    )


def escape_logs_and_tracebacks() -> None:
    """Escapes the log records of all libraries, and the traceback that ends this process.

    The secrets of URLs are left out of both.
    """
    if logging.getLogRecordFactory() is logging.LogRecord:  # Ray wraps this factory in its own
        logging.setLogRecordFactory(_LogRecord)
    sys.excepthook = _print_traceback


class _LogRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return escape(hide_secrets(super().getMessage()), lines=True)


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    lines = "".join(traceback.format_exception(kind, error, trace))
    print(escape(hide_secrets(lines), lines=True), end="", file=sys.stderr, flush=True)


class Progress:
    """The live line of a training run; plain lines where there is no terminal."""

    def __init__(self, name: str, steps: int):
        """Shows that the workers are being started.

        Args:
            name: The run's name.
            steps: Its total number of steps.
        """
        self._name, self._steps = name, steps
        self._first_time, self._first_step = time.monotonic(), 0
        self._live: Live | None = None
        if console.is_terminal:
            waiting = Text(escape(f"{name}: starting workers"))
            self._live = Live(waiting, console=console, transient=True)
            self._live.start()
        else:
            say(f"{name}: starting workers")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a step, and the time that the remaining steps will take.

        Metrics without the training loss, such as those of a validation, get a line that stays.
        """
        if not self._first_step:
            self._first_time, self._first_step = time.monotonic(), step
        # a run may correct its number of steps
        self._steps = int(values.get("train/steps", self._steps))
        line = f"{self._name}: step {step}/{self._steps}"
        for key, label, form in _SHOWN:
            if key in values:
                line += f"  {label} {form.format(values[key])}"
        if step > self._first_step:
            pace = (time.monotonic() - self._first_time) / (step - self._first_step)
            remaining = pace * (self._steps - step)
            line += f"  ETA {int(remaining // 60)}:{int(remaining % 60):02d}"
        if self._live and "train/loss" in values:
            self._live.update(Text(escape(line)))
        else:
            say(line)

    def close(self) -> None:
        """Removes the live line."""
        if self._live:
            self._live.stop()


@contextmanager
def counting(what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows a live counter on standard error; nothing if that is no terminal.

    Args:
        what: What is being done.
        unit: What is counted.

    Yields:
        A function to call with the current count.
    """
    stderr = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]}", markup=False),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(
        *columns, console=stderr, transient=True, disable=not stderr.is_terminal
    ) as bar:
        task = bar.add_task(escape(what), total=None, unit=escape(unit))
        yield lambda count: bar.update(task, completed=count)


def format_cell(value: Any) -> str:
    """Formats a value of a table: four significant digits of a float, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[str] = ()
) -> None:
    """Prints a table.

    Args:
        title: The title above it.
        columns: The names of the columns.
        rows: The values, row by row.
        left: Columns to align left, as the first one always is. The others are aligned right.
    """
    grid = build_table(title, columns, rows, left)
    wide_enough = console.width >= 100
    (console if wide_enough else Console(width=120, highlight=False)).print(grid)


def build_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[str] = ()
) -> Table:
    """Returns the table that `table` prints, with the same arguments."""
    # As a Text, a title, name or value is shown without rich's markup and emoji.
    grid = Table(title=Text(escape(title), "table.title"), title_justify="left")
    for i, column in enumerate(columns):
        align_left = i == 0 or column in left
        grid.add_column(
            Text(escape(column)), justify="left" if align_left else "right", overflow="fold"
        )
    for row in rows:
        grid.add_row(*[Text(escape(format_cell(value))) for value in row])
    return grid
