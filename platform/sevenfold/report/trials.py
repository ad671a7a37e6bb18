"""The ranking of a sweep's trials, as a table."""

from __future__ import annotations

from sevenfold import storage
from sevenfold.report.console import table
from sevenfold.storage import RunFolder


def show(folder: RunFolder) -> None:
    """Prints the ranking."""
    trials = storage.read_json(folder.trials)
    measures = [k for k in ("validation/loss", "validation/rougeL", "train/loss") if k in trials[0]["metrics"]]
    most = max(t["step"] or 0 for t in trials)
    keys = [k.split(".", 1)[-1] for k in trials[0]["config"]]
    rows = []
    for t in trials:
        status = "failed" if t["error"] else "finished" if t["step"] == most else "stopped early"
        rows.append([t["trial"], *t["config"].values(), t["step"], *[t["metrics"].get(k) for k in measures], status])
    columns = ["trial", *keys, "step", *[m.removeprefix("validation/") for m in measures], "status"]
    table(f"{folder.name}: trials, best first", columns, rows)
