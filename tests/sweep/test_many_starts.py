"""Actors that wait for something answer however often workers have started and trials have ended.

Ray runs a limited number of calls of an actor at a time: a call that never returns takes one of
these places for good. The tests go past the actors' limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from sevenfold.engine.signals import Signal
from sevenfold.sweep.dispatcher import Dispatcher, TrialSpec
from sevenfold.train.signals import start_stop_signal

STARTS = 150  # of workers; the StopSignal has room for 100 calls
PAIRS = 1100  # of a trial and a worker; the Dispatcher has room for 1,000 calls
SECONDS = 60


@pytest.fixture(autouse=True)
def connected(on_shared_ray: None) -> Iterator[None]:
    ray.init(logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def test_a_run_answers_ctrl_c_after_many_starts_of_its_workers() -> None:
    signal = start_stop_signal()
    assert not ray.get(signal.request.remote(), timeout=SECONDS)  # no worker has made a step
    signal = start_stop_signal()
    waits = [signal.wait_for_request.remote() for _ in range(STARTS)]
    earlier, (latest,) = ray.wait(waits, num_returns=STARTS - 1, timeout=SECONDS)
    assert ray.get(earlier) == [Signal.ABANDON] * (STARTS - 1)
    assert ray.get(signal.request.remote(), timeout=SECONDS)
    assert ray.get(latest, timeout=SECONDS) == Signal.STOP
    assert ray.get(signal.wait_for_request.remote(), timeout=SECONDS) == Signal.STOP


def spec() -> TrialSpec:
    return TrialSpec(SimpleNamespace(), "folder")  # type: ignore[arg-type]


def test_a_sweep_goes_on_after_a_thousand_ended_trials() -> None:
    actor: Any = ray.remote(num_cpus=0, max_concurrency=1000)(Dispatcher)
    dispatcher = actor.remote(1)
    waits = []
    (group,) = [*ray.get(added(dispatcher), timeout=SECONDS)]
    number = 0
    for _ in range(PAIRS):
        start, _ = ray.get(dispatcher.next_assignment.remote(group, 1), timeout=SECONDS)
        waits.append(dispatcher.wait_for_signal.remote(start.assignment, start.start))
        dispatcher.finished.remote(start.assignment, start.start, "")
        status = ray.get(dispatcher.wait_for_report.remote(number, 0), timeout=SECONDS)
        assert status.ended and not status.error
        number = ray.get(dispatcher.submit.remote("trial", spec()), timeout=SECONDS)
    # a call made after its assignment has ended returns ABANDON
    assert set(ray.get(waits, timeout=SECONDS)) <= {Signal.NONE, Signal.ABANDON}
    # an assignment that has ended leaves nothing
    start, _ = ray.get(dispatcher.next_assignment.remote(group, 1), timeout=SECONDS)
    late = ray.get(dispatcher.wait_for_signal.remote(0, 1), timeout=SECONDS)
    assert start.assignment == PAIRS and late == Signal.ABANDON


def added(dispatcher: Any) -> Any:
    """Submits a first trial, and adds the worker group that it needs."""
    ray.get(dispatcher.submit.remote("trial", spec()), timeout=SECONDS)
    return dispatcher.add_groups.remote(1)
