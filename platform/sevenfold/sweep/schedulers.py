"""Ray Tune's schedulers, which stop bad trials early, with two additions.

They start trials only while the cluster has room for them, and their state can be saved and
restored, so that a sweep can resume in another process.
"""

from __future__ import annotations

import io
import math
import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ray import tune
from ray.cloudpickle import cloudpickle as pickling
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from sevenfold.cluster import ray_private
from sevenfold.recipe import Space, Sweep
from sevenfold.sweep import snapshot

WORST_SCORE = 1e30  # counts as the score of a trial whose score is not finite
MIN_MEDIAN_TRIALS = 3  # the fewest trials that the median stopping rule takes a median of


class TrialLimit:
    """Limits how many trials run at a time. The schedulers ask it before they start a trial.

    Attributes:
        controller: Tune's controller, which knows the trials; None until the first trial is added.
        paused: The ids of the trials that were paused when an earlier process of the sweep ended.
    """

    def __init__(self, capacity: Callable[[], int]):
        """Creates a limit.

        Args:
            capacity: Returns the number of trials that may run at a time.
        """
        self._capacity = capacity
        self.controller: Any = None
        self.paused: set[str] = set()

    def room(self) -> int:
        """Returns the number of trials that may start now. It can be negative."""
        return self._capacity() - self._count(Trial.PENDING, Trial.RUNNING)

    def fits(self) -> bool:
        """Returns whether all paused trials may run beside the running ones."""
        return self._capacity() >= self._count(Trial.PENDING, Trial.RUNNING, Trial.PAUSED)

    def _count(self, *statuses: str) -> int:
        if not self.controller:
            return 0
        return sum(t.status in statuses for t in self.controller.get_trials())


class _Limited(TrialScheduler):
    """A mixin that makes a scheduler of Tune respect a limit.

    Attributes:
        limit: The limit.
        score: The name of the metric that trials are compared by.
        worst: The value that replaces a value of the metric that is not finite.
    """

    limit: TrialLimit
    score = ""
    worst = math.inf

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self.limit.controller = tune_controller
        # Tune makes a paused trial of an earlier process pending, as if it had been running.
        if trial.status == Trial.PENDING and trial.trial_id in self.limit.paused:
            trial.set_status(Trial.PAUSED)
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        # A NaN among the scores of a rung would make its cutoff NaN.
        if not math.isfinite(result[self.score]):
            result = {**result, self.score: self.worst}
        return str(super().on_trial_result(tune_controller, trial, result))

    def choose_trial_to_run(self, tune_controller: Any, *args: Any, **kwargs: Any) -> Trial | None:
        if self.limit.room() <= 0:
            return None
        return super().choose_trial_to_run(tune_controller, *args, **kwargs)


class _Asha(_Limited, AsyncHyperBandScheduler):
    """ASHA."""


