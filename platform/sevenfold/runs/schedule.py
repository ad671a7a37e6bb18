"""Who goes on and who ends: Tune's schedulers, within what the cluster holds, with a state that outlives its process."""

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
from ray.tune.schedulers.pbt import _PBTTrialState

from sevenfold.recipe import Search, Space

WORST = 1e30
WEIGHED = 3  # trials that a median is taken of, at least


class Gate:
    """How many trials run, and how many may. The schedulers here ask it before they let one begin.

    Attributes:
        paused: ids of trials of an earlier process that were paused there.
    """

    def __init__(self, capacity: Callable[[], int]):
        self._capacity = capacity
        self.controller: Any = None
        self.paused: set[str] = set()

    def room(self) -> int:
        """For how many more trials."""
        return self._capacity() - self._count(Trial.PENDING, Trial.RUNNING)

    def fits(self) -> bool:
        """Whether all that wait have room beside those that run."""
        return self._capacity() >= self._count(Trial.PENDING, Trial.RUNNING, Trial.PAUSED)

    def _count(self, *statuses: str) -> int:
        return sum(t.status in statuses for t in self.controller.get_trials()) if self.controller else 0


class _Gated(TrialScheduler):
    """A scheduler behind a gate."""

    gate: Gate
    score, worst = "", math.inf  # the metric; of it, what no trial comes to

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self.gate.controller = tune_controller
        if trial.status == Trial.PENDING and trial.trial_id in self.gate.paused:  # Tune.restore takes it for one that ran
            trial.set_status(Trial.PAUSED)
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """A score that is no number would make none of a rung's cutoff: it counts as a very bad one."""
        if not math.isfinite(result[self.score]):
            result = {**result, self.score: self.worst}
        return str(super().on_trial_result(tune_controller, trial, result))

    def choose_trial_to_run(self, tune_controller: Any, *more: Any, **options: Any) -> Trial | None:
        return super().choose_trial_to_run(tune_controller, *more, **options) if self.gate.room() > 0 else None


class _Asha(_Gated, AsyncHyperBandScheduler):
    pass


class _HyperBand(_Gated, HyperBandForBOHB):
    """Ray's plain HyperBandScheduler halves a bracket whose trials have not all begun; this one waits for them."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        bracket, _ = self._trial_info[trial]
        if trial not in bracket.current_trials():  # it was to be stopped when an earlier process ended
            return str(TrialScheduler.STOP)
        return str(super().on_trial_result(tune_controller, trial, result))


class _Median(_Gated, MedianStoppingRule):
    pass


class _All(_Gated, FIFOScheduler):
    pass


class _Population(_Gated, PopulationBasedTraining):
    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Ray's refuses any searcher; ours draws the first points, and learns nothing from what PBT makes of them. The whole
        population is there from the beginning; who finds no room waits for a turn."""
        if trial in self._trial_state:  # tried again after a failure
            return
        if trial.status == Trial.PENDING and (trial.trial_id in self.gate.paused or self.gate.room() <= 0):
            trial.set_status(Trial.PAUSED)
        self.gate.controller = tune_controller
        self._trial_state[trial] = _PBTTrialState(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Ray's pauses a trial wherever another waits, room or not."""
        made: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if made == TrialScheduler.PAUSE and self.gate.fits() else made


def scheduler(search: Search, steps: int, reports: int, seed: int, gate: Gate) -> TrialScheduler:
    """Args:
    steps: of a whole trial.
    reports: that it makes on its way.
    """
    grace = max(1, round(search.grace * steps))
    made: Any
    if search.scheduler == "asha":
        made = _Asha(time_attr="step", max_t=steps, grace_period=grace, reduction_factor=search.eta)
    elif search.scheduler in ("hyperband", "bohb"):  # its rungs are counted in reports: a trial stops at one of them
        made = _HyperBand(time_attr="report", max_t=reports, reduction_factor=search.eta)
        # Ray rounds the first rung down, and multiplies it up: of 5 reports and eta 3 nobody would get past the third
        made._get_r0 = lambda s: math.ceil(reports * search.eta**-s - 1e-9)
    elif search.scheduler == "median":
        made = _Median(time_attr="step", grace_period=grace, min_samples_required=WEIGHED)
    elif search.scheduler == "pbt":
        random.seed(seed)
        np.random.seed(seed)
        made = _Population(
            time_attr="step", perturbation_interval=grace, quantile_fraction=search.quantile, log_config=False,
            hyperparam_mutations={k: _mutation(s) for k, s in search.space.items()}, custom_explore_fn=_Within(search),
        )  # fmt: skip
    else:
        made = _All()
    made.gate, made.score = gate, search.metric
    made.worst = WORST if search.best == "min" else -WORST
    return made


def _mutation(space: Space) -> Any:
    if space.choice:
        return space.choice
    if space.integer:
        return tune.randint(space.integer[0], space.integer[1] + 1)
    return tune.uniform(*space.uniform) if space.uniform else tune.loguniform(*(space.loguniform or (1, 2)))


class _Within:
    """PBT multiplies by 1.2 or 0.8, whatever the space: back into it."""

    def __init__(self, search: Search):
        self._space = search.space

    def __call__(self, point: dict[str, Any]) -> dict[str, Any]:
        out = dict(point)
        for key, space in self._space.items():
            if not space.choice:
                low, high = space.ends
                value = min(max(point[key], low), high)
                out[key] = round(value) if space.integer else value
        return out


def dumped(scheduler: TrialScheduler) -> bytes:
    """What it knows of its trials, each by its id; what it was made of stays behind (its functions hold on to all of Tune)."""
    stream = io.BytesIO()

    class Pickler(pickling.CloudPickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.trial_id if isinstance(obj, Trial) else None

    state = {k: v for k, v in vars(scheduler).items() if k != "gate" and not callable(v)}
    Pickler(stream).dump(state)
    return stream.getvalue()


def restored(scheduler: TrialScheduler, state: bytes, trials: Iterable[Trial], gate: Gate) -> None:
    """Puts back what `dumped` kept, about the trials of this process."""
    known = {t.trial_id: t for t in trials}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, trial_id: str) -> Trial | str:
            return known.get(trial_id, trial_id)  # Tune may not know it: a kill came between its file and this one

    controller = gate.controller
    vars(scheduler).update(Unpickler(io.BytesIO(state)).load())
    if isinstance(scheduler, _HyperBand):
        for lost in [t for t in scheduler._trial_info if isinstance(t, str)]:
            bracket, _ = scheduler._trial_info.pop(lost)
            bracket.cleanup_trial(lost)
    if isinstance(scheduler, _Population):
        scheduler._trial_state = {t: s for t, s in scheduler._trial_state.items() if not isinstance(t, str)}
    told = vars(scheduler).get("_trial_info", vars(scheduler).get("_trial_state"))
    for trial in known.values():  # and the other way round
        if told is not None and trial not in told and trial.trial_id not in told and not trial.is_finished():
            scheduler.on_trial_add(controller, trial)
