"""Runs a sweep of many trials that report once and train nothing; scale.py measures it.

    python benchmarks/many_trials.py TRIALS

The last line that it prints is a JSON list: after a quarter, a half and all of the trials, the
memory of the driver and of all its processes, their threads, open files and number. Each trial has
a process that Ray ends a while after the trial, so that figures go up and down: each one is the
least of the last fifty trials.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]

MB = 2**20
WINDOW = 50  # trials


def report_once(config: dict[str, Any], job: Any, dispatcher: Any) -> None:
    """Takes the place of a trial that trains: it asks the dispatcher for nothing."""
    from ray import tune

    loss = abs(config["optimizer.learning_rate"] - 0.01)
    steps = job.recipe.steps
    tune.report({"validation/loss": loss, "step": steps, "checkpoint": None})


def sample() -> dict[str, float]:
    """Returns what this process and those that it has started hold now."""
    driver = psutil.Process()
    processes = [driver, *driver.children(recursive=True)]
    found = {
        "memory of the driver, MB": driver.memory_full_info().uss / MB,
        "memory of all, MB": 0.0,
        "threads": 0.0,
        "open files": 0.0,
        "processes": 0.0,
    }
    for process in processes:
        try:
            found["memory of all, MB"] += process.memory_full_info().uss / MB
            found["threads"] += process.num_threads()
            found["open files"] += process.num_fds()
            found["processes"] += 1
        except psutil.NoSuchProcess:
            continue
    return found


def main(count: int) -> None:
    from conftest import RECIPE, stdlib_texts

    from sevenfold.recipe import parse
    from sevenfold.sweep import sweep, trial
    from sevenfold.sweep.callback import SweepCallback
    from sevenfold.train import launch

    home = Path(tempfile.mkdtemp())
    texts = [text[:3000] for text in stdlib_texts() if len(text) > 300]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tree = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{"path": str(home / "text.jsonl")}], "held_out": 0.2}
    tree |= {
        "storage": str(home / "runs"),
        "validation": {"every": 4, "rows": 8},
        "sweep": {
            "trials": count,
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}},
            "metric": "validation/loss",
            "scheduler": "asha",
            "max_concurrent": 4,
        },
    }
    (home / "r.yaml").write_text(yaml.safe_dump(tree))
    window: deque[dict[str, float]] = deque(maxlen=WINDOW)
    samples: list[dict[str, float]] = []
    ended = 0
    complete = SweepCallback.on_trial_complete

    def on_trial_complete(callback: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal ended
        complete(callback, *args, **kwargs)
        ended += 1
        window.append(sample())
        if ended in (count // 4, count // 2, count):
            least = {name: min(s[name] for s in window) for name in window[0]}
            samples.append({"trials": float(ended)} | least)

    SweepCallback.on_trial_complete = on_trial_complete  # type: ignore[method-assign]
    trial.run = report_once
    launch.finish = lambda *_: None  # nothing was trained that could be exported
    sweep.run(parse(str(home / "r.yaml")))
    print(json.dumps(samples), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(int(sys.argv[1]))
