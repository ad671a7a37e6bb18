"""One trial of a sweep, in a process of its own: a Ray Train run that tells Tune what it comes to."""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray.train
from ray import tune
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.util.queue import Empty, Queue

from sevenfold import storage
from sevenfold.recipe import Recipe
from sevenfold.runs import cluster, prepare, train
from sevenfold.runs.prepare import Job
from sevenfold.storage import RunFolder

POINTER = "trial.json"  # of what Tune keeps of a trial in place of a checkpoint: which run it is, and where that stands
KEPT = 2  # checkpoints: the reported one, and one not reported yet
DONATED = 10  # of pbt, where another trial may be about to go on from one


def every(recipe: Recipe) -> int:
    """Steps between two reports of a trial."""
    grace = recipe.search.grace if recipe.search else 1.0
    return recipe.validation.every or max(1, round(grace * recipe.steps))


def run(config: dict[str, Any], job: Job, address: str) -> None:
    """The recipe with a point put in, trained in a folder of its own. It goes on where it stopped or was paused; or, under new
    settings, from another trial's checkpoint, where Tune gives it that one (PBT)."""
    # Train's cleaner of placement groups asks "the" Ray of this host: with two of them it dies and a stopped trial's
    # workers keep their CPUs (ray#54305)
    os.environ["RAY_ADDRESS"] = address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    if not job.verbose:
        cluster.quieten()
    own = str(tune.get_context().get_trial_id())
    told = _pointer()
    recipe = _recipe(job.recipe, config)
    if told is None or told["trial"] == own:
        folder = RunFolder(told["folder"] if told else storage.join(job.folder, "trials", own))
    else:
        folder = _descended(storage.join(job.folder, "trials"), own, told)
    prepare.claim(folder, recipe)
    validation = job.validation.plan.manifest if job.validation and not recipe.data.held_out else None
    found = prepare.Inputs(job.train.plan.manifest, validation)
    stream, held = prepare.streams(recipe, found, job.tokenizer)
    mine = replace(
        job, recipe=recipe, identity=recipe.hash(), folder=folder.root, train=stream, validation=held, awaits_saves=True,
        descent=storage.read_json(_descent(folder))["recipe"] if storage.exists(_descent(folder)) else "",
    )  # fmt: skip
    step = told["step"] if told else 0
    search = job.recipe.search
    for metrics in _reports(mine, folder, step, search.metric if search else "train/loss"):
        with tempfile.TemporaryDirectory() as aside:
            pointer = {"trial": own, "folder": folder.root, "step": metrics["step"], "checkpoint": metrics["checkpoint"]}
            with open(os.path.join(aside, POINTER), "w", encoding="utf-8") as f:
                json.dump(pointer, f)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(aside))


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


def _descended(trials: str, own: str, told: dict[str, Any]) -> RunFolder:
    """A new folder of this trial that begins with another's checkpoint."""
    from sevenfold.engine import checkpoint as ckpt

    taken = {name for name in storage.listdir(trials) if name.startswith(own)}
    folder = RunFolder(storage.join(trials, f"{own}.{len(taken)}"))
    source = told["checkpoint"]
    if not storage.exists(source):  # the other trial has gone on, and removed it
        there = ckpt.steps(RunFolder(told["folder"]).checkpoints)
        source = there[min(there)]
    begun = ckpt.adopt(source, folder.checkpoints)
    storage.write(_descent(folder), json.dumps({**told, "begins": begun.path, "recipe": begun.extra["recipe"]}))
    return folder


def _reports(job: Job, folder: RunFolder, step: int, metric: str) -> Iterator[dict[str, Any]]:
    """What the run comes to after `step`: first what Tune was not told when it was stopped; then as it trains.

    What is yielded is on disk before.
    """
    path = storage.join(folder.root, "reports.json")
    known: list[dict[str, Any]] = storage.read_json(path) if storage.exists(path) else []
    yield from (m for m in known if m["step"] > step)
    step = max([step, *(m["step"] for m in known)])
    for metrics in _trained(job) if step < job.recipe.steps else ():
        if metrics["step"] <= step or metric not in metrics:  # told before it was stopped; a loss that was not logged then
            continue
        step = metrics["step"]
        number = math.ceil(step / job.recipe.validation.every) if job.recipe.validation.every else 1
        report = {**metrics, "report": number, "time": time.time()}
        known.append(report)
        storage.write(path, json.dumps(known))
        yield report


def _trained(job: Job) -> Iterator[dict[str, Any]]:
    """What rank 0 reports, while Ray Train trains beside. Raises as train.launch."""
    queue = Queue(actor_options={"num_cpus": 0})
    ended: list[BaseException | None] = []

    class Told(ray.train.UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            queue.put(metrics[0])

    def fit() -> None:
        try:
            train.launch(job, [Told()])
            ended.append(None)
        except BaseException as e:
            ended.append(e)

    threading.Thread(target=fit, daemon=True).start()
    while True:
        over = bool(ended)  # asked before the queue: what was reported is in it by then
        try:
            yield queue.get(timeout=0 if over else 0.5)
        except Empty:
            if over:
                break
    queue.shutdown(force=True)
    if ended[0] is not None:
        raise ended[0]
