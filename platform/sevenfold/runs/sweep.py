"""Sweeps: Ray Tune over trials, each a Ray Train run of one or more workers."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_placement_groups

from sevenfold import storage
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Recipe, Search, Space
from sevenfold.report import trials as report
from sevenfold.report.console import say
from sevenfold.runs import cluster, prepare, train
from sevenfold.runs.prepare import Job
from sevenfold.storage import RunFolder

# what a trial may have of its own; tokenizer, base model and documents are prepared once for all
SEARCHABLE = ("train.", "optimizer.", "schedule.", "adapter.", "model.config.", "data.sequence_length", "data.lanes", "seed")
DRIVER_CPUS = 0.25  # of a trial, beside its workers and data tasks: it waits most of the time


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
    say(f"{recipe.name}: {search.trials} trials of {job.recipe.steps} steps, {_concurrency(search, each)} at a time")
    trainable = tune.with_resources(
        tune.with_parameters(_trial, job=job, address=ray.get_runtime_context().gcs_address), {"CPU": DRIVER_CPUS}
    )
    under_way = storage.join(folder.ray, "tune")
    if tune.Tuner.can_restore(under_way):
        say(f"{folder.root}: under way; going on")
        tuner = tune.Tuner.restore(under_way, trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = _tuner(trainable, job, search, each, verbose)
    results = tuner.fit()
    _free_placement_groups()
    trials = ranked(results, search)
    if not any(t["score"] is not None for t in trials):
        raise RunError(f"{folder.root}: no trial came to a score: {trials[0]['error'] if trials else 'none was run'}")
    _write_trials(folder, trials)
    best = trials[0]
    storage.write(storage.join(folder.root, "best.yaml"), recipe.override({**best["config"], "search": None}).to_yaml())
    winner = replace(job, recipe=job.recipe.override(best["config"]))
    train.finish(winner, best["metrics"], time.time() - began)
    report.show(folder)
    return folder


def checked(recipe: Recipe) -> Search:
    """The recipe's search, every point of whose corners makes a valid recipe. Raises InputError else."""
    if recipe.search is None:
        raise InputError(f"{recipe.name}: expected a `search` section (space, trials), found none")
    for key, space in recipe.search.space.items():
        if not key.startswith(SEARCHABLE):
            raise InputError(f"search.space: {key!r} is the same for all trials; expected one of {', '.join(SEARCHABLE)}")
        for value in space.choice or list(space.uniform or space.loguniform or ()):
            recipe.override({key: value})
    if recipe.search.metric not in metrics_of(recipe):
        raise InputError(f"search.metric {recipe.search.metric!r}: this recipe reports {', '.join(metrics_of(recipe))}")
    return recipe.search


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


