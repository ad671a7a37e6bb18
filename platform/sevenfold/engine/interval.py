"""When to save: every so many steps, or by what a save costs and how seldom a machine fails."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median

import torch.distributed as dist

from sevenfold.engine.checkpoint import Saver
from sevenfold.recipe import Checkpoint as Settings

FIRST = 10  # steps between the first saves, which tell what one costs
STEPS, SAVES = 100, 5  # over whose median what is measured is smoothed
CHANGE = 2.0  # by this factor, and it is told again


def best_seconds(cost: float, mtbf: float, committed: float) -> float:
    """Seconds between saves that lose the least time in all, and no fewer than a save takes: sqrt(2 * cost * mtbf).

    J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974. Saves cost cost / t of the
    time, a failure t / 2 and what does not depend on t (the save that was not yet committed, the restart). Daly's further
    terms (FGCS 22(3), 2006) change t by about sqrt(cost / mtbf): a hundredth at 1 s in 3 h, where the loss is flat.

    Args:
        cost: seconds that a save takes from the training.
        mtbf: mean seconds between two failures of the whole run.
        committed: seconds until a save is committed; before that the next would wait for it.
    """
    return max(math.sqrt(2 * cost * mtbf), committed)


def due(step: int, every: int | None) -> bool:
    """Whether this step (from 1) is one of each `every`; none is where that is None."""
    return every is not None and step % every == 0


class Interval:
    """Says at which steps to save. Every rank has one and calls it at the same steps.

    With `every: auto` the first saves are FIRST steps apart. Each save then sets the next one by what rank 0 has measured of
    those before it, but the first, which allocates: a save costs its stall, and what the steps beside it took longer.
    """

    def __init__(self, settings: Settings, workers: int, start: int, saver: Saver, tell: Callable[[str], None]):
        """
        Args:
            workers: any of them fails once in settings.mtbf_hours.
            start: the step that the run goes on from.
            tell: the interval, as a sentence; called on every rank.
        """
        self._settings, self._saver, self._tell = settings, saver, tell
        self._workers, self._mtbf = workers, settings.mtbf_hours * 3600 / workers
        self._next, self._told = start + FIRST, 0
        self._saves, self._stall, self._is_beside = 0, 0.0, False
        self._free, self._beside = deque[float](maxlen=STEPS), list[float]()  # seconds of steps
        self._costs = deque[float](maxlen=SAVES)

    def add(self, seconds: float) -> None:
        """A step that took so long."""
        (self._beside if self._is_beside else self._free).append(seconds)
        self._is_beside = self._is_beside and self._saver.under_way

    def due(self, step: int) -> bool:
        """Whether to save after this step (from 1)."""
        every = self._settings.every
        if every == "auto":
            return step >= self._next or due(step, self._settings.keep_every)
        return due(step, every)

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around a save after this step, due or not. Raises as Saver.wait."""
        self._saver.wait()  # then all that the one before cost is known
        if self._settings.every == "auto":
            self._revise(step)
        begin = time.perf_counter()
        yield
        self._stall, self._is_beside = time.perf_counter() - begin, True
        self._saves += 1
        self._beside.clear()

    def _revise(self, step: int) -> None:
        if self._saves > 1:
            slower = sum(self._beside) - len(self._beside) * median(self._free)
            self._costs.append(self._stall + max(0.0, slower))
        found = [(FIRST, 0.0, 0.0)]
        if self._costs:
            cost, second = median(self._costs), median(self._free)
            found = [(math.ceil(best_seconds(cost, self._mtbf, self._saver.seconds) / second), cost, second)]
        dist.broadcast_object_list(found, src=0)  # clocks differ from rank to rank
        steps, cost, second = found[0]
        self._next = step + steps
        if cost and not self._told / CHANGE < steps < self._told * CHANGE:
            self._told = steps
            self._tell(
                f"a save each {steps:,} steps ({steps * second / 60:,.1f} min) from now on: it costs {cost:.2g} s, and one of "
                f"{self._workers:,} workers fails each {self._mtbf / 3600:,.1f} h (checkpoint.mtbf_hours)"
            )
