"""The HTML page of a sweep: learning curves, hyperparameters on parallel axes, their importance.

It is a single file that contains its pictures.
"""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna

from sevenfold import storage
from sevenfold.errors import first_line
from sevenfold.recipe import Sweep
from sevenfold.report.console import escape, format_cell, say
from sevenfold.report.ranking import read_trials
from sevenfold.report.run_log import read_reports
from sevenfold.run_folder import RunFolder

STYLE = (
    "body{font:14px sans-serif;margin:2em}"
    "td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}"
    "svg{max-width:100%;height:auto}"
)
COLORS = "viridis_r"  # dark colors for the best trials

Trial = Mapping[str, Any]  # an entry of trials.json


def write(folder: RunFolder, sweep: Sweep) -> None:
    """Writes report.html from trials.json and the reports of the trials."""
    trials = read_trials(folder)
    plt.switch_backend("svg")
    use_fonts_of_the_reader()
    scored = [trial for trial in trials if trial["score"] is not None]
    pictures = [
        _picture("learning curves", lambda: _draw_curves(folder, trials, sweep)),
        _picture("hyperparameters", lambda: _draw_parallel_axes(scored, sweep)),
        _picture("importance", lambda: _draw_importance(scored, sweep)),
    ]
    name, direction = _html(folder.name), "lower" if sweep.best == "min" else "higher"
    summary = _html(
        f"{len(trials)} trials; {sweep.algorithm} sweep, scheduler {sweep.scheduler}; "
        f"{sweep.metric}, {direction} is better."
    )
    page = (
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
        f"<h1>{name}</h1><p>{summary} <code>best.yaml</code> is the recipe of the best trial.</p>"
        f"{''.join(pictures)}{_html_table(trials, sweep)}"
    )
    storage.write(storage.join(folder.root, "report.html"), page)


def _picture(name: str, draw: Callable[[], str]) -> str:
    """Returns a picture as HTML; a line that says why, if it cannot be drawn.

    All trials have run by now: what stops one picture must not cost the rest of the page.
    """
    try:
        return draw()
    except Exception as e:
        plt.close("all")
        message = f"the picture of the {name} is left out: {first_line(e)}"
        say(f"report.html: {message}")
        return f"<p>{_html(message)}</p>"


def _html(value: Any) -> str:
    """Returns a value as HTML text, formatted as in the printed tables."""
    return html.escape(_shown(value))


def _shown(value: Any) -> str:
    return escape(format_cell(value))


def _html_table(trials: Sequence[Trial], sweep: Sweep) -> str:
    hyperparameters = sorted({key for trial in trials for key in trial["config"]})
    columns = ["trial", *hyperparameters, "step", sweep.metric, "status", "reason"]
    rows = [
        [
            trial["trial"],
            *(trial["config"].get(key) for key in hyperparameters),
            trial["step"],
            trial["score"],
            trial["status"],
            trial["error"] or "",
        ]
        for trial in trials
    ]
    head = "".join(f"<th>{_html(column)}</th>" for column in columns)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{_html(value)}</td>" for value in row)
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def use_fonts_of_the_reader() -> None:
    """Keeps the text of figures as text.

    Names may be in scripts that Matplotlib's font lacks, and a $ in them begins no formula.
    """
    plt.rcParams.update(
        {"svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False}
    )


def _svg(figure: Any) -> str:
    """Returns a figure as an <svg> element, without the XML header, and closes it."""
    out = io.StringIO()
    with warnings.catch_warnings():
        # Matplotlib's own font, which the page does not use, lacks many scripts
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="svg", bbox_inches="tight")
    plt.close(figure)
    _, tag, rest = out.getvalue().partition("<svg")
    return tag + rest


def curve(folder: RunFolder, trial: str, metric: str) -> list[tuple[int, float]]:
    """Returns a trial's learning curve as (step, value) pairs.

    Population based training continues trials from the weights of better ones. Such a trial has
    several folders: NAME, NAME.1, ...; the latest value of a step counts.

    Args:
        folder: The sweep's folder.
        trial: The trial's name.
        metric: The metric.
    """
    root = storage.join(folder.root, "trials")
    names = [n for n in storage.listdir(root) if n == trial or n.startswith(f"{trial}.")]
    names.sort(key=lambda n: int(n.partition(".")[2] or 0))
    values = {}
    for name in names:
        reports = read_reports(storage.join(root, name, "reports.json"))
        values.update({report["step"]: report.get(metric) for report in reports})
    return [
        (step, value)
        for step, value in sorted(values.items())
        if value is not None and math.isfinite(value)
    ]


