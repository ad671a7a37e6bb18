"""What a sweep's driver sees and keeps: lines or a live table, what was spent, the scheduler's state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from sevenfold.errors import RunError
from sevenfold.recipe import Search
from sevenfold.report import trials as report
from sevenfold.report.console import say
from sevenfold.runs import schedule
from sevenfold.runs.lease import Lease
from sevenfold.runs.schedule import Gate
from sevenfold.runs.seats import Seats


class Watch(tune.Callback):
    """Tells what happens; Tune saves it with the sweep, and with it what Tune itself forgets: the scheduler (ray#30838).

    Attributes:
        worker_hours, hours: spent so far, those of earlier processes too.
    """

    def __init__(self, search: Search, scheduler: TrialScheduler, gate: Gate, seats: Seats, lease: Lease, goes_on: bool):
        """goes_on: Tune has to bring back an earlier process's state."""
        self.gate, self.worker_hours, self.hours = gate, 0.0, 0.0
        self._search, self._scheduler, self._seats, self._lease, self._awaits = search, scheduler, seats, lease, goes_on
        self._trials: list[Trial] = []
        self._state: dict[str, Any] | None = None
        self._seen: dict[str, dict[str, Any]] = {}  # the last point of each trial
        self._looked = time.monotonic()
        self._running: set[str] = set()
        self._live = report.Live(search)

    def spent(self) -> str:
        """Which budget is spent; nothing where none is."""
        s = self._search
        cost = self.worker_hours * (s.worker_hour_cost or 0)
        for name, used in (("max_hours", self.hours), ("max_worker_hours", self.worker_hours), ("max_cost", cost)):
            most = getattr(s, name)
            if most is not None and used >= most:
                return f"search.{name} {most:g} is spent"
        return ""

    def get_state(self) -> dict[str, Any]:
        paused = [t.trial_id for t in self._trials if t.status == Trial.PAUSED]
        kept = schedule.dumped(self._scheduler)
        return {"scheduler": kept, "paused": paused, "spent": (self.worker_hours, self.hours), "seen": self._seen}

    def set_state(self, state: dict[str, Any]) -> None:
        self._state = state
        self.gate.paused = set(state["paused"])
        self.worker_hours, self.hours = state["spent"]
        self._seen = state["seen"]
        self._awaits = False

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self._awaits:  # Tune logs the error, and would begin anew
            raise RunError("the sweep's state cannot be read back: give it another name, or remove its folder")
        if self._lease.lost:
            raise RunError("another driver has taken this sweep over, and goes on with it: this one ends")
        if self._state is not None:  # all trials have been added again by now
            schedule.restored(self._scheduler, self._state["scheduler"], trials, self.gate)
            self._state, self.gate.paused = None, set()
        now = time.monotonic()
        hours, self._looked = (now - self._looked) / 3600, now
        self.hours += hours
        self.worker_hours += hours * self._seats.workers()
        running = {t.trial_id for t in trials if t.status == Trial.RUNNING}
        if gone := self._running - running:
            self._seats.leave(gone)
        self._running = running
        self._trials = trials
        self._live.show(trials)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        before, number = self._seen.get(trial.trial_id), [t.trial_id for t in trials].index(trial.trial_id) + 1
        what = f"trial {trial.trial_id} ({number}/{self._search.number})"
        if before is None:
            say(f"{what}: {point(trial.config)}")
        elif before == trial.config:
            say(f"{what}: goes on")
        else:
            say(f"{what}: goes on from a better one's weights: {point(trial.config)}")
        self._seen[trial.trial_id] = dict(trial.config)
        self.gate.controller.checkpoint(force=True, wait=True)  # else a trial that has begun may be forgotten, and begun anew

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        shown = {k.removeprefix("validation/"): v for k, v in result.items() if k.startswith("validation/")}
        shown = shown or {"loss": result.get("train/loss", float("nan"))}
        say(f"trial {trial.trial_id}: step {result.get('step')}  " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        path = trial.error_file  # it is in the sweep's folder only later
        told = Path(path).read_text(errors="replace") if path and Path(path).exists() else trial.get_error()
        say(f"trial {trial.trial_id}: failed: {report.reason(told)}")

    def close(self) -> None:
        self._live.close()


class Budget(tune.Stopper):
    """Ends the sweep, with what it has, once a budget is spent."""

    current: Budget

    def __init__(self, watch: Watch):
        self._watch, self._told = watch, False
        Budget.current = self

    def __reduce__(self) -> Any:
        """Tune keeps it with the sweep; what it brings back is this process's own."""
        return _budget, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        why = self._watch.spent()
        if why and not self._told:
            say(f"{why}: the sweep ends with what it has")
            self._told = True
        return bool(why)


def _budget() -> Budget:
    return Budget.current


def point(config: Mapping[str, Any]) -> str:
    return "  ".join(f"{k.split('.')[-1]}={f'{v:.3g}' if isinstance(v, float) else v}" for k, v in config.items())
