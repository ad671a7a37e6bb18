"""A trial of a sweep as Ray Tune runs it: it trains in the worker pool and reports to Tune."""

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
from sevenfold.cluster import connect
from sevenfold.prepare.job import Job, claim_folder
from sevenfold.recipe import Recipe
from sevenfold.run_folder import RunFolder
from sevenfold.sweep import worker_group, worker_pool
from sevenfold.sweep.dispatcher import TrialSpec
from sevenfold.sweep.space_check import check_point_model

# Tune gets a file with this name in place of a checkpoint. It says which run folder a trial's
# checkpoint is in, which checkpoint that is, and its step.
POINTER = "trial.json"
# The fewest checkpoints that a trial keeps: the reported one, and one that is not reported yet.
MIN_CHECKPOINTS = 2
# PBT: the most checkpoints that a trial keeps because another one may be about to continue from it.
MAX_PBT_CHECKPOINTS = 10


def report_interval(recipe: Recipe) -> int:
    """Returns the number of steps between two reports of a trial."""
    grace = recipe.sweep.grace if recipe.sweep else 1.0
    return recipe.validation.every or max(1, round(grace * recipe.steps))


def run(config: dict[str, Any], job: Job, dispatcher: Any) -> None:
    """Trains a trial in a run folder of its own, and reports to Tune.

    A trial resumes where it was stopped or paused. If Tune gives it the pointer of another trial
    (PBT), it continues from that trial's checkpoint, with its own settings.

    Args:
        config: The trial's hyperparameters: {"key.path": value}.
        job: The sweep's job.
        dispatcher: The handle of the worker pool's dispatcher.
    """
    if not job.verbose:
        connect.quieten()
    trial_id = str(tune.get_context().get_trial_id())
    pointer = _read_pointer(job.folder)
    recipe = _trial_recipe(job.recipe, config)
    check_point_model(recipe, config)  # before workers try to build it
    trials_folder = storage.join(job.folder, "trials")
    if pointer is None:
        folder = RunFolder(storage.join(trials_folder, trial_id))
    elif pointer["trial"] == trial_id:
        folder = RunFolder(pointer["folder"])
    else:
        folder = _start_from_other_trial(trials_folder, trial_id, pointer, recipe.hash())
    claim_folder(folder, recipe)
    descent = _descent_file(folder)
    parent_identity = (
        storage.read_json(descent, lambda tree: str(tree["recipe"]))
        if storage.exists(descent)
        else ""
    )
    sweep = job.recipe.sweep
    metric = sweep.metric if sweep else "train/loss"
    step = pointer["step"] if pointer else 0
    spec = TrialSpec(recipe, folder.root, parent_identity)
    for metrics in _train(dispatcher, trial_id, spec, metric, step):
        with tempfile.TemporaryDirectory() as temporary:
            new_pointer = {
                "trial": trial_id,
                "folder": folder.root,
                "step": metrics["step"],
                "checkpoint": metrics["checkpoint"],
            }
            with open(os.path.join(temporary, POINTER), "w", encoding="utf-8") as f:
                json.dump(new_pointer, f)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(temporary))
    storage.write(completed_file(job.folder, trial_id), "")


def completed_file(sweep: str, trial_id: str) -> str:
    """Returns the path of the file that marks a trial as trained to its end.

    Args:
        sweep: The sweep's folder.
        trial_id: The trial's id.
    """
    return storage.join(sweep, "trials", trial_id, "whole")


def moved(path: str, sweep: str) -> str:
    """Returns the path of a trial's folder or checkpoint where the sweep's folder is now.

    Args:
        path: Its path when it was written. Since then the sweep's folder may have been renamed or
            copied.
        sweep: The sweep's folder.
    """
    return storage.join(sweep, "trials", path.rpartition("/trials/")[2])


def _read_pointer(sweep: str) -> dict[str, Any] | None:
    """Returns the pointer that Tune gives to this trial; None for a new trial.

    Args:
        sweep: The sweep's folder.
    """
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with (
        checkpoint.as_directory() as folder,
        open(os.path.join(folder, POINTER), encoding="utf-8") as f,
    ):
        pointer: dict[str, Any] = json.load(f)
    paths = {key: pointer[key] for key in ("folder", "checkpoint") if pointer[key]}
    return pointer | {key: moved(path, sweep) for key, path in paths.items()}


def _trial_recipe(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    """Returns the recipe of a trial: the sweep's recipe with the trial's hyperparameters.

    It validates and saves a checkpoint at each report.
    """
    is_pbt = recipe.sweep is not None and recipe.sweep.scheduler == "pbt"
    interval = report_interval(recipe)
    donated = min(MAX_PBT_CHECKPOINTS, math.ceil(recipe.steps / interval)) if is_pbt else 0
    changes = {
        "validation.every": interval,
        "checkpoint.every": interval,
        "checkpoint.keep": max(MIN_CHECKPOINTS, recipe.checkpoint.keep, donated),
    }
    if is_pbt:  # a trial continues from the latest checkpoint of another one, not from its best
        changes["validation.keep_best"] = False
    return recipe.override({**config, **changes, "sweep": None})


def _descent_file(folder: RunFolder) -> str:
    """Returns the path of the file that names the checkpoint a trial started from (PBT)."""
    return storage.join(folder.root, "descent.json")


def _start_from_other_trial(
    trials_folder: str, trial_id: str, pointer: dict[str, Any], identity: str
) -> RunFolder:
    """Creates a new run folder for a trial, with the checkpoint of another trial in it (PBT).

    Args:
        trials_folder: The folder of all trials.
        trial_id: The id of the trial that needs the folder.
        pointer: The pointer to the other trial's checkpoint.
        identity: The identity of the run that starts from the checkpoint.
    """
    from sevenfold.engine.checkpoint import checkpoint_paths, copy_checkpoint

    used_names = {name for name in storage.listdir(trials_folder) if name.startswith(trial_id)}
    folder = RunFolder(storage.join(trials_folder, f"{trial_id}.{len(used_names)}"))
    source = pointer["checkpoint"]
    if not storage.exists(source):
        # The other trial has trained on since then and removed it: take its oldest checkpoint.
        paths = checkpoint_paths(RunFolder(pointer["folder"]).checkpoints)
        source = paths[min(paths)]
    adopted = copy_checkpoint(source, folder.checkpoints, identity)
    descent = {**pointer, "begins": adopted.path, "recipe": adopted.extra["recipe"]}
    storage.write(_descent_file(folder), json.dumps(descent))
    return folder


def _train(
    dispatcher: Any, trial_id: str, spec: TrialSpec, metric: str, step: int
) -> Iterator[dict[str, Any]]:
    """Trains a trial in the worker pool; yields its reports of the steps after `step`.

    Reports come first that an earlier process has written but that Tune has not received. Reports
    without the metric are left out, such as those without the loss of a step that is not logged.

    Args:
        dispatcher: The handle of the dispatcher.
        trial_id: The trial's id.
        spec: What to train.
        metric: The metric that the sweep compares trials by.
        step: The step of the last report that Tune has received.
    """
    folder = RunFolder(spec.folder)

    def report_events() -> Iterator[None]:
        """Yields once at the start, and then whenever there may be new reports."""
        yield
        if step < spec.recipe.steps:
            spec_since = replace(spec, since=step)
            yield from worker_pool.train_in_pool(dispatcher, trial_id, spec_since)

    for _ in report_events():
        for metrics in worker_group.read_reports(folder):
            if metrics["step"] <= step:
                continue
            step = metrics["step"]
            if metric in metrics:
                yield metrics
