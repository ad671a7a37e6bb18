"""Stop requests and preemption notices, and how they reach the workers of a run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sevenfold.cluster import ray_private
from sevenfold.engine.checkpoint import CheckpointManager
from sevenfold.engine.signals import Signal
from sevenfold.prepare.job import Job
from sevenfold.report.console import say

GRACE_SECONDS = 50  # for a stopped run to save; `ray job stop` kills the driver after a minute
MARGIN_SECONDS = 3.0  # the last save is to finish this long before a machine is lost


class StopSignal:
    """An actor that passes a stop request from a run's driver to its workers.

    The workers wait for it from their first step on. Before that they have nothing new to save,
    and may need another minute until they could save at all.
    """

    def __init__(self) -> None:
        self._requested = False
        self._waiting: asyncio.Future[Signal] | None = None  # of the workers of the latest start

    async def wait_for_request(self) -> Signal:
        """Returns STOP when the run has been asked to stop, or ABANDON when workers are restarted.

        The call of a worker that was lost would otherwise never return, and Ray runs a limited
        number of calls of an actor at a time.
        """
        await self.reset()
        if self._requested:
            return Signal.STOP
        self._waiting = asyncio.get_running_loop().create_future()
        return await self._waiting

    async def reset(self) -> None:
        """Tells earlier workers that others have taken their place; restarted workers call it."""
        self._answer(Signal.ABANDON)

    async def request(self) -> bool:
        """Asks the run to stop.

        Returns:
            Whether a worker is waiting for the request, so that the run will save and stop.
        """
        self._requested = True
        return self._answer(Signal.STOP)

    def _answer(self, signal: Signal) -> bool:
        """Lets the call that waits return; returns whether there is one."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.done():
            return False
        waiting.set_result(signal)
        return True


def start_stop_signal() -> Any:
    """Starts a StopSignal and returns the actor's handle.

    It runs on the driver's node: on another one it could be lost while the driver lives.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0, scheduling_strategy=here, max_concurrency=100)(StopSignal)
    return actor.remote()


def run_until_stopped(work: Callable[[], dict[str, Any]], stop_signal: Any) -> dict[str, Any]:
    """Runs a function in another thread, and asks its workers to save and stop on Ctrl-C.

    SIGTERM has the same effect as Ctrl-C. If the workers have not finished a step yet, or on a
    second Ctrl-C, the run ends immediately.

    Args:
        work: The function. Its result is returned, and its exceptions are raised here.
        stop_signal: The handle of the StopSignal that the function's workers wait for.

    Raises:
        KeyboardInterrupt: The run was interrupted, and did not stop by itself in time.
    """
    future: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result()
    except KeyboardInterrupt:
        if future.done() or not ray.get(stop_signal.request.remote()):
            raise
        say("Stop requested: saving the current step. Press Ctrl-C again to quit immediately.")
        wait([future], timeout=GRACE_SECONDS)
        if not future.done():
            raise
        return future.result()


class SignalReceiver:
    """Receives the requests to a run, on rank 0.

    A run can be asked to stop or to abandon a trial, and can be notified that a machine will be
    lost.

    Args:
        job: The run. Its `stop_signal` and `reporter` are checked for requests, if it has them.
        rank: This worker's rank; only rank 0 receives requests.
    """

    def __init__(self, job: Job, rank: int):
        self._job, self._rank = job, rank
        # a Ray object that becomes ready when the run is asked to stop; None before the first step
        self._request: Any = None
        self._stepped = False
        self._saves = 0  # number of saves that the current preemption notice has caused
        self._last_check = time.time()
        if job.stop_signal is not None and rank == 0:
            job.stop_signal.reset.remote()

    def receive(self, manager: CheckpointManager) -> Signal:
        """Returns the request that has arrived since the last step.

        Args:
            manager: The checkpoint manager, which knows how long a save takes.
        """
        if self._rank != 0:
            return Signal.NONE
        if self._job.stop_signal is not None and (signal := self._stop_request()):
            return signal
        if self._job.reporter is not None and (signal := self._job.reporter.signal()):
            return Signal(signal)
        return self._preemption(manager)

    def restart_clock(self) -> None:
        """Excludes the time since the last check from the measured duration of a step.

        It was spent waiting, for example for a save.
        """
        self._last_check = time.time()

    def _stop_request(self) -> Signal:
        """Returns what the run is asked to do.

        It starts to wait for a request in its second call, which is after the first step.
        """
        if self._request is None and self._stepped:
            self._request = self._job.stop_signal.wait_for_request.remote()
        self._stepped = True
        if self._request is None or not ray.wait([self._request], timeout=0)[0]:
            return Signal.NONE
        try:
            return Signal(ray.get(self._request))
        except RayActorError:  # the driver's machine is lost
            return Signal.STOP

    def _preemption(self, manager: CheckpointManager) -> Signal:
        """Returns SAVE when a machine of this run will be lost, and again just before it is.

        The first notice of a preemption causes a save at once. A second save is made as late as
        possible before the deadline: when another step and its save might not finish in time.
        """
        info = ray_private.preemption_info()
        now = time.time()
        step_seconds, self._last_check, earlier_saves = now - self._last_check, now, self._saves
        if info is None:
            self._saves = 0
            return Signal.NONE
        remaining = info.deadline_ms / 1000 - now if info.deadline_ms is not None else float("inf")
        is_last_chance = remaining < 2 * (step_seconds + manager.save_seconds) + MARGIN_SECONDS
        self._saves = max(earlier_saves, 2 if is_last_chance else 1)
        return Signal.SAVE if self._saves > earlier_saves else Signal.NONE
