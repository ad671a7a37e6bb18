"""Chooses the points of the search space that a sweep tries, by Optuna's samplers."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from sevenfold.recipe import Sweep

# The most random points before TPE uses the results of earlier trials: Optuna's default. A small
# sweep begins with a third of its trials.
MAX_STARTUP_TRIALS = 10


class _Define:
    """Optuna's define-by-run function: asks for the values of a point, one key after the other.

    A conditional key comes after the keys that its `when` names. Tune's snapshots contain this
    class by its name.
    """

    def __init__(self, sweep: Sweep):
        """Creates the function for a sweep's space."""
        self._sweep = sweep

    def __call__(self, trial: Any) -> dict[str, Any]:
        """Asks an Optuna trial for the values of a point.

        Returns:
            An empty dictionary. Tune would add its entries to the point, as constants.
        """
        point: dict[str, Any] = {}
        for key in self._sweep.order:
            space = self._sweep.space[key]
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


def _build_sampler(sweep: Sweep, seed: int) -> BaseSampler:
    """Returns the Optuna sampler of a sweep. A grid does not use it: all its points are given."""
    if sweep.algorithm == "tpe":
        startup = max(1, min(MAX_STARTUP_TRIALS, sweep.number // 3))
        # `group`, which conditional spaces need, is experimental in Optuna.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
        )
    return RandomSampler(seed)


class Searcher(OptunaSearch):
    """Suggests points while there is room for more trials.

    Tune saves its state with the sweep, so that a resumed sweep continues with the same points.
    """

    def __init__(self, sweep: Sweep, seed: int, room: Callable[[], int]):
        """Creates a searcher.

        Args:
            sweep: The sweep's settings.
            seed: The seed of the sampler.
            room: Returns the number of trials that may start.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        points = sweep.grid() if sweep.algorithm == "grid" else None
        super().__init__(
            _Define(sweep),
            metric=sweep.metric,
            mode=sweep.best,
            sampler=_build_sampler(sweep, seed),
            points_to_evaluate=points,
        )
        self._room = room

    def suggest(self, trial_id: str) -> Any:
        """Returns the point of a new trial; None if there is no room for it now."""
        return super().suggest(trial_id) if self._room() > 0 else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignores intermediate results.

        The samplers learn only from the last result of a trial, and PBT may report a step twice.
        """

    def on_pause(self, trial_id: str) -> None:
        """Does nothing. HyperBandForBOHB calls this when it pauses a trial.

        TrialLimit sees by the status of a trial that it takes no room.
        """

    def on_unpause(self, trial_id: str) -> None:
        """Does nothing; see on_pause."""

    def save(self, checkpoint_path: str) -> None:
        """Saves the searcher's state, without the function `room`, which cannot be pickled."""
        with open(checkpoint_path, "wb") as f:
            pickle.dump({k: v for k, v in self.__dict__.items() if k != "_room"}, f)
