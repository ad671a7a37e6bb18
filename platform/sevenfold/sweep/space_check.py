"""Checks before a sweep starts that the points of its search space can be trained."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from sevenfold.errors import InputError
from sevenfold.prepare.model import check_model
from sevenfold.recipe import Recipe, Sweep

# The keys, or prefixes of keys, that may differ between trials. All else is the same for all
# trials: the tokenizer, the base model and the documents are prepared once per sweep.
SEARCHABLE = (
    "train.",
    "optimizer.",
    "schedule.",
    "adapter.",
    "model.config.",
    "data.sequence_length",
    "data.lanes",
    "seed",
    "preference.",
    "contrastive.",
    "corruption.",
)
# Exceptions from SEARCHABLE: the schedulers compare trials at equal steps.
NOT_SEARCHABLE = ("train.steps", "train.tokens")
# The most points that are tried in the recipe, and the most models that are tried.
MAX_POINTS, MAX_MODELS = 512, 32
# Keys, or prefixes of keys, that decide which model is built.
_MODEL_KEYS = ("model.config.", "adapter.", "data.sequence_length", "train.dropout")


def check_space(recipe: Recipe, sweep: Sweep) -> None:
    """Checks the keys of a search space, its ends, alone and together, and values between them.

    Where a key decides which model is built, the model is tried too, see `prepare.model`.

    Raises:
        InputError: A key must be the same for all trials, a point is not valid in the recipe, or
            its model cannot be trained.
    """
    for key in sweep.space:
        if not key.startswith(SEARCHABLE) or key in NOT_SEARCHABLE:
            raise InputError(
                f"sweep.space: {key!r} must be the same for all trials; searchable are "
                f"{', '.join(SEARCHABLE)} but not {', '.join(NOT_SEARCHABLE)}"
            )
    models: dict[str, tuple[dict[str, Any], Recipe]] = {}  # by their settings
    for point in itertools.islice(_points(sweep), MAX_POINTS):
        try:
            changed = recipe.override(point)
        except InputError as e:
            values = ", ".join(f"{key}={value}" for key, value in point.items())
            raise InputError(
                *(f"sweep.space: {values}: {m.removeprefix('override: ')}" for m in e.messages)
            ) from None
        model = {key: value for key, value in point.items() if key.startswith(_MODEL_KEYS)}
        if model:
            models.setdefault(json.dumps(model, sort_keys=True), (model, changed))
    for model, changed in itertools.islice(models.values(), MAX_MODELS):
        check_point_model(changed, model)


def check_point_model(recipe: Recipe, point: dict[str, Any]) -> None:
    """Checks that the model of a trial can be trained.

    Args:
        recipe: The recipe with the trial's hyperparameters.
        point: The hyperparameters, for the error.

    Raises:
        InputError: It cannot.
    """
    if not any(key.startswith(_MODEL_KEYS) for key in point):
        return
    if recipe.objective == "classify" and not recipe.data.classes:  # known when the data is read
        recipe = recipe.override({"data.classes": ["one", "two"]})
    try:
        check_model(recipe)
    except InputError as e:
        values = ", ".join(f"{key}={value}" for key, value in point.items())
        raise InputError(f"sweep.space: no trial with {values} can be trained: {e}") from None


def _points(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yields representative points: of a grid all; else those of one key, pairs, and all corners.

    A point of one key leaves the others as they are in the recipe.
    """
    if sweep.algorithm == "grid":
        yield from sweep.grid()
        return
    for key, space in sweep.space.items():
        conditions = {k: v[0] if isinstance(v, list) else v for k, v in space.when.items()}
        for value in space.samples:
            yield {**conditions, key: value}
    ends = {key: sweep.space[key].ends for key in sweep.order}
    for values in itertools.product(*ends.values()):
        point: dict[str, Any] = {}
        for key, value in zip(ends, values, strict=True):
            if sweep.space[key].holds(point):
                point[key] = value
        yield point
