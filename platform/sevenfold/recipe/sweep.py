"""The section `sweep`: which hyperparameters are tuned, how, and when the sweep ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from sevenfold.recipe.section import Problem, Section
from sevenfold.recipe.training import is_lower_better

# Settings that may differ when a sweep is resumed: they are not part of a recipe's identity.
BUDGETS = (
    "max_concurrent",
    "keep",
    "max_failures",
    "max_hours",
    "max_worker_hours",
    "max_cost",
    "worker_hour_cost",
)
_INTEGER_SAMPLES = 64  # an integer space is sampled at this number of points, plus one, at most
_KINDS = ("uniform", "loguniform", "integer", "choice")
Scalar = bool | int | float | str | None
# Settings that may change while a model trains, so that PBT can continue from another trial's
# weights. A key that ends with a dot stands for its whole section.
_PBT_KEYS = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.l1",
    "optimizer.momentum",
    "optimizer.betas",
    "optimizer.eps",
    "schedule.",
    "train.dropout",
    "train.label_smoothing",
    "train.z_loss",
    "train.max_grad_norm",
    "adapter.dropout",
    "preference.beta",
    "contrastive.temperature",
)


class Space(Section):
    """The values that one hyperparameter can take.

    Exactly one of uniform, loguniform, integer and choice is given.
    """

    uniform: tuple[float, float] | None = Field(
        None, description="[lowest, highest]. Default: another kind of space"
    )
    loguniform: tuple[float, float] | None = Field(
        None,
        description="[lowest, highest], uniform in the logarithm; above 0. Default: another kind "
        "of space",
    )
    integer: tuple[int, int] | None = Field(
        None, description="[lowest, highest], both included. Default: another kind"
    )
    choice: list[Scalar] | None = Field(
        None, min_length=1, description="The possible values. Default: another kind of space"
    )
    when: dict[str, Scalar | list[Scalar]] = Field(
        {},
        description="Conditional space: tuned only in trials in which another key of the space has "
        "this value, or one of these: {optimizer.name: muon}",
    )

    def problems(self) -> Iterator[Problem]:
        """Yields that there is no space, or that it is empty."""
        kinds = tuple(kind for kind in _KINDS if getattr(self, kind) is not None)
        if len(kinds) != 1:
            yield Problem(f"give exactly one of {', '.join(_KINDS)}", kinds or _KINDS)
        bounds = self.uniform or self.loguniform or self.integer
        if bounds is not None:
            low, high = bounds
            if not (math.isfinite(low) and math.isfinite(high)):
                yield Problem(f"the ends must be finite, found {low} and {high}", kinds)
            elif self.integer and low > high:
                yield Problem(f"the space is empty: {low} is above {high}", kinds)
            elif not self.integer and low >= high:
                yield Problem(f"the space is empty: {low} is not below {high}", kinds)
        if self.loguniform and self.loguniform[0] <= 0:
            yield Problem("loguniform: the lowest value must be above 0", ("loguniform",))

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Returns whether this key is tuned (`when`), given the values chosen for other keys."""
        for key, value in self.when.items():
            allowed = value if isinstance(value, list) else [value]
            if key not in point or point[key] not in allowed:
                return False
        return True

    @property
    def ends(self) -> list[Any]:
        """The lowest and the highest value; all values of a choice."""
        return list(self.choice or self.uniform or self.loguniform or self.integer or ())

    @property
    def samples(self) -> list[Any]:
        """Representative values, by which a sweep checks that the space gives valid recipes."""
        if self.choice:
            return self.ends
        low, high = self.ends
        if self.integer:
            steps = _INTEGER_SAMPLES
            return sorted({low + (high - low) * i // steps for i in range(steps + 1)})
        # the point in between is no round number, so a setting that must be an integer refuses it
        return [low, low + (high - low) * 0.381966, high]


class Sweep(Section):
    """A sweep: which hyperparameters are tuned, by which algorithm, within which budget.

    Defaults of grace and eta: in 1,194 published learning curves of language models (PyPI package
    scan-bench), the best of nine trials is among the best three after 20% of its training with
    probability 0.996; after 10% with 0.914 (benchmarks/sweep.py).
    """

    space: dict[str, Space] = Field(
        min_length=1, description="Search space: key.path of the recipe -> its space"
    )
    algorithm: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="How points are chosen. grid: all combinations; tpe: Optuna's multivariate "
        "TPE (arXiv 1907.10902)",
    )
    trials: int | None = Field(
        None, gt=0, description="Number of trials. Default: all points, which only a grid has"
    )
    metric: str = Field("validation/loss", description="The metric that trials are compared by")
    mode: Literal["min", "max"] | None = Field(
        None,
        description="Whether the lowest or the highest value of the metric is the best. Default: "
        "min if its name contains loss, perplexity or bits, else max",
    )
    scheduler: Literal["asha", "hyperband", "bohb", "median", "pbt", "none"] = Field(
        "asha",
        description="What stops bad trials early. bohb: hyperband with algorithm tpe; pbt: bad "
        "trials continue from the weights of better ones, with changed settings",
    )
    grace: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Fraction of the steps that a trial trains before it may be stopped; pbt: "
        "between two changes of its settings",
    )
    eta: float = Field(
        3, ge=2, description="asha, hyperband, bohb: at each rung the best 1/eta continue"
    )
    quantile: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="pbt: fraction of the trials, the worst, that continue from the same number "
        "of the best",
    )
    max_concurrent: int | None = Field(
        None,
        gt=0,
        description="Maximum number of trials at a time. Default: as many as the cluster holds",
    )
    keep: int = Field(
        3, gt=0, description="Number of the best trials whose checkpoints a finished sweep keeps"
    )
    max_failures: int = Field(1, ge=0, description="How many times a failed trial is retried")
    max_hours: float | None = Field(
        None,
        gt=0,
        description="Budget, in hours; when it is used up, the sweep ends with its results so far. "
        "Default: no limit",
    )
    max_worker_hours: float | None = Field(
        None,
        gt=0,
        description="Budget, in hours times workers, of all trials together. Default: no limit",
    )
    max_cost: float | None = Field(
        None, gt=0, description="Budget, in the currency of worker_hour_cost. Default: no limit"
    )
    worker_hour_cost: float | None = Field(
        None, gt=0, description="Cost of one worker per hour. Default: not known"
    )

    @property
    def best(self) -> Literal["min", "max"]:
        """Whether the lowest or the highest value of the metric is the best."""
        return self.mode or ("min" if is_lower_better(self.metric) else "max")

    def problems(self) -> Iterator[Problem]:
        """Yields settings that contradict each other."""
        if self.trials is None and self.algorithm != "grid":
            yield Problem(
                "trials: required key is missing (only algorithm grid has a number of its own)",
                ("trials", "algorithm"),
            )
        if (self.max_cost is None) != (self.worker_hour_cost is None):
            yield Problem(
                "give both max_cost and worker_hour_cost, or neither",
                ("max_cost", "worker_hour_cost"),
            )
        if self.scheduler == "bohb" and self.algorithm != "tpe":
            yield Problem(
                "scheduler bohb is hyperband with algorithm tpe: set sweep.algorithm=tpe, or "
                "sweep.scheduler=hyperband",
                ("scheduler", "algorithm"),
            )
        if self.scheduler == "pbt":
            yield from self._problems_of_pbt()
        try:
            ordered = self.order
        except ValueError as e:
            yield Problem(str(e), ("space",))
            return
        for key in ordered:
            if self.algorithm == "grid" and not (self.space[key].choice or self.space[key].integer):
                yield Problem(
                    f"algorithm grid: {key} has infinitely many values: use choice or integer",
                    ("space", "algorithm"),
                )

    def _problems_of_pbt(self) -> Iterator[Problem]:
        if self.algorithm == "tpe":
            yield Problem(
                "scheduler pbt chooses points itself: set sweep.algorithm to random or grid",
                ("algorithm", "scheduler"),
            )
        for key in self.space:
            if not key.startswith(_PBT_KEYS):
                yield Problem(
                    f"scheduler pbt: {key} cannot change while a trial trains; expected one of "
                    f"{', '.join(_PBT_KEYS)}",
                    ("space", "scheduler"),
                )
        if any(space.when for space in self.space.values()):
            yield Problem(
                "scheduler pbt changes every key of the space: remove `when`",
                ("space", "scheduler"),
            )

    @property
    def order(self) -> list[str]:
        """The keys of the space, each after the keys that its `when` names.

        Raises:
            ValueError: There is no such order.
        """
        ordered: list[str] = []
        while len(ordered) < len(self.space):
            ready = [
                key
                for key, space in self.space.items()
                if key not in ordered and set(space.when) <= set(ordered)
            ]
            if not ready:
                key = next(k for k in self.space if k not in ordered)
                raise ValueError(
                    f"space: {key}: when: expected other keys of the space, found "
                    f"{', '.join(self.space[key].when)} (not in the space, or a cycle)"
                )
            ordered += ready
        return ordered

    def grid(self) -> list[dict[str, Any]]:
        """Returns all points of the space as {key: value}, at most `trials`.

        The last key changes first. A point lacks the keys whose `when` it does not meet.
        """
        values = {
            key: space.choice or list(range(space.ends[0], space.ends[-1] + 1))
            for key, space in self.space.items()
        }
        points: dict[str, dict[str, Any]] = {}  # by their text: conditional keys make duplicates
        for combination in itertools.product(*(values[key] for key in self.order)):
            point: dict[str, Any] = {}
            for key, value in zip(self.order, combination, strict=True):
                if self.space[key].holds(point):
                    point[key] = value
            points.setdefault(repr(point), point)
        return list(points.values())[: self.trials]

    @property
    def points(self) -> int | None:
        """The number of different points; None if there are infinitely many, or conditions."""
        count = 1
        for space in self.space.values():
            if space.when or not (space.choice or space.integer):
                return None
            count *= len(space.choice) if space.choice else space.ends[1] - space.ends[0] + 1
        return count

    @property
    def number(self) -> int:
        """The number of trials."""
        return len(self.grid()) if self.algorithm == "grid" else self.trials or 0