def _draw_curves(folder: RunFolder, trials: Sequence[Trial], sweep: Sweep) -> str:
    figure, axes = plt.subplots(figsize=(10, 4.5))
    colors = plt.get_cmap(COLORS)(np.linspace(1, 0, max(1, len(trials))))
    for color, trial in zip(colors, trials, strict=True):
        points = curve(folder, trial["trial"], sweep.metric)
        if not points:
            continue
        finished = trial["status"] == "finished"
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            linestyle="-" if finished else "--",
            marker=".",
            label=trial["trial"],
        )
        if not finished:
            axes.plot(*points[-1], "x", color=color)
    axes.set(xlabel="step", ylabel=sweep.metric, title="trials (x: stopped early or failed)")
    if len(trials) <= 12:
        axes.legend(fontsize=7)
    return _svg(figure)


def _draw_parallel_axes(trials: Sequence[Trial], sweep: Sweep) -> str:
    """Draws one axis per hyperparameter, from its lowest to its highest value; then the score."""
    if not trials:
        return ""
    keys = [key for key in sweep.space if any(key in trial["config"] for trial in trials)]
    columns = [[trial["config"].get(key) for trial in trials] for key in keys]
    log_scale = [bool(sweep.space[key].loguniform) for key in keys]
    columns.append([trial["score"] for trial in trials])
    log_scale.append(False)
    figure, axes = plt.subplots(figsize=(10, 4))
    heights = [_heights(column, log) for column, log in zip(columns, log_scale, strict=True)]
    colors = plt.get_cmap(COLORS)(np.linspace(1, 0, len(trials)))
    for i in reversed(range(len(trials))):  # the best trial last, on top of the others
        axes.plot(range(len(columns)), [h[i] for h in heights], color=colors[i], alpha=0.8)
    for x, column in enumerate(columns):
        axes.axvline(x, color="#999", linewidth=0.5)
        values = list(dict.fromkeys(value for value in column if value is not None))
        if not values:
            continue
        if all(isinstance(value, int | float) for value in values):
            low, high = min(values), max(values)
        else:
            low, high = values[0], values[-1]
        axes.text(x, -0.07, _shown(low), ha="center", fontsize=8)
        axes.text(x, 1.04, _shown(high), ha="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [*(key.split(".", 1)[-1] for key in keys), sweep.metric])
    axes.tick_params(axis="x", pad=14)
    axes.set(yticks=[], ylim=(-0.02, 1.02))
    axes.set_title("trials (darker is better)", pad=18)
    return _svg(figure)


def _heights(column: Sequence[Any], log: bool) -> list[float]:
    """Scales the values of an axis to 0..1; nan where a trial has no value.

    Values that are not numbers are spread evenly, in the order in which they occur.
    """
    numeric = all(isinstance(value, int | float) for value in column if value is not None)
    names = list(dict.fromkeys(str(value) for value in column if value is not None))

    def position(value: Any) -> float:
        if value is None:
            return math.nan
        if not numeric:
            return float(names.index(str(value)))
        return math.log(value) if log else float(value)

    positions = [position(value) for value in column]
    if not names:
        return positions
    low, high = np.nanmin(positions), np.nanmax(positions)
    return [0.5 if high == low else float((p - low) / (high - low)) for p in positions]


def importance(trials: Sequence[Trial], sweep: Sweep) -> dict[str, float]:
    """Returns the share of the score's variance that each hyperparameter explains.

    Computed by Optuna's fANOVA (Hutter et al., ICML 2014) for the hyperparameters that every trial
    has.

    Args:
        trials: Trials with a score.
        sweep: The sweep.

    Returns:
        An empty dict if there are fewer than four trials, or all scores are equal.
    """
    keys = [key for key in sweep.space if all(key in trial["config"] for trial in trials)]
    if len(trials) < 4 or not keys or len({trial["score"] for trial in trials}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if sweep.best == "min" else "maximize")
    distributions = {key: _distribution(sweep, key) for key in keys}
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                params={key: trial["config"][key] for key in keys},
                distributions=distributions,
                value=trial["score"],
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(sweep: Sweep, key: str) -> Any:
    """Returns Optuna's distribution for a key of the search space."""
    space = sweep.space[key]
    if space.choice:
        return optuna.distributions.CategoricalDistribution(space.choice)
    if space.integer:
        return optuna.distributions.IntDistribution(*space.integer)
    low, high = space.uniform or space.loguniform or (0.0, 1.0)
    return optuna.distributions.FloatDistribution(low, high, log=space.loguniform is not None)


def _draw_importance(trials: Sequence[Trial], sweep: Sweep) -> str:
    shares = importance(trials, sweep)
    if not shares:
        return ""
    figure, axes = plt.subplots(figsize=(10, 0.6 + 0.4 * len(shares)))
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names])
    axes.set(xlim=(0, 1), title="importance (fANOVA): share of variance explained")
    return _svg(figure)
