"""The dispatcher of a sweep's worker pool: an actor that assigns trials to worker groups."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sevenfold.engine.signals import Signal
from sevenfold.prepare.data import Inputs
from sevenfold.prepare.job import Job
from sevenfold.prepare.streams import build_streams
from sevenfold.recipe import Recipe

# A worker group that gets no trial for this long ends, so that the cluster can use its resources.
IDLE_SECONDS = 20.0


@dataclass(frozen=True)
class TrialSpec:
    """What distinguishes a trial from the others of its sweep.

    Attributes:
        recipe: The sweep's recipe with the trial's hyperparameters.
        folder: The trial's run folder.
        parent_identity: The identity of the run whose checkpoint the trial resumes from, if that
            is another trial's run (PBT).
        since: The step of the last report that the sweep has received from this trial.
    """

    recipe: Recipe
    folder: str
    parent_identity: str = ""
    since: int = 0

    def job(self, sweep_job: Job) -> Job:
        """Returns the trial as a job of its own, with the data and the tokenizer of the sweep."""
        held_out = self.recipe.data.held_out
        validation = (
            sweep_job.validation.order.manifest if sweep_job.validation and not held_out else None
        )
        order = sweep_job.train.order
        inputs = Inputs(order.manifest, validation, order=order.version)
        train, validation_stream = build_streams(self.recipe, inputs, sweep_job.tokenizer)
        return replace(
            sweep_job,
            recipe=self.recipe,
            identity=self.recipe.hash(),
            folder=self.folder,
            train=train,
            validation=validation_stream,
            parent_identity=self.parent_identity,
        )


class AssignmentStart(NamedTuple):
    """Identifies the workers that train an assignment: they are restarted after a failure.

    Attributes:
        assignment: The number of the assignment.
        start: How often workers have started on this assignment, this time included.
    """

    assignment: int
    start: int


class AssignmentStatus(NamedTuple):
    """How far an assignment is.

    Attributes:
        reports: The number of its reports so far.
        ended: Whether it has ended.
        error: Why it ended before its last step; empty if it did not.
    """

    reports: int
    ended: bool
    error: str


@dataclass
class _Assignment:
    """A trial's turn in the pool, from its request for a worker group until it ends there.

    Attributes:
        number: The number of the assignment.
        trial: The trial's id.
        spec: What to train.
        previous: The same trial's earlier assignment, which has to end first.
        starts: How often workers have started on it.
        reports: The number of its reports so far.
        signal: What its workers are asked to do.
        ended: Whether it has ended.
        error: Why it ended before its last step.
    """

    number: int
    trial: str
    spec: TrialSpec
    previous: _Assignment | None
    starts: int = 0
    reports: int = 0
    signal: Signal = Signal.NONE
    ended: bool = False
    error: str = ""

    def is_ready(self) -> bool:
        """Returns whether it may start."""
        return self.previous is None or self.previous.ended


class Dispatcher:
    """An actor that assigns trials to the worker groups of the pool.

    It also passes reports from the workers to the trials, and signals to the workers. The trials,
    the workers and the sweep's driver call it. Several of its methods return only when something
    has happened, so that their callers need not poll.
    """

    def __init__(self, max_failures: int):
        """Creates a dispatcher without worker groups.

        Args:
            max_failures: The number of worker failures that a trial survives.
        """
        self._max_failures = max_failures
        self._numbers = itertools.count()
        self._assignments: dict[int, _Assignment] = {}
        self._waiting: list[_Assignment] = []  # first in, first out
        self._groups: dict[str, _Assignment | None] = {}  # by name; None while a group is idle
        self._workers: dict[str, int] = {}  # number of workers of each group that has started
        self._changed = asyncio.Condition()
        self._closing = False

    # called by trials

    async def submit(self, trial: str, spec: TrialSpec) -> int:
        """Asks for a worker group. An assignment of the same trial that has not ended is abandoned.

        Returns:
            The number of the new assignment.
        """
        previous = next((a for a in reversed(self._assignments.values()) if a.trial == trial), None)
        await self.abandon([trial])
        assignment = _Assignment(next(self._numbers), trial, spec, previous)
        self._assignments[assignment.number] = assignment
        self._waiting.append(assignment)
        await self._notify()
        return assignment.number

    async def wait_for_report(self, number: int, seen: int) -> AssignmentStatus:
        """Returns when an assignment has made more than `seen` reports, or has ended."""
        assignment = self._assignments[number]
        await self._until(lambda: assignment.reports > seen or assignment.ended)
        if assignment.ended:
            self._forget(assignment)
        return AssignmentStatus(assignment.reports, assignment.ended, assignment.error)

    # called by workers

    async def next_assignment(
        self, group: str, workers: int
    ) -> tuple[AssignmentStart, TrialSpec] | None:
        """Returns what a worker group is to train.

        That is the trial which it trained before its workers were restarted, or else the next one.

        Args:
            group: The name of the worker group.
            workers: The number of its workers.

        Returns:
            The start of an assignment and what to train; None if the worker group is to end.
        """
        self._workers[group] = workers
        assignment = self._groups[group]
        if assignment is None or assignment.ended or assignment.signal:
            self._end(assignment)
            self._groups[group] = None
            await self._notify()
            assignment = await self._wait_for_assignment()
            if assignment is None:
                del self._groups[group], self._workers[group]
                return None
            self._waiting.remove(assignment)
            self._groups[group] = assignment
        assignment.starts += 1
        # Workers of an earlier start may still be alive, on a node that lost its connection. This
        # wakes their wait_for_signal, which tells them to stop.
        await self._notify()
        return AssignmentStart(assignment.number, assignment.starts), assignment.spec

    async def reported(self, number: int) -> None:
        """Counts a report of an assignment."""
        if assignment := self._assignments.get(number):
            assignment.reports += 1
            await self._notify()

    async def finished(self, number: int, start: int, error: str) -> None:
        """Ends an assignment.

        Args:
            number: The number of the assignment.
            start: The start of the workers that have finished it. The call has no effect if
                workers have started on the assignment again since then.
            error: Why it ended before its last step; empty if it did not.
        """
        assignment = self._assignments.get(number)
        if assignment is not None and start == assignment.starts:
            self._end(assignment, error)
            await self._notify()

    async def wait_for_signal(self, number: int, start: int) -> Signal:
        """Returns when there is a signal for the workers of this start of an assignment.

        It returns at the end of the assignment too: Ray runs a limited number of calls of an actor
        at a time, and further calls would wait for ever.
        """
        assignment = self._assignments.get(number)
        if assignment is None:
            return Signal.ABANDON
        await self._until(
            lambda: assignment.signal or assignment.starts > start or assignment.ended
        )
        return assignment.signal if assignment.starts == start else Signal.ABANDON

    # called by the driver

    async def abandon(self, trials: list[str]) -> None:
        """Abandons the assignments of these trials: their workers stop without saving."""
        for assignment in self._assignments.values():
            if assignment.trial in trials and not assignment.ended:
                assignment.signal = Signal.ABANDON
        for assignment in [a for a in self._waiting if a.signal]:
            self._waiting.remove(assignment)
            self._end(assignment)
        await self._notify()

    async def add_groups(self, max_groups: int) -> list[str]:
        """Adds the worker groups that waiting trials need, and returns their names.

        The caller has to start them.

        Args:
            max_groups: The maximum number of worker groups at a time.
        """
        free = sum(a is None or a.ended or bool(a.signal) for a in self._groups.values())
        missing = min(len(self._waiting) - free, max_groups - len(self._groups))
        names = [secrets.token_hex(4) for _ in range(missing)]
        self._groups |= dict.fromkeys(names)
        return names

    async def group_ended(self, group: str, error: str) -> None:
        """Removes a worker group that has ended.

        Args:
            group: The name of the worker group.
            error: Why it failed; empty if it did not. Another worker group then takes over its
                trial, unless workers of that trial have failed too often.
        """
        self._workers.pop(group, None)
        assignment = self._groups.pop(group, None)
        if error and assignment is None and self._waiting:
            # The group failed before it asked for a trial. Counting that as a start of the first
            # waiting trial ends the attempts after max_failures.
            assignment = self._waiting.pop(0)
            assignment.starts += 1
        if assignment is not None and not assignment.ended:
            if assignment.signal or assignment.starts > self._max_failures:
                self._end(assignment, error)
            else:
                self._waiting.insert(0, assignment)
        await self._notify()

    async def workers(self) -> int:
        """Returns the number of workers of all worker groups together."""
        return sum(self._workers.values())

    async def close(self) -> None:
        """Asks all worker groups to save what they train, and to end."""
        self._closing = True
        for assignment in self._groups.values():
            if assignment is not None and not assignment.signal:
                assignment.signal = Signal.STOP
        await self._notify()

    async def _wait_for_assignment(self) -> _Assignment | None:
        """Waits for an assignment that may start.

        Returns:
            The assignment; None after IDLE_SECONDS, or when the pool closes.
        """
        with contextlib.suppress(TimeoutError):
            available = self._until(lambda: self._closing or self._first_ready() is not None)
            await asyncio.wait_for(available, IDLE_SECONDS)
        return None if self._closing else self._first_ready()

    def _first_ready(self) -> _Assignment | None:
        return next((a for a in self._waiting if a.is_ready()), None)

    def _end(self, assignment: _Assignment | None, error: str = "") -> None:
        if assignment is not None:
            assignment.ended = True
            assignment.error = error
            assignment.previous = None

    def _forget(self, assignment: _Assignment) -> None:
        """Removes an assignment whose trial knows that it has ended."""
        self._assignments.pop(assignment.number, None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], Any]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
