"""The worker pool of a sweep: Ray Train runs whose workers train one trial after another.

A trial then starts with its first training step, and not with the start of processes, imports and
the setup of process groups. The pool consists of worker groups; each is one Ray Train run. Trials
ask the dispatcher for a worker group. The sweep's driver starts and stops the worker groups.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sevenfold import storage
from sevenfold.errors import RunError
from sevenfold.prepare.job import Job
from sevenfold.report.console import say
from sevenfold.run_folder import RunFolder
from sevenfold.sweep.dispatcher import Dispatcher, TrialSpec
from sevenfold.train import launch

POLL_SECONDS = 0.2  # between checks whether worker groups have to be started


def train_in_pool(dispatcher: Any, trial: str, spec: TrialSpec) -> Iterator[None]:
    """Trains a trial in the pool; yields after each of its reports, and once when it has ended.

    Args:
        dispatcher: The handle of the dispatcher.
        trial: The trial's id.
        spec: What to train.

    Raises:
        RunError: The trial ended before its last step.
    """
    number = ray.get(dispatcher.submit.remote(trial, spec))
    reports = 0
    while True:
        status = ray.get(dispatcher.wait_for_report.remote(number, reports))
        reports = status.reports
        yield
        if status.ended:
            break
    if status.error:
        raise RunError(status.error)


class WorkerPool:
    """The worker pool as the sweep's driver sees it: starts a worker group when a trial needs one.

    Attributes:
        dispatcher: The handle of the dispatcher.
    """

    def __init__(self, job: Job, capacity: Callable[[], int]):
        """Starts the dispatcher, and the thread that starts worker groups.

        Args:
            job: The sweep's job: what all trials share.
            capacity: Returns the number of worker groups that the cluster has room for.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0, scheduling_strategy=here, max_concurrency=1000)(
            Dispatcher
        )
        self.dispatcher = actor.remote(job.recipe.cluster.max_failures)
        self._job = job
        self._capacity = capacity
        self._stop = threading.Event()
        self._group_threads: list[threading.Thread] = []
        self._starter = threading.Thread(target=self._start_groups, daemon=True)
        self._starter.start()

    def _start_groups(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            for name in ray.get(self.dispatcher.add_groups.remote(self._capacity())):
                thread = threading.Thread(target=self._run_group, args=(name,), daemon=True)
                self._group_threads = [t for t in self._group_threads if t.is_alive()] + [thread]
                thread.start()

    def _run_group(self, name: str) -> None:
        """Runs a worker group to its end."""
        dispatcher = self.dispatcher
        folder = storage.join(RunFolder(self._job.folder).ray, "pool")
        error = ""

        def work(job: Job) -> dict[str, Any]:
            from sevenfold.sweep import worker_group

            return worker_group.train_trials(dispatcher, name, job)

        try:
            launch.launch(self._job, work, folder, name)
        except Exception as e:
            error = str(e) or type(e).__name__
        ray.get(dispatcher.group_ended.remote(name, error))
        storage.remove(storage.join(folder, name))

    def abandon(self, trials: Iterable[str]) -> None:
        """Stops the training of these trials, without saving them."""
        ray.get(self.dispatcher.abandon.remote(list(trials)))

    def workers(self) -> int:
        """Returns the number of workers that the pool has at the moment."""
        return int(ray.get(self.dispatcher.workers.remote()))

    def close(self, wait_seconds: float = 60) -> None:
        """Stops all worker groups: each saves the step that it has reached, and ends."""
        self._stop.set()
        self._starter.join()
        ray.get(self.dispatcher.close.remote())
        deadline = time.monotonic() + wait_seconds
        for thread in self._group_threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._group_threads):
            say(f"some workers of this sweep have not stopped within {wait_seconds:.0f} s")
        ray.kill(self.dispatcher)
