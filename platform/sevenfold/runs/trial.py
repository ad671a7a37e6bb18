"""One trial of a sweep, for Tune: has the recipe with a point put in trained on a seat, and tells what it comes to."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ray import tune

from sevenfold import storage
from sevenfold.recipe import Recipe
from sevenfold.runs import cluster, prepare, seats
from sevenfold.runs.prepare import Job
from sevenfold.runs.seats import Work
from sevenfold.storage import RunFolder

POINTER = "trial.json"  # of what Tune keeps of a trial in place of a checkpoint: which run it is, and where that stands
KEPT = 2  # checkpoints: the reported one, and one not reported yet
DONATED = 10  # of pbt, where another trial may be about to go on from one


def every(recipe: Recipe) -> int:
    """Steps between two reports of a trial."""
    grace = recipe.search.grace if recipe.search else 1.0
    return recipe.validation.every or max(1, round(grace * recipe.steps))


def run(config: dict[str, Any], job: Job, desk: Any) -> None:
    """The recipe with a point put in, trained in a folder of its own. It goes on where it stopped or was paused; or, under new
    settings, from another trial's checkpoint, where Tune gives it that one (PBT)."""
    if not job.verbose:
        cluster.quieten()
    own = str(tune.get_context().get_trial_id())
    told = _pointer()
    recipe = _recipe(job.recipe, config)
    if told is None or told["trial"] == own:
        folder = RunFolder(told["folder"] if told else storage.join(job.folder, "trials", own))
    else:
        folder = _descended(storage.join(job.folder, "trials"), own, told, recipe.hash())
    prepare.claim(folder, recipe)
    descent = storage.read_json(_descent(folder))["recipe"] if storage.exists(_descent(folder)) else ""
    search = job.recipe.search
    metric, step = search.metric if search else "train/loss", told["step"] if told else 0
    for metrics in _reports(desk, own, Work(recipe, folder.root, descent), metric, step):
        with tempfile.TemporaryDirectory() as aside:
            pointer = {"trial": own, "folder": folder.root, "step": metrics["step"], "checkpoint": metrics["checkpoint"]}
            with open(os.path.join(aside, POINTER), "w", encoding="utf-8") as f:
                json.dump(pointer, f)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(aside))
    storage.write(whole(job.folder, own), "")


def whole(sweep: str, own: str) -> str:
    """File that is there once a trial has come to its own end."""
    return storage.join(sweep, "trials", own, "whole")


def _pointer() -> dict[str, Any] | None:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder, open(os.path.join(folder, POINTER), encoding="utf-8") as f:
        found: dict[str, Any] = json.load(f)
        return found


def _recipe(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    donates = recipe.search is not None and recipe.search.scheduler == "pbt"
    most = min(DONATED, math.ceil(recipe.steps / every(recipe))) if donates else 0
    keep = max(KEPT, recipe.checkpoint.keep, most)
    changes = {"validation.every": every(recipe), "checkpoint.every": every(recipe), "checkpoint.keep": keep}
    if donates:  # who goes on from a trial goes on from where it stands
        changes["validation.keep_best"] = False
    return recipe.override({**config, **changes, "search": None})


def _descent(folder: RunFolder) -> str:
    """File that tells which checkpoint of another trial this one began with."""
    return storage.join(folder.root, "descent.json")


def _descended(trials: str, own: str, told: dict[str, Any], identity: str) -> RunFolder:
    """A new folder of this trial that begins with another's checkpoint."""
    from sevenfold.engine import checkpoint as ckpt

    taken = {name for name in storage.listdir(trials) if name.startswith(own)}
    folder = RunFolder(storage.join(trials, f"{own}.{len(taken)}"))
    source = told["checkpoint"]
    if not storage.exists(source):  # the other trial has gone on, and removed it
        there = ckpt.steps(RunFolder(told["folder"]).checkpoints)
        source = there[min(there)]
    begun = ckpt.adopt(source, folder.checkpoints, identity)
    storage.write(_descent(folder), json.dumps({**told, "begins": begun.path, "recipe": begun.extra["recipe"]}))
    return folder


def _reports(desk: Any, own: str, work: Work, metric: str, step: int) -> Iterator[dict[str, Any]]:
    """What the run comes to after `step`: first what Tune was not told when it was stopped; then as it trains.

    Without those that lack the metric, as the loss of a step that was not logged.
    """
    folder = RunFolder(work.folder)

    def news() -> Iterator[None]:
        yield
        if step < work.recipe.steps:
            yield from seats.train_on(desk, own, replace(work, since=step))

    for _ in news():
        for metrics in seats.reports(folder):
            if metrics["step"] > step:
                step = metrics["step"]
                if metric in metrics:
                    yield metrics
