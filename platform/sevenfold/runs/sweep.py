"""Sweeps: Ray Tune over trials, each a Ray Train run of one or more workers."""

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
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.exception import RayStateApiException

from sevenfold import storage
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Recipe, Search
from sevenfold.report import page
from sevenfold.report import trials as report
from sevenfold.report.console import say
from sevenfold.runs import cluster, prepare, schedule, train, trial
from sevenfold.runs.lease import Lease
from sevenfold.runs.prepare import Job
from sevenfold.runs.schedule import Gate
from sevenfold.runs.seats import Seats
from sevenfold.runs.suggest import Points
from sevenfold.runs.watch import Budget, Watch
from sevenfold.storage import RunFolder

# what a trial may have of its own; tokenizer, base model and documents are prepared once for all
SEARCHABLE = (
    "train.", "optimizer.", "schedule.", "adapter.", "model.config.", "data.sequence_length", "data.lanes", "seed",
    "preference.", "contrastive.", "corruption.",
)  # fmt: skip
DRIVER_CPUS = 0.25  # of a trial, beside its workers and data tasks: it waits most of the time
LOOK = 5.0  # seconds between looks at what the cluster holds
SNAPSHOT = "1"  # seconds between Tune's own snapshots of a sweep, at least
TUNE = "tune"  # folder of these
SPENT = "spent.json"


def sweep_folder(recipe: Recipe) -> RunFolder:
    """Beside the folder that the recipe's own run would have."""
    return RunFolder(storage.join(storage.place(recipe.storage), f"{recipe.name}-sweep"))


def run(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """Searches what the recipe's `search` names; ends with the best trial's Hugging Face directory and a ranking.

    Raises:
        InputError: no `search`, a space that names no field or a value that does not fit; and as train.run.
        RunError: no trial came to a score.
    """
    search = checked(recipe)
    folder = sweep_folder(recipe)
    began = time.time()
    each = prepare.needs(recipe)
    each["CPU"] += DRIVER_CPUS
    job = prepare.begin(recipe, folder, each, f"one trial of {recipe.name}", verbose)
    if job is None:
        report.show(folder)
        return folder
    fewest = job.recipe.workers[0]  # a sweep widens by trials
    job = replace(job, recipe=job.recipe.override({"cluster.num_workers": fewest}))
    with contextlib.closing(Lease(folder)) as lease:
        try:
            trials = _searched(job, search, each, lease, verbose)
        finally:
            left = _freed()
        if left is not None and not left:
            say(f"{len(trials)} trials ended; none left a placement group or a process")
        _finish(job, recipe, trials, time.time() - began)
        report.show(folder)
    return folder


def _finish(job: Job, recipe: Recipe, trials: list[dict[str, Any]], seconds: float) -> None:
    """Writes what a sweep leaves; the summary, which says that it is finished, last."""
    folder, search = RunFolder(job.folder), checked(recipe)
    if not any(t["score"] is not None for t in trials):
        storage.remove(storage.join(folder.ray, TUNE))  # resubmitted, it begins anew
        why = next((t["error"] for t in trials if t["error"]), "it ended before one was validated")
        raise RunError(f"{folder.root}: no trial came to a score: {why}")
    report.write(folder, trials)
    best = trials[0]
    storage.write(storage.join(folder.root, "best.yaml"), recipe.override({**best["config"], "search": None}).to_yaml())
    page.write(folder, search)
    train.finish(replace(job, recipe=job.recipe.override(best["config"])), best["metrics"], seconds)


def _searched(job: Job, search: Search, each: dict[str, float], lease: Lease, verbose: bool) -> list[dict[str, Any]]:
    """The trials, ranked."""
    recipe = job.recipe
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", SNAPSHOT)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would end the sweep as if that were all
    # Train's cleaner of placement groups asks "the" Ray of this host: with two of them it dies (ray#54305)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    # Tune hands its trials the driver's AWS keys by their runtime environment (2.60), which logs and the dashboard show
    class_cache.ENV_VARS_TO_PROPAGATE -= {n for n in class_cache.ENV_VARS_TO_PROPAGATE if n.startswith("AWS_")}
    capacity = _capacity(search, each, recipe.workers[0])
    gate = Gate(capacity)
    reports = math.ceil(recipe.steps / trial.every(recipe))
    scheduler = schedule.scheduler(search, recipe.steps, reports, recipe.seed, gate)
    under_way = RunFolder(job.folder).ray
    goes_on = any(n.startswith("experiment_state") for n in storage.listdir(storage.join(under_way, TUNE)))
    if goes_on:
        say(f"{job.folder}: under way; going on")
    say(f"{recipe.name}: {search.number} trials of {recipe.steps} steps, {gate.room()} at a time")
    seats = Seats(job, capacity)
    watch = Watch(search, scheduler, gate, seats, lease, goes_on)
    trainable = tune.with_resources(tune.with_parameters(trial.run, job=job, desk=seats.desk), {"CPU": DRIVER_CPUS})
    room = (lambda: 1) if search.scheduler == "pbt" else gate.room  # a population is there from the beginning
    try:
        made = tune.run(
            trainable, name=TUNE, storage_path=under_way, resume=goes_on, metric=search.metric, mode=search.best,
            num_samples=search.number, search_alg=Points(search, recipe.seed, room), scheduler=scheduler, stop=Budget(watch),
            max_failures=search.max_failures, raise_on_failed_trial=False, callbacks=[watch], reuse_actors=True,
            trial_dirname_creator=lambda t: t.trial_id, verbose=2 if verbose else 0,
        )  # fmt: skip
    finally:
        watch.close()
        seats.close()
    spent = {"worker_hours": watch.worker_hours, "hours": watch.hours, "trials": len(made.trials)}
    storage.write(storage.join(job.folder, SPENT), json.dumps(spent))
    say(f"spent {watch.worker_hours:.3g} worker hours in {watch.hours:.3g} hours")
    if not watch.spent() and (len(made.trials) < search.number or not all(t.is_finished() for t in made.trials)):
        raise RunError(f"{job.folder}: it was ended before its trials were; the same command goes on")
    return ranked(made.trials, job, search)


def checked(recipe: Recipe) -> Search:
    """The recipe's search, every point of whose corners makes a valid recipe. Raises InputError else."""
    if recipe.search is None:
        raise InputError(f"{recipe.name}: expected a `search` section (space, trials), found none")
    for key, space in recipe.search.space.items():
        if not key.startswith(SEARCHABLE) or key in ("train.steps", "train.tokens"):  # by which trials are compared
            raise InputError(f"search.space: {key!r} is the same for all trials; expected one of {', '.join(SEARCHABLE)}")
        given = {k: v[0] if isinstance(v, list) else v for k, v in space.when.items()}
        for value in space.samples:
            recipe.override({**given, key: value})
    if recipe.search.metric not in metrics_of(recipe):
        raise InputError(f"search.metric {recipe.search.metric!r}: this recipe reports {', '.join(metrics_of(recipe))}")
    search = recipe.search
    if recipe.steps and search.scheduler != "none" and trial.every(recipe) >= recipe.steps:
        raise InputError(
            f"search.scheduler {search.scheduler}: it needs reports on the way, and of {recipe.steps} steps each "
            f"{trial.every(recipe)}th is validated: lower validation.every, or search.scheduler=none"
        )
    return search


def metrics_of(recipe: Recipe) -> list[str]:
    """What a run of this recipe reports at each validation."""
    out = ["train/loss"]
    if recipe.data.validation or recipe.data.held_out:
        out += ["validation/loss"]
        if recipe.objective in ("causal", "sft"):
            out += ["validation/bits_per_byte"]
        if recipe.objective in ("dpo", "classify", "embed"):
            out += ["validation/accuracy"]
        if recipe.objective == "classify":
            out += ["validation/f1_macro"]
        if recipe.objective in ("sft", "seq2seq") and recipe.validation.generate:
            out += [f"validation/{m}" for m in ("rouge1", "rouge2", "rougeL", "bleu", "chrf")]
    return out


def _capacity(search: Search, each: dict[str, float], workers: int) -> Callable[[], int]:
    """How many trials the cluster holds, or can scale to hold, with all that each takes: driver, workers and data tasks."""
    seen: list[tuple[float, int]] = []

    def holds() -> int:
        if not seen or time.monotonic() - seen[-1][0] > LOOK:
            most = cluster.room({k: v / workers for k, v in each.items()}, workers)
            seen[:] = [(time.monotonic(), max(1, min(search.number, most, search.max_concurrent or most)))]
        return seen[-1][1]

    return holds


def ranked(trials: Sequence[Trial], job: Job, search: Search) -> list[dict[str, Any]]:
    """The trials, best first, those that failed last: trial (its id), config, step, status (finished, stopped early or failed),
    score (None where it is not finite), metrics, error."""
    out = []
    for each in trials:
        last = each.last_result or {}
        metrics = {k: v for k, v in last.items() if "/" in k and not k.startswith("config/")}
        metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}  # no JSON else
        metrics |= {"checkpoint": last.get("checkpoint"), "step": last.get("step")}
        score = metrics.get(search.metric)
        out.append(
            {
                "trial": each.trial_id, "config": dict(each.config), "step": last.get("step"),
                "score": score, "metrics": metrics, "status": _status(each, job),
                "error": report.reason(each.get_error()) if each.status == Trial.ERROR else None,
            }
        )  # fmt: skip
    sign = 1 if search.best == "min" else -1
    return sorted(out, key=lambda t: (t["score"] is None, t["status"] == "failed", sign * (t["score"] or 0), t["trial"]))


