"""Terminal output: messages, tables, and one live line per run (plain lines without a terminal)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

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


def say(message: str) -> None:
    """Prints a message as it is, without rich's markup."""
    console.print(message, markup=False)


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
            self._live = Live(Text(f"{name}: starting workers"), console=console, transient=True)
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
            self._live.update(Text(line))
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
        progress.TextColumn(what),
        progress.MofNCompleteColumn(),
        progress.TextColumn(unit),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(
        *columns, console=stderr, transient=True, disable=not stderr.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
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
    grid = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        align_left = i == 0 or column in left
        grid.add_column(column, justify="left" if align_left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*[Text(format_cell(value)) for value in row])
    wide_enough = console.width >= 100
    (console if wide_enough else Console(width=120, highlight=False)).print(grid)
