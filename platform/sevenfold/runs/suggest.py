"""Which points of a space a sweep tries: Optuna's samplers, by way of Tune's searcher."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from sevenfold.recipe import Search

STARTUP = 10  # random points before TPE learns: Optuna's own number; of a short search a third


class _Define:
    """A point, one key after the other: what hangs on another is asked for once that is known."""

    def __init__(self, search: Search):
        self._search = search

    def __call__(self, trial: Any) -> dict[str, Any]:
        """Optuna's names and values are the keys and what is tried; nothing is added."""
        point: dict[str, Any] = {}
        for key in self._search.order:
            space = self._search.space[key]
            if not space.holds(point):
                continue
            if space.choice:
                point[key] = trial.suggest_categorical(key, space.choice)
            elif space.integer:
                point[key] = trial.suggest_int(key, *space.integer)
            else:
                low, high = space.uniform or space.loguniform or (0.0, 0.0)
                point[key] = trial.suggest_float(key, low, high, log=space.loguniform is not None)
        return {}


def sampler(search: Search, seed: int) -> BaseSampler:
    if search.algorithm == "tpe":
        startup = max(1, min(STARTUP, search.number // 3))
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`, which conditional spaces need
        return TPESampler(n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed)
    return RandomSampler(seed)


class Points(OptunaSearch):
    """Suggests a point while there is room for a trial; what it has seen outlives its process."""

    def __init__(self, search: Search, seed: int, room: Callable[[], int]):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = search.grid() if search.algorithm == "grid" else None
        super().__init__(
            _Define(search), metric=search.metric, mode=search.best, sampler=sampler(search, seed), points_to_evaluate=known
        )
        self._room = room

    def suggest(self, trial_id: str) -> Any:
        return super().suggest(trial_id) if self._room() > 0 else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The samplers learn from ends alone; and PBT reports a step twice."""

    def on_pause(self, trial_id: str) -> None:
        """HyperBandForBOHB tells; what is paused takes no room, by its status."""

    def on_unpause(self, trial_id: str) -> None:
        """As on_pause."""

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as f:
            pickle.dump({k: v for k, v in self.__dict__.items() if k != "_room"}, f)
