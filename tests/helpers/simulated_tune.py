"""Ray Tune's controller and its trials, simulated: trials follow given curves, in no time.

It calls a scheduler as Tune's controller (2.60) does, one event after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.train._internal.session import _TrainingResult
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from sevenfold.recipe import Sweep
from sevenfold.sweep import schedulers
from sevenfold.sweep.schedulers import TrialLimit

Curve = Callable[[int], float]  # the metric at a step


class Simulation:
    """A sweep whose trials report the metric of a curve every few steps.

    Attributes:
        steps: The last step of each trial, by its id.
        reports: The number of reports of all trials.
    """

    def __init__(
        self,
        sweep: Sweep,
        curves: list[Curve],
        steps: int,
        every: int,
        concurrent: int,
        seed: int,
        fails: float = 0.0,
    ):
        self._random = random.Random(seed)
        self._every, self._last, self._fails = every, steps, fails
        self.limit = TrialLimit(lambda: concurrent)
        self.scheduler = schedulers.build_scheduler(
            sweep, steps, -(-steps // every), seed, self.limit
        )
        self.scheduler.set_search_properties(sweep.metric, sweep.best)
        self._metric, self._curves = sweep.metric, curves
        self.trials: list[Trial] = []
        self.steps: dict[str, int] = {}
        self.reports = 0
        nothing = lambda *_, **__: None  # noqa: E731
        self.search_alg = SimpleNamespace(
            searcher=SimpleNamespace(on_pause=nothing, on_unpause=nothing)
        )

    # what schedulers call

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return [t for t in self.trials if not t.is_finished()]

    def stop_trial(self, trial: Trial) -> None:
        if trial.is_finished():
            return
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self.scheduler.on_trial_remove(self, trial)
        else:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        trial.status = Trial.TERMINATED

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        trial.status = Trial.PAUSED

    def _schedule_trial_save(self, trial: Trial, result: Any = None) -> Any:
        saved = _TrainingResult(
            tune.Checkpoint(f"/{trial.trial_id}/{result['step']}"), dict(result)
        )
        trial.run_metadata.checkpoint_manager._latest_checkpoint_result = saved
        return saved.checkpoint

    # the loop

    def run(self, max_reports: int) -> None:
        """Runs the sweep to its end; raises AssertionError if it does not end."""
        while True:
            self._add_trials()
            for trial in [t for t in self.trials if t.status == Trial.PENDING]:
                self._start(trial)
            while trial := self.scheduler.choose_trial_to_run(self):
                self._start(trial)
            running = [t for t in self.trials if t.status == Trial.RUNNING]
            if not running:
                waiting = [t.trial_id for t in self.get_live_trials()]
                assert not waiting and len(self.trials) == len(self._curves), waiting
                return
            self._train(self._random.choice(running))
            assert self.reports <= max_reports, f"no end after {self.reports} reports"

    def _add_trials(self) -> None:
        while len(self.trials) < len(self._curves) and (
            self.limit.room() > 0 or isinstance(self.scheduler, schedulers._Population)
        ):
            # Tune draws ids at random: nothing may depend on their order.
            trial = Trial("x", trial_id=f"{self._random.getrandbits(32):08x}", stub=True)
            trial.set_config({"optimizer.learning_rate": 0.01})
            self.trials.append(trial)
            self.steps[trial.trial_id] = 0
            self.scheduler.on_trial_add(self, trial)

    def _start(self, trial: Trial) -> None:
        trial.status = Trial.RUNNING
        saved = trial.run_metadata.checkpoint_manager._latest_checkpoint_result
        if saved is not None:
            self.steps[trial.trial_id] = saved.metrics["step"]

    def _train(self, trial: Trial) -> None:
        """Trains a trial up to its next report, and does what the scheduler says."""
        if self._random.random() < self._fails:
            trial.status = Trial.ERROR
            self.scheduler.on_trial_error(self, trial)
            return
        step = min(self._last, self.steps[trial.trial_id] + self._every)
        self.steps[trial.trial_id] = step
        self.reports += 1
        number = self.trials.index(trial)
        result = {
            "step": step,
            "report": -(-step // self._every),
            self._metric: self._curves[number](step),
            "training_iteration": self.reports,
            "time_total_s": float(step),
            "done": False,
        }
        trial.run_metadata.last_result = result
        decision = self.scheduler.on_trial_result(self, trial, result)
        if trial.status != Trial.RUNNING:
            return  # the scheduler has paused or stopped it
        if decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        elif decision == TrialScheduler.PAUSE:
            self._schedule_trial_save(trial, result)
            trial.status = Trial.PAUSED
        elif step == self._last:
            self.scheduler.on_trial_complete(self, trial, result)
            trial.status = Trial.TERMINATED
