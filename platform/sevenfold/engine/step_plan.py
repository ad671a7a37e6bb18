"""The number of steps of a run whose data was not counted before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

CORRECTIONS = 50  # how often a run corrects its number of steps


class DataProgress(NamedTuple):
    """How much of the data all ranks together have read.

    Attributes:
        done: The part that was read, in units of 1 / whole.
        whole: The whole data; done == whole if nothing is left.
        data_steps: The number of steps for which data was read, skipped ones included.
    """

    done: int
    whole: int
    data_steps: int


class StepPlan:
    """The number of steps, and its correction while the run trains.

    A run with `data.epochs` ends with its data. Without counting the rows beforehand the number of
    steps is an estimate, from which the learning rate's decay would miss the end of the data. It is
    corrected every few steps by the share of the data that was read. These steps and the result
    depend on the data alone, so that a run which was killed, or changes its number of workers,
    makes the same corrections.

    Args:
        steps: The number of steps, or its estimate.
        progress: Returns the progress; all ranks call it at the same steps. None: `steps` is exact.

    Attributes:
        total: The number of steps.
    """

    def __init__(self, steps: int, progress: Callable[[], DataProgress] | None = None):
        self.total = steps
        self._first, self._progress = steps, progress
        self._interval = max(1, steps // CORRECTIONS)

    @property
    def is_exact(self) -> bool:
        """Whether the number of steps does not change."""
        return self._progress is None

    def restore(self, total: int | None) -> None:
        """Restores the number of steps that a checkpoint stores; None for that of the start."""
        self.total = self._first if total is None else total

    def update(self, step: int) -> None:
        """Corrects the number of steps, if it is time to.

        Args:
            step: The number of steps done.
        """
        if self._progress is None or not (step % self._interval == 0 or step >= self.total):
            return
        done, whole, data_steps = self._progress()
        if done >= whole:
            self.total = step
        elif done > 0:
            # a step at least: the data has not ended
            self.total = step + max(1, data_steps * (whole - done) // done)
