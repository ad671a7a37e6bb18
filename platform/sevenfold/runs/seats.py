"""Seats: Ray Train runs that train one trial of a sweep after another. A trial begins with its first step then, and not with
processes, imports and process groups. Trials ask a desk for a seat; the sweep's driver opens and closes them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sevenfold import storage
from sevenfold.engine.notice import Notice
from sevenfold.errors import RunError
from sevenfold.recipe import Parallel, Recipe
from sevenfold.report.console import say
from sevenfold.runs import prepare, train
from sevenfold.runs.prepare import Job
from sevenfold.storage import RunFolder

IDLE = 20.0  # seconds until a seat that no trial asks for is given back to the cluster
LOOK = 0.2  # seconds between looks at whether one is asked for


@dataclass(frozen=True)
class Work:
    """What is a trial's own. descent: as Job has it; since: the step of the last report that is known."""

    recipe: Recipe
    folder: str
    descent: str = ""
    since: int = 0

    def job(self, common: Job) -> Job:
        validation = common.validation.plan.manifest if common.validation and not self.recipe.data.held_out else None
        found = prepare.Inputs(common.train.plan.manifest, validation)
        stream, held = prepare.streams(self.recipe, found, common.tokenizer)
        return replace(
            common, recipe=self.recipe, identity=self.recipe.hash(), folder=self.folder, train=stream, validation=held,
            descent=self.descent,
        )  # fmt: skip


@dataclass
class _Sitting:
    """A trial's turn, from its asking for a seat to its end there."""

    number: int
    trial: str
    work: Work
    before: _Sitting | None  # the same trial's, which has to be over first
    starts: int = 0  # of the seat's workers with it
    reports: int = 0
    notice: Notice = Notice.NONE  # that its workers are given
    over: bool = False
    error: str = ""

    def ready(self) -> bool:
        return self.before is None or self.before.over


class Desk:
    """An actor: deals trials out to seats, and carries word between them."""

    def __init__(self, max_failures: int):
        """max_failures: of a seat's workers, that a trial survives."""
        self._max_failures = max_failures
        self._numbers = itertools.count()
        self._sittings: dict[int, _Sitting] = {}
        self._waiting: list[_Sitting] = []  # in their order
        self._seats: dict[str, _Sitting | None] = {}
        self._workers: dict[str, int] = {}
        self._changed, self._closing = asyncio.Condition(), False

    # of trials
    async def ask(self, trial: str, work: Work) -> int:
        """Returns the number of its sitting. One of the same trial that is not over is left."""
        before = next((s for s in reversed(self._sittings.values()) if s.trial == trial), None)
        await self.leave([trial])
        made = _Sitting(next(self._numbers), trial, work, before)
        self._sittings[made.number] = made
        self._waiting.append(made)
        await self._tell()
        return made.number

    async def news(self, number: int, seen: int) -> tuple[int, bool, str]:
        """(reports so far, whether it is over, why before its last step), when there is more than `seen`."""
        sitting = self._sittings[number]
        await self._until(lambda: sitting.reports > seen or sitting.over)
        return sitting.reports, sitting.over, sitting.error

    # of seats
    async def next(self, seat: str, workers: int) -> tuple[tuple[int, int], Work] | None:
        """What to train, and its number and start: what it had before its workers were started anew, or the next trial; None:
        it is to close."""
        self._workers[seat] = workers
        sitting = self._seats[seat]
        if sitting is None or sitting.over or sitting.notice:
            self._end(sitting)
            self._seats[seat] = None
            await self._tell()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._until(lambda: self._closing or any(s.ready() for s in self._waiting)), IDLE)
            sitting = None if self._closing else next((s for s in self._waiting if s.ready()), None)
            if sitting is None:
                del self._seats[seat], self._workers[seat]
                return None
            self._waiting.remove(sitting)
            self._seats[seat] = sitting
        sitting.starts += 1
        await self._tell()  # to workers of the start before, which may live on, cut off from their node
        return (sitting.number, sitting.starts), sitting.work

    async def told(self, number: int, start: int) -> None:
        self._sittings[number].reports += 1
        await self._tell()

    async def ended(self, number: int, start: int, why: str) -> None:
        """why: of an end before the last step."""
        sitting = self._sittings[number]
        if start == sitting.starts:
            self._end(sitting, why)
            await self._tell()

    async def noticed(self, number: int, start: int) -> Notice:
        """Returns when there is one for the workers of this start."""
        sitting = self._sittings[number]
        await self._until(lambda: sitting.notice or sitting.starts > start)
        return sitting.notice if sitting.starts == start else Notice.LEAVE

    # of the driver
    async def leave(self, trials: list[str]) -> None:
        for sitting in self._sittings.values():
            if sitting.trial in trials and not sitting.over:
                sitting.notice = Notice.LEAVE
        for sitting in [s for s in self._waiting if s.notice]:
            self._waiting.remove(sitting)
            self._end(sitting)
        await self._tell()

    async def open(self, most: int) -> list[str]:
        """Names of the seats to be opened, for those that wait and will find none. most: seats that there may be in all."""
        free = sum(s is None or s.over or s.notice for s in self._seats.values())
        names = [secrets.token_hex(4) for _ in range(min(len(self._waiting) - free, most - len(self._seats)))]
        self._seats |= dict.fromkeys(names)
        return names

    async def closed(self, seat: str, error: str) -> None:
        """error: of a seat that failed. Its trial is tried in another one, unless it has failed too often."""
        self._workers.pop(seat, None)
        sitting = self._seats.pop(seat, None)
        if error and sitting is None and self._waiting:  # it did not even begin
            sitting = self._waiting.pop(0)
            sitting.starts += 1
        if sitting is not None and not sitting.over:
            if sitting.notice or sitting.starts > self._max_failures:
                self._end(sitting, error)
            else:
                self._waiting.insert(0, sitting)
        await self._tell()

    async def workers(self) -> int:
        """That seats hold."""
        return sum(self._workers.values())

    async def close(self) -> None:
        """What still trains is saved."""
        self._closing = True
        for sitting in self._seats.values():
            if sitting is not None and not sitting.notice:
                sitting.notice = Notice.END
        await self._tell()

    def _end(self, sitting: _Sitting | None, why: str = "") -> None:
        if sitting is not None:
            sitting.over, sitting.error = True, why

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, holds: Any) -> None:
        async with self._changed:
            await self._changed.wait_for(holds)


