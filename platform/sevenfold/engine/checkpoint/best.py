"""The best validation of a run: its checkpoint is kept, and early stopping counts from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from typing import Any

from sevenfold.errors import DivergedError, RunError
from sevenfold.recipe import Validation


class UnknownMetricError(RunError):
    """The metric to judge validations by is not reported.

    It is raised on all ranks, and restarting the workers would only raise it again.
    """


@dataclass(frozen=True)
class BestValidation:
    """A validation that was better than all before it, with all its metrics.

    Attributes:
        step: The training step that was validated.
        value: The value of `validation.metric`.
        metrics: All metrics of this validation.
    """

    step: int
    value: float
    metrics: dict[str, float]


@dataclass
class BestTracker:
    """Tracks the best validation and decides when to stop early.

    Its state is identical on all ranks, since the metrics are those of all ranks together, and it
    is stored in every checkpoint.

    Attributes:
        settings: The section `validation` of the recipe.
        committed_steps: Waits for a pending save, then returns the steps that have a committed
            checkpoint; the same on every rank.
        best: The best validation so far.
        previous: The validation that was the best before `best`. It becomes the best again if the
            checkpoint of `best` could not be saved.
        stale: The number of validations since the best one.
        last_step: The step of the last validation.
    """

    settings: Validation
    committed_steps: Callable[[], Container[int]]
    best: BestValidation | None = None
    previous: BestValidation | None = None
    stale: int = 0
    last_step: int = 0

    @property
    def enabled(self) -> bool:
        """Whether the recipe asks for the best checkpoint to be kept."""
        return self.settings.keeps_best

    @property
    def exhausted(self) -> bool:
        """Whether `validation.patience` is used up, so that the run stops early."""
        return self.settings.patience is not None and self.stale >= self.settings.patience

    def missed_validation(self, step: int) -> bool:
        """Returns whether a run that resumes from `step` still lacks the validation of that step.

        This is so when the run was interrupted between a save at the step and its validation.
        """
        every = self.settings.every
        return (
            self.enabled
            and step > 0
            and every is not None
            and step % every == 0
            and self.last_step < step
        )

    def update(self, step: int, metrics: dict[str, float]) -> bool:
        """Records a validation. A step that was recorded before is ignored.

        Args:
            step: The training step that was validated.
            metrics: The metrics of the validation, the same on every rank.

        Returns:
            Whether this validation is the best so far, so that its checkpoint must be saved.

        Raises:
            UnknownMetricError: `validation.metric` is not among the metrics.
            DivergedError: The metric was not finite in the last `validation.patience` validations,
                and there is no best validation.
        """
        if not self.enabled:
            return False
        self.forget_uncommitted(self.committed_steps())
        if step <= self.last_step:
            return False
        name = self.settings.metric
        if name not in metrics:
            raise UnknownMetricError(
                f"validation.metric: unknown metric {name!r}; "
                f"this recipe reports: {', '.join(sorted(metrics))}"
            )
        self.last_step, value = step, float(metrics[name])
        sign = 1 if self.settings.lower_is_better else -1
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best.value):
            self.previous = self.best
            self.best = BestValidation(step, value, metrics)
            self.stale = 0
            return True
        self.stale += 1
        if self.exhausted and self.best is None:
            raise DivergedError(
                f"{name} was not finite in {self.stale} validations in a row, up to step {step}"
            )
        return False

    def forget_uncommitted(self, committed: Container[int]) -> None:
        """Falls back to the previous best validation if the best one has no checkpoint.

        This happens when its save failed, or when the run resumed from an older checkpoint because
        a later one was damaged.

        Args:
            committed: The steps that have a committed checkpoint.
        """
        if self.best is None or self.best.step in committed:
            return
        if self.previous is not None and self.previous.step in committed:
            self.best = self.previous
        else:
            self.best = None
            self.stale = 0
        self.previous = None

    def summary(self) -> str:
        """Returns a sentence about the best validation, for the end of the run."""
        assert self.best is not None
        best = (
            f"best {self.settings.metric} {self.best.value:.4f} at step {self.best.step}, "
            "saved as the final model"
        )
        if self.exhausted:
            return (
                f"stopped early after step {self.last_step}: "
                f"no improvement in {self.stale} validations; {best}"
            )
        return best

    def state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint, plain JSON."""
        return {
            "mark": asdict(self.best) if self.best else None,
            "before": asdict(self.previous) if self.previous else None,
            "stale": self.stale,
            "seen": self.last_step,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned when a checkpoint was saved."""
        self.best = BestValidation(**state["mark"]) if state["mark"] else None
        self.previous = BestValidation(**state["before"]) if state["before"] else None
        self.stale, self.last_step = state["stale"], state["seen"]