class _HyperBand(_Limited, HyperBandForBOHB):
    """HyperBand.

    Based on HyperBandForBOHB, which waits until all trials of a bracket have started. Ray's
    HyperBandScheduler halves a bracket before that.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        bracket, _ = self._trial_info[trial]
        if trial not in bracket.current_trials():
            # An earlier process ended after it had decided to stop this trial, and before it did.
            return str(TrialScheduler.STOP)
        return str(super().on_trial_result(tune_controller, trial, result))


class _Median(_Limited, MedianStoppingRule):
    """The median stopping rule."""


class _NoStopping(_Limited, FIFOScheduler):
    """A scheduler that stops no trial early."""


class _Population(_Limited, PopulationBasedTraining):
    """Population based training (PBT).

    Attributes:
        last_step: The last step of a trial.
    """

    last_step = 0

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Adds a trial to the population.

        This replaces Ray's method, which refuses any searcher. Our searcher draws the first points
        and learns nothing from those that PBT makes of them. The whole population exists from the
        beginning: trials without room are paused.
        """
        if trial in self._trial_state:  # a retry after a failure
            return
        if trial.status == Trial.PENDING and (
            trial.trial_id in self.limit.paused or self.limit.room() <= 0
        ):
            trial.set_status(Trial.PAUSED)
        self.limit.controller = tune_controller
        self._trial_state[trial] = ray_private.pbt_trial_state(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Returns Ray's decision, but does not pause a trial if all trials have room.

        Ray's method pauses a trial whenever another one waits, even if there is room for both. A
        trial at its last step ends, and does not continue from another one.
        """
        if result["step"] >= self.last_step:
            return str(TrialScheduler.CONTINUE)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.PAUSE and self.limit.fits():
            return TrialScheduler.CONTINUE
        return decision

    def choose_trial_to_run(self, tune_controller: Any, *args: Any, **kwargs: Any) -> Trial | None:
        """Chooses the trial that has trained least, so that each has its turn.

        Among equal ones the first place goes round with each report: a trial that is always the
        first to reach a step never finds another one that it could continue from. The order
        depends on the numbers of the trials, not on their ids, which Tune draws at random: trials
        that run one at a time are then replaced in the same way each time a sweep is run.
        """
        if self.limit.room() <= 0:
            return None
        population = tune_controller.get_trials()
        numbers = {trial: number for number, trial in enumerate(population)}

        def order(trial: Trial) -> tuple[int, int]:
            reports = (trial.last_result or {}).get("report", 0)
            place = (numbers[trial] + reports) % len(population)
            return self._trial_state[trial].last_train_time, place

        waiting = (Trial.PENDING, Trial.PAUSED)
        trials = (t for t in population if t.status in waiting)
        return min(trials, key=order, default=None)

    def _checkpoint_or_exploit(
        self, trial: Trial, tune_controller: Any, upper: list[Trial], lower: list[Trial]
    ) -> None:
        """Lets a bad trial continue from a better one, but never from an earlier step.

        Where a metric worsens with training, trials that wait are the better ones. Ray lets the
        others go back to them again and again, and the sweep never ends.
        """
        if trial in lower:
            step = self._trial_state[trial].last_train_time
            upper = [
                donor
                for donor in upper
                if self._trial_state[donor].last_checkpoint
                and self._trial_state[donor].last_train_time >= step
            ]
            lower = lower if upper else []
        super()._checkpoint_or_exploit(trial, tune_controller, upper, lower)


def build_scheduler(
    sweep: Sweep, steps: int, reports: int, seed: int, limit: TrialLimit
) -> TrialScheduler:
    """Builds the scheduler that a sweep names.

    Args:
        sweep: The sweep's settings.
        steps: The number of steps of a trial that is not stopped early.
        reports: The number of reports of such a trial.
        seed: The seed of PBT's random changes. PBT uses the global generators of random and NumPy.
        limit: The limit that the scheduler respects.
    """
    grace_steps = max(1, round(sweep.grace * steps))
    scheduler: Any
    if sweep.scheduler == "asha":
        scheduler = _Asha(
            time_attr="step", max_t=steps, grace_period=grace_steps, reduction_factor=sweep.eta
        )
    elif sweep.scheduler in ("hyperband", "bohb"):
        # Rungs are counted in reports, because a trial can only be stopped at a report.
        scheduler = _HyperBand(time_attr="report", max_t=reports, reduction_factor=sweep.eta)
        # Ray rounds the first rung down and multiplies it by eta for the later ones: with 5
        # reports and eta 3, no trial would get beyond the third report. So round it up. Brackets
        # that would stop trials before the grace are left out; the remaining ones begin there.
        grace = min(reports, math.ceil(sweep.grace * reports - 1e-9))
        brackets = 1 + max(1, math.floor(math.log(1 / sweep.grace, sweep.eta) + 1e-9))
        ray_private.set_hyperband_rungs(
            scheduler,
            lambda s: max(grace, math.ceil(reports * sweep.eta**-s - 1e-9)),
            brackets,
        )
    elif sweep.scheduler == "median":
        scheduler = _Median(
            time_attr="step", grace_period=grace_steps, min_samples_required=MIN_MEDIAN_TRIALS
        )
    elif sweep.scheduler == "pbt":
        random.seed(seed)
        np.random.seed(seed)
        scheduler = _Population(
            time_attr="step",
            perturbation_interval=grace_steps,
            quantile_fraction=sweep.quantile,
            log_config=False,
            hyperparam_mutations={key: _mutation(space) for key, space in sweep.space.items()},
            custom_explore_fn=_ClipToSpace(sweep),
        )
        scheduler.last_step = steps
    else:
        scheduler = _NoStopping()
    scheduler.limit = limit
    scheduler.score = sweep.metric
    scheduler.worst = WORST_SCORE if sweep.best == "min" else -WORST_SCORE
    return scheduler


def _mutation(space: Space) -> Any:
    """Returns a space as PBT's `hyperparam_mutations` expects it."""
    if space.choice:
        return space.choice
    if space.integer:
        return tune.randint(space.integer[0], space.integer[1] + 1)
    if space.uniform:
        return tune.uniform(*space.uniform)
    return tune.loguniform(*(space.loguniform or (1, 2)))


class _ClipToSpace:
    """Clips a point to the space: PBT multiplies values by 1.2 or 0.8, whatever the space."""

    def __init__(self, sweep: Sweep):
        self._space = sweep.space

    def __call__(self, point: dict[str, Any]) -> dict[str, Any]:
        clipped = dict(point)
        for key, space in self._space.items():
            if not space.choice:
                low, high = space.ends
                value = min(max(point[key], low), high)
                clipped[key] = round(value) if space.integer else value
        return clipped


def dump_state(scheduler: TrialScheduler) -> bytes:
    """Returns what a scheduler knows of its trials, pickled; each trial is replaced by its id.

    The functions that it was built with are left out: they refer to all of Tune's objects.
    """
    stream = io.BytesIO()

    class Pickler(pickling.CloudPickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.trial_id if isinstance(obj, Trial) else None

    state = {k: v for k, v in vars(scheduler).items() if k != "limit" and not callable(v)}
    Pickler(stream).dump(state)
    return stream.getvalue()


def restore_state(
    scheduler: TrialScheduler,
    state: bytes,
    trials: Iterable[Trial],
    limit: TrialLimit,
    folder: str,
) -> None:
    """Restores the state that `dump_state` has saved.

    This state and Tune's own state are in two files. If the process was killed between the two
    writes, one of them has a trial that the other does not have.

    Args:
        scheduler: A new scheduler, to which all `trials` have been added.
        state: The saved state.
        trials: Tune's trials, which replace the ids in the state.
        limit: The limit that the scheduler respects.
        folder: The sweep's folder.
    """
    trials_by_id = {t.trial_id: t for t in trials}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, trial_id: str) -> Trial | str:
            return trials_by_id.get(trial_id, trial_id)  # an id remains if Tune has no such trial

    controller = limit.controller
    vars(scheduler).update(Unpickler(io.BytesIO(state)).load())
    # Remove the trials that Tune does not have.
    if isinstance(scheduler, _HyperBand):
        for trial_id in [t for t in scheduler._trial_info if isinstance(t, str)]:
            bracket, _ = scheduler._trial_info.pop(trial_id)
            bracket.cleanup_trial(trial_id)
    if isinstance(scheduler, _Population):
        scheduler._trial_state = {
            t: s for t, s in scheduler._trial_state.items() if not isinstance(t, str)
        }
        for trial_state in scheduler._trial_state.values():
            if isinstance(trial_state.last_checkpoint, tune.Checkpoint):
                trial_state.last_checkpoint = snapshot.moved(trial_state.last_checkpoint, folder)
    # Add the trials that the state does not have. ASHA's keys are ids, the others' are trials.
    known = vars(scheduler).get("_trial_info", vars(scheduler).get("_trial_state"))
    if known is None:
        return
    for trial in trials_by_id.values():
        if trial not in known and trial.trial_id not in known and not trial.is_finished():
            scheduler.on_trial_add(controller, trial)
