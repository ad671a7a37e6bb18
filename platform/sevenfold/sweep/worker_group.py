"""What the workers of a sweep's worker pool run: they train one trial after another."""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import replace
from typing import Any

import ray

from sevenfold import storage
from sevenfold.engine.signals import Signal
from sevenfold.prepare.job import Job
from sevenfold.recipe import Parallel, Recipe
from sevenfold.report import run_log
from sevenfold.run_folder import RunFolder
from sevenfold.sweep.dispatcher import AssignmentStart


class Reporter:
    """The connection of a trial's worker to the dispatcher: it sends reports and receives signals.

    Attributes:
        since: The step of the last report that the sweep had received when this trial started.
    """

    def __init__(self, dispatcher: Any, start: AssignmentStart, since: int):
        """Creates a reporter.

        Args:
            dispatcher: The handle of the dispatcher.
            start: The assignment's start that this worker belongs to.
            since: See the attribute.
        """
        self.since = since
        self._dispatcher = dispatcher
        self._start = start
        self._signal = dispatcher.wait_for_signal.remote(start.assignment, start.start)

    def signal(self) -> Signal:
        """Returns what the worker is asked to do."""
        return ray.get(self._signal) if ray.wait([self._signal], timeout=0)[0] else Signal.NONE

    def report(self, recipe: Recipe, folder: RunFolder, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step to the trial's reports.json and notifies the dispatcher.

        A step that reports.json already has is not added again.
        """
        reports = read_reports(folder)
        if not reports or reports[-1]["step"] < metrics["step"]:
            every = recipe.validation.every
            number = math.ceil(metrics["step"] / every) if every else 1
            reports.append({**metrics, "report": number, "time": time.time()})
            storage.write(_reports_file(folder), json.dumps(reports))
        ray.get(self._dispatcher.reported.remote(self._start.assignment))


def _reports_file(folder: RunFolder) -> str:
    return storage.join(folder.root, "reports.json")


def read_reports(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the reports of a trial, in the order of their steps.

    Each has the metrics and step, checkpoint, report (its number) and time (seconds since 1970).
    """
    return run_log.read_reports(_reports_file(folder))


def train_trials(dispatcher: Any, group: str, sweep_job: Job) -> dict[str, Any]:
    """Trains one trial after another. Each worker of a worker group runs this function.

    Args:
        dispatcher: The handle of the dispatcher.
        group: The name of the worker group.
        sweep_job: The sweep's job: what all trials share.

    Returns:
        An empty report: the trials' results are in their run folders.
    """
    import torch
    import torch.distributed as dist

    from sevenfold.train.worker import Worker

    is_first = dist.get_rank() == 0
    while True:
        message: list[Any] = [None]
        if is_first:
            message[0] = ray.get(dispatcher.next_assignment.remote(group, dist.get_world_size()))
        dist.broadcast_object_list(message)
        if message[0] is None:
            return {}
        start, spec = message[0]
        reporter = Reporter(dispatcher, start, spec.since)
        report = Worker(replace(spec.job(sweep_job), reporter=reporter)).run()
        if is_first:
            error = report.get("ended", "")
            ray.get(dispatcher.finished.remote(start.assignment, start.start, error))
        if sweep_job.recipe.parallel != Parallel():
            # The process groups of this trial's device meshes would stay until the process ends.
            return {}
        gc.collect()  # a sharded model has reference cycles
        # The next trial compiles its own model; graphs of earlier trials count towards the limit.
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