def _tuner(trainable: Any, job: Job, search: Search, each: dict[str, float], verbose: bool) -> tune.Tuner:
    steps = job.recipe.steps
    scheduler: TrialScheduler = FIFOScheduler()
    if search.scheduler == "asha":
        grace = max(1, round(search.grace * steps))
        scheduler = ASHAScheduler(time_attr="step", max_t=steps, grace_period=grace, reduction_factor=search.eta)
    return tune.Tuner(
        trainable,
        param_space={key: _domain(space) for key, space in search.space.items()},
        tune_config=tune.TuneConfig(
            metric=search.metric, mode=search.mode, num_samples=search.trials, scheduler=scheduler,
            search_alg=BasicVariantGenerator(max_concurrent=_concurrency(search, each), random_state=job.recipe.seed),
            trial_dirname_creator=lambda t: t.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=RunFolder(job.folder).ray, verbose=2 if verbose else 0, callbacks=[_Lines(search)],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )  # fmt: skip


def _trial(config: dict[str, Any], job: Job, address: str) -> None:
    """One trial: the recipe with this point put in, trained in a folder of its own."""
    # Train's cleaner of placement groups asks "the" Ray of this host: with two of them it dies and a stopped trial's
    # workers keep their CPUs (ray#54305)
    os.environ["RAY_ADDRESS"] = address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    if not job.verbose:
        cluster.quieten()
    trial_id = tune.get_context().get_trial_id()
    every = max(1, round(job.recipe.search.grace * job.recipe.steps)) if job.recipe.search else job.recipe.steps
    every = job.recipe.validation.every or every
    keep = max(2, job.recipe.checkpoint.keep)  # the reported one, and one that a stopped trial had not reported yet
    recipe = job.recipe.override(
        {**config, "validation.every": every, "checkpoint.every": every, "checkpoint.keep": keep, "search": None}
    )
    folder = RunFolder(storage.join(job.folder, "trials", str(trial_id)))
    prepare.claim(folder, recipe)
    validation = job.validation.plan.manifest if job.validation and not recipe.data.held_out else None
    found = prepare.Inputs(job.train.plan.manifest, validation)
    stream, held = prepare.streams(recipe, found, job.tokenizer)
    mine = replace(
        job, recipe=recipe, identity=recipe.hash(), folder=folder.root, train=stream, validation=held, awaits_saves=True
    )
    train.launch(mine, [TuneReportCallback()])


def _domain(space: Space) -> Any:
    if space.uniform:
        return tune.uniform(*space.uniform)
    if space.loguniform:
        return tune.loguniform(*space.loguniform)
    return tune.choice(space.choice or [])


def _concurrency(search: Search, each: dict[str, float]) -> int:
    """As many trials as the cluster holds with all that a trial takes: driver, workers and data tasks."""
    total = ray.cluster_resources()
    holds = min(int(total.get(k, 0) // v) for k, v in each.items() if v)
    return max(1, min(search.trials, holds, search.max_concurrent or holds))


class _Lines(tune.Callback):
    """A line for each score and each end of a trial."""

    def __init__(self, search: Search):
        self._search, self._seen = search, 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._seen = max(self._seen, len(trials))
        say(f"trial {trial.trial_id} ({self._seen}/{self._search.trials}): {_point(trial.config)}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        shown = {k.removeprefix("validation/"): v for k, v in result.items() if k.startswith("validation/")}
        say(f"trial {trial.trial_id}: step {result.get('step')}  " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(f"trial {trial.trial_id}: failed")


def _point(config: dict[str, Any]) -> str:
    return "  ".join(f"{k.split('.')[-1]}={f'{v:.3g}' if isinstance(v, float) else v}" for k, v in config.items())


def ranked(results: Any, search: Search) -> list[dict[str, Any]]:
    """The trials, best first: trial (its id), config, step, score (None where it is not finite), metrics, error."""
    out = []
    for result in results:
        last = result.metrics or {}
        metrics = {k: v for k, v in last.items() if "/" in k and not k.startswith("config/")}
        step = last.get("step")
        metrics |= {"checkpoint": last.get("checkpoint"), "step": step}
        score = metrics.get(search.metric)
        out.append(
            {
                "trial": last.get("trial_id"), "config": result.config, "step": step,
                "score": score if score is not None and math.isfinite(score) else None, "metrics": metrics,
                "error": str(result.error).splitlines()[-1] if result.error else None,
            }
        )  # fmt: skip
    sign = 1 if search.mode == "min" else -1
    return sorted(out, key=lambda t: (t["score"] is None, sign * (t["score"] or 0)))


def _write_trials(folder: RunFolder, trials: list[dict[str, Any]]) -> None:
    storage.write(folder.trials, json.dumps(trials, indent=1))
    text = io.StringIO()
    keys = sorted({k for t in trials for k in t["metrics"]})
    writer = csv.writer(text)
    writer.writerow(["trial", *trials[0]["config"], "step", *keys])
    for t in trials:
        writer.writerow([t["trial"], *t["config"].values(), t["step"], *[t["metrics"].get(k) for k in keys]])
    storage.write(storage.join(folder.root, "trials.csv"), text.getvalue())


def _free_placement_groups(wait_seconds: float = 30) -> None:
    """Waits until the trials' workers are gone; frees, and names, what a stopped trial left behind."""
    context = ray.get_runtime_context()
    ours = [("creator_job_id", "=", context.get_job_id()), ("state", "!=", "REMOVED")]
    deadline = time.monotonic() + wait_seconds
    while left := list_placement_groups(address=context.gcs_address, filters=ours):
        if time.monotonic() > deadline:
            for group in left:
                say(f"freeing placement group {group.placement_group_id}, which a stopped trial left behind")
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group.placement_group_id))))
            return
        time.sleep(0.5)
