"""The page of a sweep: every trial's curve, its point on parallel axes, what mattered. One HTML file, its pictures inside."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna

from sevenfold import storage
from sevenfold.recipe import Search
from sevenfold.storage import RunFolder

STYLE = (
    "body{font:14px sans-serif;margin:2em}td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}"
    "svg{max-width:100%;height:auto}"
)
COLORS = "viridis_r"  # the best is dark


def write(folder: RunFolder, search: Search) -> None:
    """Writes report.html from trials.json and the trials' reports."""
    trials = storage.read_json(folder.trials)
    plt.switch_backend("svg")
    good = [t for t in trials if t["score"] is not None]
    pictures = [_curves(folder, trials, search), _parallel(good, search), _importance(good, search)]
    points = sorted({k for t in trials for k in t["config"]})
    head = ["trial", *points, "step", search.metric, "status", "reason"]
    rows = [
        [t["trial"], *(t["config"].get(k) for k in points), t["step"], t["score"], t["status"], t["error"] or ""]
        for t in trials
    ]
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(_text(c))}</td>' for c in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    name, best = html.escape(folder.name), "least" if search.best == "min" else "greatest"
    how = f"{len(trials)} trials; {search.algorithm} search, scheduler {search.scheduler}; {search.metric}, {best} is best."
    page = (
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1><p>{html.escape(how)} "
        f"<code>best.yaml</code> trains the best one again.</p>{''.join(pictures)}<table><tr>{heads}</tr>{body}</table>"
    )
    storage.write(storage.join(folder.root, "report.html"), page)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    plt.close(figure)
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]


def curve(folder: RunFolder, trial: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a trial's reports. A trial that went on from another's weights has several folders; the last value of a
    step counts."""
    root = storage.join(folder.root, "trials")
    found = (n for n in storage.listdir(root) if n == trial or n.startswith(f"{trial}."))
    names = sorted(found, key=lambda n: int(n.partition(".")[2] or 0))
    paths = [storage.join(root, n, "reports.json") for n in names]
    values = {r["step"]: r.get(metric) for p in paths if storage.exists(p) for r in storage.read_json(p)}
    return [(step, value) for step, value in sorted(values.items()) if value is not None and math.isfinite(value)]


def _curves(folder: RunFolder, trials: Sequence[Mapping[str, Any]], search: Search) -> str:
    figure, axes = plt.subplots(figsize=(10, 4.5))
    colors = plt.get_cmap(COLORS)(np.linspace(1, 0, max(1, len(trials))))
    for color, trial in zip(colors, trials, strict=True):
        points = curve(folder, trial["trial"], search.metric)
        if points:
            ended = trial["status"] != "finished"
            axes.plot(
                *zip(*points, strict=True), color=color, linestyle="--" if ended else "-", marker=".", label=trial["trial"]
            )
            if ended:
                axes.plot(*points[-1], "x", color=color)
    axes.set(xlabel="step", ylabel=search.metric, title="trials; x: stopped early or failed")
    if len(trials) <= 12:
        axes.legend(fontsize=7)
    return _svg(figure)


def _parallel(trials: Sequence[Mapping[str, Any]], search: Search) -> str:
    """One axis a hyperparameter, from its least value to its greatest, the score at the right."""
    if not trials:
        return ""
    keys = [k for k in search.space if any(k in t["config"] for t in trials)]
    columns = [[t["config"].get(k) for t in trials] for k in keys] + [[t["score"] for t in trials]]
    figure, axes = plt.subplots(figsize=(10, 4))
    heights = [_heights(c, bool(k and search.space[k].loguniform)) for c, k in zip(columns, [*keys, ""], strict=True)]
    colors = plt.get_cmap(COLORS)(np.linspace(1, 0, len(trials)))
    for i in reversed(range(len(trials))):
        axes.plot(range(len(columns)), [h[i] for h in heights], color=colors[i], alpha=0.8)
    for x, column in enumerate(columns):
        axes.axvline(x, color="#999", linewidth=0.5)
        there = list(dict.fromkeys(v for v in column if v is not None))
        if not there:
            continue
        low, high = (min(there), max(there)) if all(isinstance(v, int | float) for v in there) else (there[0], there[-1])
        axes.text(x, -0.07, _text(low), ha="center", fontsize=8)
        axes.text(x, 1.04, _text(high), ha="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [*(k.split(".", 1)[-1] for k in keys), search.metric])
    axes.tick_params(axis="x", pad=14)
    axes.set(yticks=[], ylim=(-0.02, 1.02))
    axes.set_title("points tried, the best dark", pad=18)
    return _svg(figure)


def _heights(column: Sequence[Any], log: bool) -> list[float]:
    """0 to 1; nan where there is no value."""
    numbers = all(isinstance(v, int | float) for v in column if v is not None)
    names = list(dict.fromkeys(str(v) for v in column if v is not None))
    at = [
        math.nan if v is None else (math.log(v) if log else float(v)) if numbers else float(names.index(str(v))) for v in column
    ]
    if not names:
        return at
    low, high = np.nanmin(at), np.nanmax(at)
    return [0.5 if high == low else float((v - low) / (high - low)) for v in at]


def importance(trials: Sequence[Mapping[str, Any]], search: Search) -> dict[str, float]:
    """How much of the score's variance each hyperparameter explains, by Optuna's fANOVA (Hutter et al., ICML 2014), of those
    that every trial has; empty where there are too few trials, or all scores are one."""
    keys = [k for k in search.space if all(k in t["config"] for t in trials)]
    if len(trials) < 4 or not keys or len({t["score"] for t in trials}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if search.best == "min" else "maximize")
    spaces = {k: _distribution(search, k) for k in keys}
    for t in trials:
        point = {k: t["config"][k] for k in keys}
        study.add_trial(optuna.trial.create_trial(params=point, distributions=spaces, value=t["score"]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(search: Search, key: str) -> Any:
    space = search.space[key]
    if space.choice:
        return optuna.distributions.CategoricalDistribution(space.choice)
    if space.integer:
        return optuna.distributions.IntDistribution(*space.integer)
    low, high = space.uniform or space.loguniform or (0.0, 1.0)
    return optuna.distributions.FloatDistribution(low, high, log=space.loguniform is not None)


def _importance(trials: Sequence[Mapping[str, Any]], search: Search) -> str:
    found = importance(trials, search)
    if not found:
        return ""
    figure, axes = plt.subplots(figsize=(10, 0.6 + 0.4 * len(found)))
    names = list(found)[::-1]
    axes.barh(names, [found[n] for n in names])
    axes.set(xlim=(0, 1), title="importance (fANOVA): part of the score's variance")
    return _svg(figure)