def _status(found: Trial, job: Job) -> str:
    if found.status == Trial.ERROR:
        return "failed"
    steps = (found.last_result or {}).get("step") or 0  # a run may come to its end before its last step
    whole = steps >= job.recipe.steps or storage.exists(trial.whole(job.folder, found.trial_id))
    return "finished" if whole else "stopped early"


def _freed() -> list[str] | None:
    """As _free, and says so; None where the cluster could not be asked."""
    try:
        left = _free()
    except RayStateApiException as e:
        say(f"whether stopped trials left anything behind could not be asked: {str(e).splitlines()[0]}")
        return None
    for what in left:
        say(f"freed what a stopped trial left behind: {what}")
    return left


def _free(wait_seconds: float = 30) -> list[str]:
    """Waits until the trials' workers are gone; frees, and names, what stopped trials left behind: placement groups, and the
    processes of actors."""
    context = ray.get_runtime_context()
    address, mine = context.gcs_address, context.get_job_id()
    deadline = time.monotonic() + wait_seconds
    while True:
        groups = list_placement_groups(address=address, filters=[("creator_job_id", "=", mine), ("state", "!=", "REMOVED")])
        found = list_actors(address=address, filters=[("job_id", "=", mine), ("state", "!=", "DEAD")], detail=True)
        actors = [a for a in found if not a.is_detached]  # those are Ray's own
        if not groups and not actors:
            return []
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for group in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group.placement_group_id))))
    return [f"placement group {g.placement_group_id}" for g in groups] + [f"{a.class_name} (process {a.pid})" for a in actors]
