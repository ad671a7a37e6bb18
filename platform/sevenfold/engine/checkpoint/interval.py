"""When to save: every N steps, or by the cost of a save and the rate of failures."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median

import torch.distributed as dist

from sevenfold.engine.checkpoint import CheckpointManager
from sevenfold.recipe import Checkpoint as CheckpointSettings

INITIAL_STEPS = 10  # steps between the first saves, which measure what a save costs
STEP_HISTORY = 100  # the duration of a step is the median of this number of steps
SAVE_HISTORY = 5  # the cost of a save is the median of this number of saves
REPORT_FACTOR = 2.0  # a new interval is reported if it differs by this factor from the last report


def optimal_interval(cost: float, mtbf: float, committed: float) -> float:
    """Returns the seconds between saves that lose the least time: sqrt(2 * cost * mtbf).

    The result is at least `committed`, since the next save would wait for the pending one.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
    With an interval of t seconds, saves take the fraction cost / t of the time. A failure loses
    t / 2 seconds on average, and a time that does not depend on t (the save that was not committed
    yet, and the restart). The higher-order terms of Daly (FGCS 22(3), 2006) change t by about
    sqrt(cost / mtbf), which is 1 % for a cost of 1 s and a failure every 3 h; the lost time hardly
    changes there.

    Args:
        cost: Seconds of training that a save costs.
        mtbf: Mean seconds between two failures of the whole run.
        committed: Seconds from the start of a save until it is committed.
    """
    return max(math.sqrt(2 * cost * mtbf), committed)


def is_due(step: int, every: int | None) -> bool:
    """Returns whether `step` (from 1) is a multiple of `every`; never if that is None."""
    return every is not None and step % every == 0


class Interval:
    """Decides at which steps to save. Every rank has one and calls it at the same steps.

    With `checkpoint.every: auto` the first saves are INITIAL_STEPS apart. Each save then sets the
    distance to the next one from rank 0's measurements of the saves before it. The first save is
    not measured, since it allocates its buffers. The cost of a save is the time for which it blocks
    the training, plus the slowdown of the steps during which it is written.

    Args:
        settings: The section `checkpoint` of the recipe.
        workers: The number of workers. The run fails if any of them does.
        start: The step that the run starts or resumes from.
        manager: Writes the checkpoints.
        tell: Receives a sentence when the interval changes; called on every rank.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        workers: int,
        start: int,
        manager: CheckpointManager,
        tell: Callable[[str], None],
    ):
        self._settings, self._manager, self._tell = settings, manager, tell
        self._workers = workers
        self._mtbf = settings.mtbf_hours * 3600 / workers  # of the whole run, in seconds
        self._next_step = start + INITIAL_STEPS
        self._reported_steps = 0  # the interval that was last reported, in steps
        self._saves = 0
        self._blocked_seconds = 0.0  # for which the last save blocked the training
        # steps are timed separately while a save is being written beside them
        self._is_writing = False
        self._undisturbed_steps = deque[float](maxlen=STEP_HISTORY)  # seconds of each step
        self._disturbed_steps = list[float]()  # seconds of each step beside the last save
        self._costs = deque[float](maxlen=SAVE_HISTORY)

    def add(self, seconds: float) -> None:
        """Records the duration of a step."""
        steps = self._disturbed_steps if self._is_writing else self._undisturbed_steps
        steps.append(seconds)
        self._is_writing = self._is_writing and self._manager.saving

    def due(self, step: int) -> bool:
        """Returns whether to save after this step (from 1)."""
        every = self._settings.every
        if every == "auto":
            return step >= self._next_step or is_due(step, self._settings.keep_every)
        return is_due(step, every)

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Measures a save after this step, whether it was due or not.

        Raises:
            RunError: As CheckpointManager.wait.
        """
        self._manager.wait()  # only then is the cost of the last save known
        if self._settings.every == "auto":
            self._schedule_next(step)
        start = time.perf_counter()
        yield
        self._blocked_seconds, self._is_writing = time.perf_counter() - start, True
        self._saves += 1
        self._disturbed_steps.clear()

    def _schedule_next(self, step: int) -> None:
        """Sets the step of the next save, from the measured cost of the saves before this one."""
        if self._saves > 1:
            expected = len(self._disturbed_steps) * median(self._undisturbed_steps)
            slowdown = sum(self._disturbed_steps) - expected
            self._costs.append(self._blocked_seconds + max(0.0, slowdown))
        steps, cost, step_seconds = INITIAL_STEPS, 0.0, 0.0
        if self._costs:
            cost, step_seconds = median(self._costs), median(self._undisturbed_steps)
            seconds = optimal_interval(cost, self._mtbf, self._manager.save_seconds)
            steps = math.ceil(seconds / step_seconds)
        measured = [(steps, cost, step_seconds)]
        # the ranks' measurements differ, but all must save at the same steps
        dist.broadcast_object_list(measured, src=0)
        steps, cost, step_seconds = measured[0]
        self._next_step = step + steps
        reported = self._reported_steps
        if cost and not reported / REPORT_FACTOR < steps < reported * REPORT_FACTOR:
            self._reported_steps = steps
            self._tell(
                f"saving every {steps:,} steps ({steps * step_seconds / 60:,.1f} min) from now on: "
                f"a save costs {cost:.2g} s, and with {self._workers:,} workers a failure is "
                f"expected every {self._mtbf / 3600:,.1f} h (checkpoint.mtbf_hours)"
            )
