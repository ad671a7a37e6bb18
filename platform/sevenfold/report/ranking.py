"""A sweep's trials: live in the terminal, as a table, in JSON and CSV, and in TensorBoard."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import rich.live
from torch.utils.tensorboard import SummaryWriter

from sevenfold import storage
from sevenfold.recipe import Sweep
from sevenfold.report.console import build_table, console, say, table
from sevenfold.run_folder import RunFolder

# metrics in the printed table, where the trials have them
SHOWN = (
    "validation/loss",
    "validation/rougeL",
    "validation/f1_macro",
    "validation/accuracy",
    "train/loss",
)
LIVE_ROWS = 20
FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 (Excel takes the wide ones too)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
TRIAL_FIELDS = {"trial", "config", "step", "score", "metrics", "status", "error"}


class Live:
    """The live table of a running sweep, best trials first; nothing where there is no terminal."""

    def __init__(self, sweep: Sweep):
        """Shows an empty table."""
        self._sweep = sweep
        self._live: rich.live.Live | None = None
        if console.is_terminal:
            self._live = rich.live.Live(console=console, refresh_per_second=1, transient=True)
            self._live.start()

    def show(self, trials: Sequence[Any]) -> None:
        """Updates the table.

        Args:
            trials: Ray Tune's trials.
        """
        if self._live is None:
            return
        sign = 1 if self._sweep.best == "min" else -1
        metric = self._sweep.metric

        def rank(trial: Any) -> tuple[bool, float]:
            score = trial.last_result.get(metric) if trial.last_result else None
            return score is None, sign * (score or 0.0)

        columns = ["trial", *self._sweep.space, "step", metric, "status"]
        rows = []
        for trial in sorted(trials, key=rank)[:LIVE_ROWS]:
            result = trial.last_result or {}
            values = [trial.config.get(key) for key in self._sweep.space]
            values += [result.get("step"), result.get(metric)]
            rows.append([trial.trial_id, *values, trial.status.lower()])
        title = f"{len(trials)} of {self._sweep.number} trials"
        self._live.update(build_table(title, columns, rows))

    def close(self) -> None:
        """Removes the table."""
        if self._live:
            self._live.stop()


def write(folder: RunFolder, trials: Sequence[Mapping[str, Any]]) -> None:
    """Writes trials.json, trials.csv, and each trial's hyperparameters and metrics for TensorBoard.

    TensorBoard's files (its HPARAMS page) are not written if the folder is at a URL.

    Args:
        folder: The sweep's folder.
        trials: The trials, best first.
    """
    storage.write_json(folder.trials, trials)
    _write_csv(storage.join(folder.root, "trials.csv"), trials)
    if storage.is_url(folder.root):
        return
    for trial in trials:
        metrics = {key: v for key, v in trial["metrics"].items() if isinstance(v, float)}
        log_dir = storage.join(folder.root, "trials", trial["trial"], "tensorboard")
        with SummaryWriter(log_dir) as writer:
            writer.add_hparams(
                {key: v if v is not None else "none" for key, v in trial["config"].items()},
                metrics,
                run_name=".",
            )


def _write_csv(path: str, trials: Sequence[Mapping[str, Any]]) -> None:
    hyperparameters = sorted({key for trial in trials for key in trial["config"]})
    metrics = sorted({key for trial in trials for key in trial["metrics"]} - {"step"})
    text = io.StringIO()
    writer = csv.writer(text)
    header = ["trial", "status", *hyperparameters, "step", *metrics, "error"]
    writer.writerow(map(_csv_cell, header))
    for trial in trials:
        cells = [
            *(trial["config"].get(key) for key in hyperparameters),
            trial["step"],
            *(trial["metrics"].get(key) for key in metrics),
        ]
        row = [trial["trial"], trial["status"], *cells, trial["error"]]
        writer.writerow(map(_csv_cell, row))
    storage.write(path, text.getvalue())


def _csv_cell(value: Any) -> Any:
    """Returns a value as a cell that a spreadsheet does not take for a formula.

    A text that begins as a formula does, and is no number, gets an apostrophe before it (OWASP, CSV
    injection).
    """
    if not isinstance(value, str) or not value.startswith(FORMULA_STARTS):
        return value
    return value if NUMBER.fullmatch(value) else f"'{value}"


def read_trials(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the trials of a sweep as `write` wrote them, best first; there is at least one.

    Raises:
        InputError: trials.json is missing or damaged.
    """

    def parse(trials: Any) -> list[dict[str, Any]]:
        if not isinstance(trials, list) or not trials:
            raise TypeError("expected a list of trials")
        for trial in trials:
            if missing := TRIAL_FIELDS - trial.keys():
                raise KeyError(min(missing))
        return trials

    return storage.read_json(folder.trials, parse)


def show(folder: RunFolder) -> None:
    """Prints the trials of a sweep, best first, and the errors of those that failed."""
    trials = read_trials(folder)
    metrics = [key for key in SHOWN if key in trials[0]["metrics"]]
    hyperparameters = sorted({key for trial in trials for key in trial["config"]})
    rows = [
        [
            trial["trial"],
            *(trial["config"].get(key) for key in hyperparameters),
            trial["step"],
            *(trial["metrics"].get(key) for key in metrics),
            trial["status"],
        ]
        for trial in trials
    ]
    columns = [
        "trial",
        *(key.split(".", 1)[-1] for key in hyperparameters),
        "step",
        *(metric.removeprefix("validation/") for metric in metrics),
        "status",
    ]
    table(f"{folder.name}: trials, best first", columns, rows)
    for trial in trials:
        if trial["error"]:
            say(f"trial {trial['trial']} failed: {trial['error']}")
