"""What is done about steps whose loss or gradient is not finite, or jumps: leave them out, go back, give up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sevenfold.errors import DivergedError
from sevenfold.recipe import Guard as Settings

MEMORY = 100  # steps over which the mean of the gradient norms fades


@dataclass
class Guard:
    """The same on every rank, since what it judges by is of all ranks; its state goes into the checkpoints.

    Attributes:
        mean, seen: running mean of the gradient norms of applied steps, and how many there were.
        in_a_row: steps left out since the last applied one.
        rollbacks: of the run so far.
    """

    settings: Settings
    mean: float = 0.0
    seen: int = 0
    in_a_row: int = 0
    rollbacks: int = 0

    @property
    def most_norm(self) -> float:
        """A gradient norm above it is a spike; of the first steps none is."""
        factor = self.settings.spike_factor
        return math.inf if factor is None or self.seen < MEMORY else factor * self.mean

    def judge(self, step: int, applied: bool, grad_norm: float) -> bool:
        """Takes note of a step (from 1); whether the run must go back to its last checkpoint.

        Raises:
            RunError: it went back max_rollbacks times already.
        """
        if applied:
            self.seen += 1
            self.mean += (grad_norm - self.mean) / min(self.seen, MEMORY)
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        if self.in_a_row < self.settings.max_skipped:
            return False
        if self.rollbacks >= self.settings.max_rollbacks:
            raise DivergedError(
                f"loss or gradient was not finite, or jumped, in {self.in_a_row} steps in a row, up to step {step}, after "
                f"{self.rollbacks} returns to a checkpoint (guard.max_rollbacks): the last checkpoint is good; lower "
                "optimizer.learning_rate or lengthen schedule.warmup_steps"
            )
        return True

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": self.seen, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}

    def load(self, state: dict[str, Any], rollbacks: int = 0) -> None:
        """Of a checkpoint; rollbacks: how many there were after it."""
        self.mean, self.seen, self.in_a_row = state["mean"], state["seen"], state["in_a_row"]
        self.rollbacks = max(state["rollbacks"], rollbacks)
