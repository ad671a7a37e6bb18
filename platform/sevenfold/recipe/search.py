"""What a sweep searches, how, and when it ends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from sevenfold.recipe.data import Section
from sevenfold.recipe.training import least

# what may change while a sweep is under way
BUDGETS = ("max_concurrent", "max_failures", "max_hours", "max_worker_hours", "max_cost", "worker_hour_cost")
INTEGERS = 64  # of a space's are tried before a sweep, at most
KINDS = ("uniform", "loguniform", "integer", "choice")
Scalar = bool | int | float | str | None
# what a trial can go on with after a change: by PBT, from another's weights
CHANGEABLE = (
    "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.l1", "optimizer.momentum", "optimizer.betas",
    "optimizer.eps", "schedule.", "train.dropout", "train.label_smoothing", "train.z_loss", "train.max_grad_norm",
    "adapter.dropout", "preference.beta", "contrastive.temperature",
)  # fmt: skip


class Space(Section):
    """One hyperparameter's space; exactly one of uniform, loguniform, integer and choice is given."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(None, description="[least, greatest]")
    choice: list[Scalar] | None = Field(None, min_length=1)
    when: dict[str, Scalar | list[Scalar]] = Field(
        {}, description="Searched only where another key of the space has this value, or one of these"
    )

    @model_validator(mode="after")
    def _one(self) -> Space:
        given = [k for k in KINDS if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}")
        low_high = self.uniform or self.loguniform or self.integer
        if low_high and not (low_high[0] <= low_high[1] if self.integer else low_high[0] < low_high[1]):
            raise ValueError(f"the space has no point: {low_high[0]} is not below {low_high[1]}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs a lower end above 0")
        return self

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether this is searched, by what was chosen for the others."""
        return all(k in point and point[k] in (v if isinstance(v, list) else [v]) for k, v in self.when.items())

    @property
    def ends(self) -> list[Any]:
        """Its extreme values; of a choice all."""
        return list(self.choice or self.uniform or self.loguniform or self.integer or ())

    @property
    def samples(self) -> list[Any]:
        """Values of all kinds that it has: its ends, and what lies between."""
        if self.choice:
            return self.ends
        low, high = self.ends
        if self.integer:
            return sorted({low + (high - low) * i // INTEGERS for i in range(INTEGERS + 1)})
        return [low, low + (high - low) * 0.381966, high]  # no round number lies there


class Search(Section):
    """Grace 20% and eta 3 keep the best of 1,194 published LLM curves with p 0.996 (DESIGN, section 9)."""

    space: dict[str, Space] = Field(min_length=1, description="key.path of the recipe -> its space")
    algorithm: Literal["random", "grid", "tpe"] = Field(
        "random", description="grid: every combination; tpe: Optuna's, multivariate (arXiv 1907.10902)"
    )
    trials: int | None = Field(None, gt=0, description="How many; default: all of a grid")
    metric: str = "validation/loss"
    mode: Literal["min", "max"] | None = Field(None, description="Default: min of losses, perplexity and bits, else max")
    scheduler: Literal["asha", "hyperband", "bohb", "median", "pbt", "none"] = Field(
        "asha", description="Who ends bad trials early; bohb: hyperband with tpe; pbt: they go on from better ones' weights"
    )
    grace: float = Field(0.2, gt=0, le=1, description="Part of the steps that every trial gets; of pbt: between changes")
    eta: float = Field(3, ge=2, description="asha, hyperband: at each rung the best 1/eta go on")
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: so many of the worst go on from as many of the best")
    max_concurrent: int | None = Field(None, gt=0, description="Default: as many as the cluster holds")
    max_failures: int = Field(1, ge=0, description="So often a trial that failed is tried again")
    max_hours: float | None = Field(None, gt=0, description="The sweep ends after so many, with what it has")
    max_worker_hours: float | None = Field(None, gt=0, description="Of all trials together: hours times workers")
    max_cost: float | None = Field(None, gt=0, description="In the unit of worker_hour_cost")
    worker_hour_cost: float | None = Field(None, gt=0, description="What a worker costs an hour")

    @property
    def best(self) -> Literal["min", "max"]:
        """Of the metric."""
        return self.mode or ("min" if least(self.metric) else "max")

    @model_validator(mode="after")
    def _fits(self) -> Search:
        if self.trials is None and self.algorithm != "grid":
            raise ValueError("trials: give their number (only a grid has one of its own)")
        if (self.max_cost is None) != (self.worker_hour_cost is None):
            raise ValueError("give both max_cost and worker_hour_cost, or neither")
        if self.scheduler == "bohb" and self.algorithm != "tpe":
            raise ValueError("scheduler bohb: hyperband with algorithm tpe: set search.algorithm=tpe, or choose hyperband")
        if self.scheduler == "pbt":
            self._population()
        for key in self.order:
            if self.algorithm == "grid" and not (self.space[key].choice or self.space[key].integer):
                raise ValueError(f"algorithm grid: {key} has endless values: give a choice or integer")
        return self

    def _population(self) -> None:
        if self.algorithm == "tpe":
            raise ValueError("scheduler pbt makes points of its own: set search.algorithm to random or grid")
        if fixed := [k for k in self.space if not k.startswith(CHANGEABLE)]:
            raise ValueError(
                f"scheduler pbt: {fixed[0]} cannot change while a trial trains; these can: {', '.join(CHANGEABLE)}"
            )
        if any(s.when for s in self.space.values()):
            raise ValueError("scheduler pbt: it changes every key of the space: `when` has no meaning there")

    @property
    def order(self) -> list[str]:
        """The keys, each after those that it hangs on. Raises ValueError where that cannot be."""
        out: list[str] = []
        while len(out) < len(self.space):
            ready = [k for k, s in self.space.items() if k not in out and set(s.when) <= set(out)]
            if not ready:
                key = next(k for k in self.space if k not in out)
                raise ValueError(
                    f"space: {key}: when: expected other keys of the space, found {', '.join(self.space[key].when)}"
                )
            out += ready
        return out

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, the last key changing first; a key that is not searched somewhere is left out there."""
        values = {k: s.choice or list(range(s.ends[0], s.ends[-1] + 1)) for k, s in self.space.items()}
        out: dict[str, dict[str, Any]] = {}
        for combination in itertools.product(*(values[k] for k in self.order)):
            point: dict[str, Any] = {}
            for key, value in zip(self.order, combination, strict=True):
                if self.space[key].holds(point):
                    point[key] = value
            out.setdefault(repr(point), point)
        return list(out.values())[: self.trials]

    @property
    def number(self) -> int:
        """Of trials."""
        return len(self.grid()) if self.algorithm == "grid" else self.trials or 0
