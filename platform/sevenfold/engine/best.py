"""The best validation of a run: its checkpoint is kept, and where nothing gets better any more the run ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from typing import Any

from sevenfold.errors import DivergedError, RunError
from sevenfold.recipe import Validation as Settings


class UnknownMetricError(RunError):
    """On all ranks, and after each new start again."""


@dataclass(frozen=True)
class Mark:
    """A validation that was better than all before it, and all that it reported."""

    step: int
    value: float
    metrics: dict[str, float]


@dataclass
class Best:
    """The same on every rank, since what it judges by is of all ranks; its state goes into the checkpoints.

    Attributes:
        committed: the steps whose checkpoints are there, once none is under way; the same on every rank.
        mark, before: the best validation, and the one that was it before: what counts where the best could not be saved.
        stale: validations since the best one.
        seen: step of the last validation.
    """

    settings: Settings
    committed: Callable[[], Container[int]]
    mark: Mark | None = None
    before: Mark | None = None
    stale: int = 0
    seen: int = 0

    @property
    def kept(self) -> bool:
        """Whether the best checkpoint is looked for at all."""
        return self.settings.keeps_best

    @property
    def over(self) -> bool:
        """Whether the run ends, since validation.patience is."""
        return self.settings.patience is not None and self.stale >= self.settings.patience

    def missed(self, step: int) -> bool:
        """Whether the run, which goes on after this step, was cut off between a save there and the step's validation."""
        every = self.settings.every
        return self.kept and step > 0 and every is not None and step % every == 0 and self.seen < step

    def judge(self, step: int, metrics: dict[str, float]) -> bool:
        """Takes note of a validation; whether it is the best so far, and to be saved. One that was seen before counts once.

        Raises:
            UnknownMetricError: the metric is not among those reported.
            RunError: it was never finite in validation.patience validations.
        """
        if not self.kept:
            return False
        self.settle(self.committed())
        if step <= self.seen:
            return False
        name = self.settings.metric
        if name not in metrics:
            raise UnknownMetricError(f"validation.metric {name!r}: this recipe reports {', '.join(sorted(metrics))}")
        self.seen, value = step, float(metrics[name])
        sign = 1 if self.settings.least else -1
        if math.isfinite(value) and (self.mark is None or sign * value < sign * self.mark.value):
            self.mark, self.before, self.stale = Mark(step, value, metrics), self.mark, 0
            return True
        self.stale += 1
        if self.over and self.mark is None:
            raise DivergedError(f"{name} was not finite in {self.stale} validations in a row, up to step {step}")
        return False

    def settle(self, committed: Container[int]) -> None:
        """Forgets a best validation without a checkpoint: its save was given up, or a damaged one was gone back from."""
        if self.mark is not None and self.mark.step not in committed:
            self.mark = self.before if self.before is not None and self.before.step in committed else None
            self.before, self.stale = None, self.stale if self.mark else 0

    def why(self) -> str:
        """In the end, as a sentence."""
        assert self.mark is not None
        best = f"best {self.settings.metric} {self.mark.value:.4f} at step {self.mark.step}, whose model this is"
        if self.over:
            return f"stopped after step {self.seen}, {self.stale} validations without a better one: {best}"
        return best

    def state(self) -> dict[str, Any]:
        marks = {"mark": self.mark, "before": self.before}
        return {k: asdict(m) if m else None for k, m in marks.items()} | {"stale": self.stale, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        """Of a checkpoint."""
        self.mark, self.before = (Mark(**state[k]) if state[k] else None for k in ("mark", "before"))
        self.stale, self.seen = state["stale"], state["seen"]
