"""What a person sees in the terminal: one live line a run, plain lines where there is no terminal, tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, soft_wrap=True)


def say(message: str) -> None:
    console.print(message, markup=False)


class Progress:
    """The live line of a run of so many steps."""

    def __init__(self, name: str, steps: int):
        self._name, self._steps, self._begin, self._first = name, steps, time.monotonic(), 0
        self._live = Live(Text(f"{name}: starting workers"), console=console, transient=True) if console.is_terminal else None
        if self._live:
            self._live.start()
        else:
            say(f"{name}: starting workers")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._first:
            self._begin, self._first = time.monotonic(), step
        line = f"{self._name}: step {step}/{self._steps}"
        for key, label, form in _SHOWN:
            if key in values:
                line += f"  {label} {form.format(values[key])}"
        if step > self._first:
            left = (time.monotonic() - self._begin) / (step - self._first) * (self._steps - step)
            line += f"  ETA {int(left // 60)}:{int(left % 60):02d}"
        if self._live and "train/loss" in values:
            self._live.update(Text(line))
        else:
            say(line)

    def close(self) -> None:
        if self._live:
            self._live.stop()


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


@contextmanager
def counting(what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A live line on standard error, where that is a terminal; what is yielded takes the count so far."""
    told = Console(stderr=True)
    columns = (TextColumn(what), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    with Bar(*columns, console=told, transient=True, disable=not told.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda count: bar.update(task, completed=count)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[str] = ()) -> None:
    """left: columns that begin at the left, as the first one does; figures do not."""
    out = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 or column in left else "right", overflow="fold")
    for row in rows:
        out.add_row(*[Text("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)) for v in row])
    (console if console.width >= 100 else Console(width=120, highlight=False)).print(out)