class Post:
    """A trial's worker's way to the desk."""

    def __init__(self, desk: Any, start: tuple[int, int], since: int):
        self.since, self._desk, self._start = since, desk, start
        self._noticed = desk.noticed.remote(*start)

    def notice(self) -> Notice:
        return ray.get(self._noticed) if ray.wait([self._noticed], timeout=0)[0] else Notice.NONE

    def report(self, recipe: Recipe, folder: RunFolder, metrics: dict[str, Any]) -> None:
        """Puts metrics of a step into the trial's reports.json, where they are not yet, and tells."""
        known = reports(folder)
        if not known or known[-1]["step"] < metrics["step"]:
            every = recipe.validation.every
            number = math.ceil(metrics["step"] / every) if every else 1
            known.append({**metrics, "report": number, "time": time.time()})
            storage.write(_reports(folder), json.dumps(known))
        ray.get(self._desk.told.remote(*self._start))


def _reports(folder: RunFolder) -> str:
    return storage.join(folder.root, "reports.json")


def reports(folder: RunFolder) -> list[dict[str, Any]]:
    """Of a trial, by step: metrics, step, checkpoint, report (its number), time (in seconds since 1970)."""
    path = _reports(folder)
    found: list[dict[str, Any]] = storage.read_json(path) if storage.exists(path) else []
    return found


def train_on(desk: Any, trial: str, work: Work) -> Iterator[None]:
    """Has a trial trained on a seat; yields after each of its reports. Raises RunError where it ends before its last step."""
    number, seen, over = ray.get(desk.ask.remote(trial, work)), 0, False
    while not over:
        seen, over, error = ray.get(desk.news.remote(number, seen))
        yield
    if error:
        raise RunError(error)


def sit(desk: Any, seat: str, job: Job) -> dict[str, Any]:
    """What each worker of a seat runs: one trial after another."""
    import torch
    import torch.distributed as dist

    from sevenfold.runs.worker import Worker

    first = dist.get_rank() == 0
    while True:
        given = [ray.get(desk.next.remote(seat, dist.get_world_size())) if first else None]
        dist.broadcast_object_list(given)
        if given[0] is None:
            return {}
        start, work = given[0]
        reported = Worker(replace(work.job(job), post=Post(desk, start, work.since))).run()
        if first:
            ray.get(desk.ended.remote(*start, reported.get("ended", "")))
        if job.recipe.parallel != Parallel():  # its meshes' process groups would stay
            return {}
        gc.collect()  # a model that is sharded refers to itself
        torch.compiler.reset()  # what it compiled is never asked for again, and counts towards its limit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Seats:
    """Of a sweep, for its driver: opens one where a trial waits that will find none."""

    def __init__(self, job: Job, capacity: Callable[[], int]):
        """capacity: seats that the cluster holds."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        made: Any = ray.remote(num_cpus=0, scheduling_strategy=here, max_concurrency=1000)(Desk)
        self.desk = made.remote(job.recipe.cluster.max_failures)
        self._job, self._capacity, self._stop = job, capacity, threading.Event()
        self._open: list[threading.Thread] = []
        self._watch = threading.Thread(target=self._opens, daemon=True)
        self._watch.start()

    def _opens(self) -> None:
        while not self._stop.wait(LOOK):
            for name in ray.get(self.desk.open.remote(self._capacity())):
                self._open.append(threading.Thread(target=self._run, args=(name,), daemon=True))
                self._open[-1].start()

    def _run(self, name: str) -> None:
        folder, error, desk = storage.join(RunFolder(self._job.folder).ray, "seats"), "", self.desk

        def sits(job: Job) -> dict[str, Any]:
            from sevenfold.runs import seats

            return seats.sit(desk, name, job)

        try:
            train.launch(self._job, sits, folder, name)
        except Exception as e:
            error = str(e) or type(e).__name__
        ray.get(desk.closed.remote(name, error))
        storage.remove(storage.join(folder, name))

    def leave(self, trials: Iterable[str]) -> None:
        """These are not waited for any more."""
        ray.get(self.desk.leave.remote(list(trials)))

    def workers(self) -> int:
        """That they hold at the moment."""
        return int(ray.get(self.desk.workers.remote()))

    def close(self, wait_seconds: float = 60) -> None:
        """Each ends after the step that it is at, which is saved."""
        self._stop.set()
        self._watch.join()
        ray.get(self.desk.close.remote())
        end = time.monotonic() + wait_seconds
        for thread in self._open:
            thread.join(max(0.0, end - time.monotonic()))
        if any(t.is_alive() for t in self._open):
            say("seats of this sweep did not close in time")
        ray.kill(self.desk)
