"""Handles steps with a non-finite or exploding gradient: skip them, roll back, or end the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sevenfold.errors import DivergedError
from sevenfold.recipe import Guard as Settings

MEMORY = 100  # the mean of the gradient norms is a moving average over about this number of steps

DIVERGENCE_ADVICE = "lower optimizer.learning_rate or raise schedule.warmup_steps"


def describe_divergence(steps: int, step: int) -> str:
    """Describes, for an error message, the steps in a row up to `step` that were skipped."""
    return (
        "training diverged: the loss or gradient was not finite, or the gradient norm spiked, in "
        f"{steps} steps in a row, up to step {step}"
    )


@dataclass
class Guard:
    """Tracks gradient norms and skipped steps; its state is saved in checkpoints.

    It is the same on every rank, since it is given values that are reduced over all ranks.

    Attributes:
        settings: The recipe's `guard`.
        mean: The moving average of the gradient norms of applied steps.
        seen: The number of applied steps.
        skipped_in_a_row: The number of steps skipped since the last applied one.
        rollbacks: The number of rollbacks of the run so far.
    """

    settings: Settings
    mean: float = 0.0
    seen: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0

    @property
    def skip_above_norm(self) -> float:
        """The gradient norm above which a step is skipped; infinite during the first steps."""
        factor = self.settings.spike_factor
        return math.inf if factor is None or self.seen < MEMORY else factor * self.mean

    def record(self, step: int, applied: bool, grad_norm: float) -> bool:
        """Records a step and returns whether the run must roll back to its last checkpoint.

        Args:
            step: The number of steps done, this one included.
            applied: Whether the step changed the weights.
            grad_norm: The norm of the gradient before clipping.

        Raises:
            DivergedError: The run has been rolled back max_rollbacks times already.
        """
        if applied:
            self.seen += 1
            self.mean += (grad_norm - self.mean) / min(self.seen, MEMORY)
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.settings.max_skipped:
            return False
        if self.rollbacks >= self.settings.max_rollbacks:
            raise DivergedError(
                describe_divergence(self.skipped_in_a_row, step)
                + f"; rollbacks so far: {self.rollbacks} (the limit, guard.max_rollbacks). The "
                f"last checkpoint is good; {DIVERGENCE_ADVICE}"
            )
        return True

    def state(self) -> dict[str, Any]:
        """Returns the state that is saved in a checkpoint."""
        return {
            "mean": self.mean,
            "seen": self.seen,
            "in_a_row": self.skipped_in_a_row,
            "rollbacks": self.rollbacks,
        }

    def load(self, state: dict[str, Any], rollbacks: int = 0) -> None:
        """Restores the state of a checkpoint.

        Args:
            state: As `state` returned it.
            rollbacks: The number of rollbacks known now; it may be higher than the checkpoint's, if
                some happened after the checkpoint was saved.
        """
        self.mean = state["mean"]
        self.seen = state["seen"]
        self.skipped_in_a_row = state["in_a_row"]
        self.rollbacks = max(state["rollbacks"], rollbacks)
