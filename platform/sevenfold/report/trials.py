"""A sweep's trials: live in the terminal; then as a table, as trials.json, trials.csv, TensorBoard's hparams."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import rich.live
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from sevenfold import storage
from sevenfold.recipe import Search
from sevenfold.report.console import console, say, table
from sevenfold.storage import RunFolder

SHOWN = ("validation/loss", "validation/rougeL", "validation/f1_macro", "validation/accuracy", "train/loss")
LIVE_ROWS = 20


class Live:
    """The table of a sweep that runs, the best of all first; nothing where there is no terminal."""

    def __init__(self, search: Search):
        self._search = search
        self._live = rich.live.Live(console=console, refresh_per_second=1, transient=True) if console.is_terminal else None
        if self._live:
            self._live.start()

    def show(self, trials: Sequence[Any]) -> None:
        """trials: Tune's."""
        if self._live is None:
            return
        sign = 1 if self._search.best == "min" else -1
        metric = self._search.metric

        def order(trial: Any) -> tuple[bool, float]:
            score = trial.last_result.get(metric) if trial.last_result else None
            return score is None, sign * (score or 0.0)

        out = Table(title=f"{len(trials)} of {self._search.number} trials", title_justify="left")
        for name in ("trial", *self._search.space, "step", metric, "status"):
            out.add_column(name)
        for trial in sorted(trials, key=order)[:LIVE_ROWS]:
            last = trial.last_result or {}
            cells = [trial.config.get(k) for k in self._search.space] + [last.get("step"), last.get(metric)]
            out.add_row(trial.trial_id, *(_cell(c) for c in cells), trial.status.lower())
        self._live.update(out)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def reason(error: Any) -> str:
    """The line of a trial's error that says why."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no word of why")
    return (found.partition("sevenfold.errors.")[2].partition(": ")[2] or found)[:300]


def write(folder: RunFolder, trials: Sequence[Mapping[str, Any]]) -> None:
    """Of ranked trials: trials.json, trials.csv, and each one's point beside its score in TensorBoard (HPARAMS)."""
    storage.write(folder.trials, json.dumps(trials, indent=1))
    points, keys = (sorted({k for t in trials for k in t[part]}) for part in ("config", "metrics"))
    keys = [k for k in keys if k != "step"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", "status", *points, "step", *keys, "error"])
    for t in trials:
        cells = [t["config"].get(k) for k in points] + [t["step"]] + [t["metrics"].get(k) for k in keys]
        writer.writerow([t["trial"], t["status"], *cells, t["error"]])
    storage.write(storage.join(folder.root, "trials.csv"), text.getvalue())
    for t in trials if not storage.is_url(folder.root) else ():
        figures = {k: v for k, v in t["metrics"].items() if isinstance(v, float)}
        board = storage.join(folder.root, "trials", t["trial"], "tensorboard")
        with SummaryWriter(board) as events:
            events.add_hparams({k: v if v is not None else "none" for k, v in t["config"].items()}, figures, run_name=".")


def show(folder: RunFolder) -> None:
    """Prints the ranking."""
    trials = storage.read_json(folder.trials)
    measures = [k for k in SHOWN if k in trials[0]["metrics"]]
    points = sorted({k for t in trials for k in t["config"]})
    rows = [
        [
            t["trial"],
            *(t["config"].get(k) for k in points),
            t["step"],
            *(t["metrics"].get(k) for k in measures),
            t["status"],
        ]
        for t in trials
    ]
    columns = ["trial", *(k.split(".", 1)[-1] for k in points), "step", *(m.removeprefix("validation/") for m in measures)]
    table(f"{folder.name}: trials, best first", [*columns, "status"], rows)
    for t in trials:
        if t["error"]:
            say(f"trial {t['trial']} failed: {t['error']}")
