"""Hyperparameter sweeps: Ray Tune schedules the trials; Ray Train workers train them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from sevenfold import storage
from sevenfold.cluster import ray_private
from sevenfold.cluster.capacity import gang_capacity
from sevenfold.cluster.lease import Lease
from sevenfold.engine.checkpoint import remove_checkpoints
from sevenfold.errors import InputError, RunError, cause_of
from sevenfold.prepare.job import Job, prepare_job, required_resources
from sevenfold.prepare.splits import with_splits
from sevenfold.recipe import Recipe, Sweep
from sevenfold.report import html, ranking
from sevenfold.report.console import say
from sevenfold.run_folder import RunFolder
from sevenfold.sweep import schedulers, snapshot, trial
from sevenfold.sweep.callback import BudgetStopper, SweepCallback
from sevenfold.sweep.leftovers import release_leftovers
from sevenfold.sweep.schedulers import TrialLimit
from sevenfold.sweep.searcher import Searcher
from sevenfold.sweep.space_check import check_space
from sevenfold.sweep.worker_pool import WorkerPool
from sevenfold.train import launch
from sevenfold.train.messages import pluralize

# Logical CPUs of a trial's driver, in addition to its workers and data tasks: it mostly waits.
DRIVER_CPUS = 0.25
CAPACITY_SECONDS = 5.0  # between two measurements of the cluster's capacity
SNAPSHOT_SECONDS = "1"  # the least time between Tune's own snapshots of a sweep
SPENT = "spent.json"  # the file with the worker hours, hours and trials of a sweep


def sweep_folder(recipe: Recipe) -> RunFolder:
    """Returns the folder of a recipe's sweep, beside the one that the recipe's own run has."""
    return RunFolder(storage.join(storage.resolve_output(recipe.storage), f"{recipe.name}-sweep"))


def run(recipe: Recipe, verbose: bool = False, trust_state: bool = False) -> RunFolder:
    """Runs the sweep of a recipe, or resumes it.

    It ends with a ranking of the trials and the best trial's model as a Hugging Face directory.

    Args:
        recipe: A recipe with a `sweep` section.
        verbose: Shows Ray's own logs.
        trust_state: Resumes a sweep even if its state was not saved with the user's key. That state
            can run code.

    Returns:
        The sweep's folder.

    Raises:
        InputError: The recipe has no `sweep` section, its search space has an unknown key or a
            value that is not valid, the state of the sweep was saved by somebody else, or anything
            that `launch.run` refuses.
        RunError: The sweep was stopped early, or no trial reported a finite value of the metric.
    """
    recipe = with_splits(recipe)
    sweep = checked(recipe)
    folder = sweep_folder(recipe)
    snapshot.load(folder.root, trusted=trust_state)  # raises InputError before anything starts
    start = time.time()
    need = required_resources(recipe)  # of one trial
    need["CPU"] += DRIVER_CPUS
    job = prepare_job(recipe, folder, need, f"one trial of {recipe.name}", verbose)
    if job is None:
        ranking.show(folder)
        return folder
    # The least number of workers for each trial: on a larger cluster, more trials run at a time.
    num_workers = job.recipe.workers[0]
    job = replace(job, recipe=job.recipe.override({"cluster.num_workers": num_workers}))
    with contextlib.closing(Lease(folder)) as lease:
        try:
            trials = _search(job, sweep, need, lease, verbose, trust_state)
        finally:
            leftovers = release_leftovers()
        if leftovers is not None and not leftovers:
            say(f"{pluralize(len(trials), 'trial')} finished; all resources released")
        _finish(job, recipe, sweep, trials, time.time() - start)
        ranking.show(folder)
    return folder


def checked(recipe: Recipe) -> Sweep:
    """Returns the recipe's sweep after a check that its trials can be trained.

    Raises:
        InputError: There is no `sweep` section, or something in it cannot be used.
    """
    sweep = recipe.sweep
    if sweep is None:
        raise InputError(
            f"{recipe.name}: the recipe has no `sweep` section: add one with `space` and `trials`"
        )
    metrics = reported_metrics(recipe)
    if sweep.metric not in metrics:
        raise InputError(
            f"sweep.metric {sweep.metric!r} is unknown: this recipe reports {', '.join(metrics)}"
        )
    interval = trial.report_interval(recipe)
    if recipe.steps and sweep.scheduler != "none" and interval >= recipe.steps:
        raise InputError(
            f"sweep.scheduler {sweep.scheduler} needs validations before the last step, but with "
            f"{recipe.steps} steps there is one every {interval}: lower validation.every, or set "
            "sweep.scheduler=none"
        )
    check_space(recipe, sweep)
    return sweep


def reported_metrics(recipe: Recipe) -> list[str]:
    """Returns the names of the metrics that a run of this recipe reports at each validation."""
    names = ["train/loss"]
    if not (recipe.data.validation or recipe.data.held_out):
        return names
    names += ["validation/loss"]
    if recipe.objective in ("causal", "sft"):
        names += ["validation/bits_per_byte"]
    if recipe.objective in ("dpo", "classify", "embed"):
        names += ["validation/accuracy"]
    if recipe.objective == "classify":
        names += ["validation/f1_macro"]
    if recipe.objective in ("sft", "seq2seq") and recipe.validation.generate:
        names += [f"validation/{m}" for m in ("rouge1", "rouge2", "rougeL", "bleu", "chrf")]
    return names


def _search(
    job: Job,
    sweep: Sweep,
    need: dict[str, float],
    lease: Lease,
    verbose: bool,
    trust_state: bool,
) -> list[dict[str, Any]]:
    """Runs the trials of a sweep, or resumes them.

    Args:
        job: The prepared sweep.
        sweep: Its settings.
        need: The resources of one trial.
        lease: This driver's lease on the sweep's folder.
        verbose: Shows Tune's status table.
        trust_state: As in `run`.

    Returns:
        The trials as `ranked` returns them.

    Raises:
        InputError: The state of the sweep was saved by somebody else.
        RunError: The sweep was stopped before its trials were finished or its budget was used up.
    """
    recipe = job.recipe
    _set_up_ray_environment()
    capacity = _capacity(sweep, need, recipe.workers[0])
    limit = TrialLimit(capacity)
    reports = math.ceil(recipe.steps / trial.report_interval(recipe))
    scheduler = schedulers.build_scheduler(sweep, recipe.steps, reports, recipe.seed, limit)
    saved = snapshot.load(job.folder, trusted=trust_state)
    if saved is not None:
        say(f"{job.folder}: resuming the sweep")
    say(f"{recipe.name}: {sweep.number} trials of {recipe.steps} steps, {limit.room()} at a time")
    if sweep.points is not None and sweep.points < sweep.number:
        say(
            f"sweep.space has only {sweep.points} points, so that some trials are the same: "
            "sweep.algorithm=grid tries each once"
        )
    pool = WorkerPool(job, capacity)
    callback = SweepCallback(sweep, scheduler, limit, pool, lease, job.folder, saved)
    try:
        trials = _run_tune(job, sweep, scheduler, limit, callback, pool, saved, verbose)
    finally:
        callback.close()
        pool.close()
    if callback.idle:
        say(f"{job.folder}: all trials had ended: only the results were not written yet")
    _record_spent(job, callback, len(trials))
    complete = len(trials) >= sweep.number and all(t.is_finished() for t in trials)
    if not complete and not callback.exhausted_budget():
        raise RunError(
            f"{job.folder}: the sweep stopped before all trials finished; run the same command to "
            "resume"
        )
    return ranked(trials, job, sweep)


def _set_up_ray_environment() -> None:
    """Sets environment variables for Ray Tune and Ray Train, and keeps AWS keys from the trials."""
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", SNAPSHOT_SECONDS)
    # Tune's own handler would end the sweep at Ctrl-C as if it were complete.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Train's cleaner of placement groups looks for the only Ray cluster of this host. If there are
    # two, it fails (ray#54305).
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ray_private.propagate_to_train("RAY_ADDRESS")
    ray_private.keep_aws_keys_from_trials()


def _run_tune(
    job: Job,
    sweep: Sweep,
    scheduler: TrialScheduler,
    limit: TrialLimit,
    callback: SweepCallback,
    pool: WorkerPool,
    saved: dict[str, bytes] | None,
    verbose: bool,
) -> list[Trial]:
    """Runs Ray Tune to the end of the sweep. Returns its trials."""
    stopper = BudgetStopper(callback)  # before the saved state, which refers to it, is read
    if saved:
        snapshot.restore(job.folder, saved)
    trainable = tune.with_parameters(trial.run, job=job, dispatcher=pool.dispatcher)
    # PBT needs the whole population from the beginning: trials without room wait.
    room = (lambda: 1) if sweep.scheduler == "pbt" else limit.room
    analysis = tune.run(
        tune.with_resources(trainable, {"CPU": DRIVER_CPUS}),
        name=snapshot.TUNE,
        storage_path=RunFolder(job.folder).ray,
        resume=saved is not None,
        metric=sweep.metric,
        mode=sweep.best,
        num_samples=sweep.number,
        search_alg=Searcher(sweep, job.recipe.seed, room),
        scheduler=scheduler,
        stop=stopper,
        max_failures=sweep.max_failures,
        raise_on_failed_trial=False,
        callbacks=[callback],
        reuse_actors=True,
        trial_dirname_creator=lambda t: t.trial_id,
        verbose=2 if verbose else 0,
    )
    return list(analysis.trials)


def _record_spent(job: Job, callback: SweepCallback, trials: int) -> None:
    """Writes and prints what the sweep has used so far, in earlier processes too."""
    spent = {"worker_hours": callback.worker_hours, "hours": callback.hours, "trials": trials}
    storage.write(storage.join(job.folder, SPENT), json.dumps(spent))
    if callback.hours < 1:
        used = f"{3600 * callback.worker_hours:,.0f} worker-seconds"
        elapsed = f"{3600 * callback.hours:,.0f} s"
    else:
        used = f"{callback.worker_hours:,.1f} worker-hours"
        elapsed = f"{callback.hours:,.1f} h"
    say(f"used {used} in {elapsed}")


def _capacity(sweep: Sweep, need: dict[str, float], num_workers: int) -> Callable[[], int]:
    """Returns a function that returns the number of trials that may run at a time.

    That is what the cluster has room for, or can scale to, within the sweep's own limits. It is
    measured at most every CAPACITY_SECONDS.

    Args:
        sweep: The sweep's settings.
        need: The resources of one trial: its driver, its workers and their data tasks.
        num_workers: The number of workers of one trial.
    """
    per_worker = {resource: amount / num_workers for resource, amount in need.items()}
    measured: tuple[float, int] | None = None  # when, and the result

    def capacity() -> int:
        nonlocal measured
        if measured is None or time.monotonic() - measured[0] > CAPACITY_SECONDS:
            available = gang_capacity(per_worker, num_workers)
            count = max(1, min(sweep.number, available, sweep.max_concurrent or available))
            measured = (time.monotonic(), count)
        return measured[1]

    return capacity


def ranked(trials: Sequence[Trial], job: Job, sweep: Sweep) -> list[dict[str, Any]]:
    """Ranks the trials of a sweep.

    Returns:
        A dictionary for each trial, best first: its id (`trial`), config, step, status (finished,
        stopped early or failed), score (None if it is missing or not finite), metrics and error.
        Trials without a score come last; before them come failed trials that had reported one.
    """
    records = [_record(t, job, sweep) for t in trials]
    sign = 1 if sweep.best == "min" else -1
    return sorted(
        records,
        key=lambda record: (
            record["score"] is None,
            record["status"] == "failed",
            sign * (record["score"] or 0),
            record["trial"],
        ),
    )


def _record(tune_trial: Trial, job: Job, sweep: Sweep) -> dict[str, Any]:
    """Returns the dictionary of a trial; see `ranked`."""
    last = tune_trial.last_result or {}
    metrics: dict[str, Any] = {}
    for name, value in last.items():
        if "/" in name and not name.startswith("config/"):
            is_finite = not isinstance(value, float) or math.isfinite(value)
            metrics[name] = value if is_finite else None  # JSON has no NaN
    path = last.get("checkpoint")
    checkpoint = trial.moved(path, job.folder) if path else None
    metrics |= {"checkpoint": checkpoint, "step": last.get("step")}
    failed = tune_trial.status == Trial.ERROR
    return {
        "trial": tune_trial.trial_id,
        "config": dict(tune_trial.config),
        "step": last.get("step"),
        "score": metrics.get(sweep.metric),
        "metrics": metrics,
        "status": _status(tune_trial, job),
        "error": cause_of(tune_trial.get_error()) if failed else None,
    }


def _status(tune_trial: Trial, job: Job) -> str:
    if tune_trial.status == Trial.ERROR:
        return "failed"
    step = (tune_trial.last_result or {}).get("step") or 0
    # A run may end before its last step by itself, as its data or its patience is exhausted.
    completed = step >= job.recipe.steps or storage.exists(
        trial.completed_file(job.folder, tune_trial.trial_id)
    )
    return "finished" if completed else "stopped early"


def _finish(
    job: Job, recipe: Recipe, sweep: Sweep, trials: list[dict[str, Any]], seconds: float
) -> None:
    """Writes the results of a sweep; the summary, which marks the sweep as finished, comes last.

    Args:
        job: The prepared sweep.
        recipe: Its recipe as the user wrote it; `best.yaml` is made of it.
        sweep: The sweep's settings.
        trials: The ranked trials.
        seconds: How long this process has worked on the sweep.

    Raises:
        RunError: No trial reported a finite value of the metric.
    """
    folder = RunFolder(job.folder)
    if not any(t["score"] is not None for t in trials):
        # Without its saved state the same command starts the sweep anew.
        snapshot.remove(folder.root)
        errors = (t["error"] for t in trials if t["error"])
        reason = next(errors, "the sweep ended before the first validation")
        raise RunError(
            f"{folder.root}: no trial reported a finite value of {sweep.metric}: {reason}"
        )
    ranking.write(folder, trials)
    best = trials[0]
    best_recipe = recipe.override({**best["config"], "sweep": None})
    storage.write(storage.join(folder.root, "best.yaml"), best_recipe.to_yaml())
    html.write(folder, sweep)
    _remove_checkpoints(folder, [t["trial"] for t in trials[sweep.keep :]])
    best_job = replace(job, recipe=job.recipe.override(best["config"]))
    launch.finish(best_job, best["metrics"], seconds)


def _remove_checkpoints(folder: RunFolder, trials: Sequence[str]) -> None:
    """Removes the checkpoints of trials that a finished sweep does not need.

    Args:
        folder: The sweep's folder.
        trials: The ids of the trials. PBT adds a number to the names of some of their folders.
    """
    root = storage.join(folder.root, "trials")
    for name in storage.listdir(root):
        if name.partition(".")[0] in trials:
            remove_checkpoints(RunFolder(storage.join(root, name)).checkpoints)
