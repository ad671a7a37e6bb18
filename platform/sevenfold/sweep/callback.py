"""What the driver of a sweep does while it runs: progress messages, budgets, and saving state."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from sevenfold.cluster.lease import Lease
from sevenfold.errors import RunError, cause_of
from sevenfold.recipe import Sweep
from sevenfold.report import ranking
from sevenfold.report.console import say
from sevenfold.sweep import schedulers, snapshot
from sevenfold.sweep.schedulers import TrialLimit
from sevenfold.sweep.worker_pool import WorkerPool

CALLBACK = "callback.pkl"  # the name of the callback's state in the sweep's saved state


class SweepCallback(tune.Callback):
    """Follows a sweep: prints its progress and measures what it uses.

    It saves the state of the sweep whenever Tune does: Tune's and the searcher's, the scheduler's,
    which Tune itself does not save (ray#30838), and its own.

    Attributes:
        limit: The limit on the number of running trials.
        worker_hours: Hours times workers that the sweep has used, earlier processes included.
        hours: Hours that the sweep has taken, earlier processes included.
    """

    def __init__(
        self,
        sweep: Sweep,
        scheduler: TrialScheduler,
        limit: TrialLimit,
        pool: WorkerPool,
        lease: Lease,
        folder: str,
        saved: dict[str, bytes] | None,
    ):
        """Creates a callback.

        Args:
            sweep: The sweep's settings.
            scheduler: Its scheduler.
            limit: See the attribute.
            pool: Its worker pool.
            lease: This driver's lease on the sweep's folder.
            folder: The sweep's folder.
            saved: The state that an earlier process has saved, from `snapshot.load`.
        """
        self.limit = limit
        self.worker_hours = 0.0
        self.hours = 0.0
        self._sweep = sweep
        self._scheduler = scheduler
        self._pool = pool
        self._lease = lease
        self._folder = folder
        self._resumes = saved is not None
        self._trials: list[Trial] = []
        self._restored_state: dict[str, Any] | None = None  # until the scheduler has its part of it
        self._last_points: dict[str, dict[str, Any]] = {}  # by trial id
        self._last_step_time = time.monotonic()
        self._running: set[str] = set()  # ids of the trials that run
        self._live = ranking.Live(sweep)
        if saved:
            self.set_state(pickle.loads(saved[CALLBACK]))  # noqa: S301 (authenticated)

    @property
    def idle(self) -> bool:
        """Whether an earlier process had ended all trials, so that Tune has done nothing."""
        return self._resumes

    def exhausted_budget(self) -> str:
        """Returns a message that says which budget is used up; an empty string if none is."""
        cost = self.worker_hours * (self._sweep.worker_hour_cost or 0)
        for name, used in (
            ("max_hours", self.hours),
            ("max_worker_hours", self.worker_hours),
            ("max_cost", cost),
        ):
            budget = getattr(self._sweep, name)
            if budget is not None and used >= budget:
                return f"sweep.{name} ({budget:g}) is used up"
        return ""

    def get_state(self) -> None:
        """Saves the state of the sweep. Tune calls this when it has saved its own, and gets none.

        Tune's files are in a folder of this machine until it copies them to the sweep's folder, one
        after the other. They are taken from there, so that they belong together.
        """
        state = {
            "scheduler": schedulers.dump_state(self._scheduler),
            "paused": [t.trial_id for t in self._trials if t.status == Trial.PAUSED],
            "spent": (self.worker_hours, self.hours),
            "seen": self._last_points,
        }
        if self.limit.controller is None:  # no trial has been added yet
            return
        path = Path(self.limit.controller.experiment_state_path)
        _, _, session = path.stem.partition("-")  # the part of the names that this process chose
        files = {file.name: file.read_bytes() for file in path.parent.glob(f"[!.]*-{session}.*")}
        snapshot.save(self._folder, files | {CALLBACK: pickle.dumps(state)})

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores the state of an earlier process, apart from the scheduler's.

        The scheduler's state follows in `on_step_begin`, when Tune has added all trials again. Tune
        calls this for sweeps of earlier versions, which let Tune save the callback's state.
        """
        self._restored_state = state
        self.limit.paused = set(state["paused"])
        self.worker_hours, self.hours = state["spent"]
        self._last_points = state["seen"]

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Completes the restoring of an earlier process, measures use and shows the trials.

        Raises:
            RunError: The state of an earlier process was not restored, or another driver has taken
                over the sweep.
        """
        if self._resumes and not (trials and self._restored_state):
            # If restoring fails, Tune logs the error and would start the sweep from the beginning.
            raise RunError(
                "the saved state of this sweep cannot be read: remove the sweep's folder, or give "
                "it another name (name=...)"
            )
        self._resumes = False
        if self._lease.lost:
            raise RunError("another driver has taken over this sweep and continues it: stopping")
        if self._restored_state is not None:
            state = self._restored_state["scheduler"]
            schedulers.restore_state(self._scheduler, state, trials, self.limit, self._folder)
            for trial in trials:
                if trial.checkpoint is not None:
                    result = trial.latest_checkpoint_result
                    result.checkpoint = snapshot.moved(trial.checkpoint, self._folder)
            self._restored_state = None
            self.limit.paused = set()
        self._measure_use()
        running = {t.trial_id for t in trials if t.status == Trial.RUNNING}
        if stopped := self._running - running:
            self._pool.abandon(stopped)
        self._running = running
        self._trials = trials
        self._live.show(trials)

    def _measure_use(self) -> None:
        """Adds the time since the last call to the hours and worker hours."""
        now = time.monotonic()
        hours = (now - self._last_step_time) / 3600
        self._last_step_time = now
        self.hours += hours
        self.worker_hours += hours * self._pool.workers()

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Prints that a trial starts or resumes, and makes Tune save the sweep."""
        number = [t.trial_id for t in trials].index(trial.trial_id) + 1
        title = f"trial {trial.trial_id} ({number}/{self._sweep.number})"
        last_point = self._last_points.get(trial.trial_id)
        values = _format_point(trial.config)
        if last_point is None:
            say(f"{title}: {values}")
        elif last_point == trial.config:
            say(f"{title}: resuming")
        else:
            say(f"{title}: continuing from the weights of a better trial: {values}")
        self._last_points[trial.trial_id] = dict(trial.config)
        # Without this, a killed sweep could forget a trial that has started, and start it again.
        self.limit.controller.checkpoint(force=True, wait=True)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Prints a trial's validation metrics, or its training loss if there are none."""
        prefix = "validation/"
        metrics = {k.removeprefix(prefix): v for k, v in result.items() if k.startswith(prefix)}
        if not metrics:
            metrics = {"loss": result.get("train/loss", float("nan"))}
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        say(f"trial {trial.trial_id}: step {result.get('step')}  {values}")

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Drops Tune's statistics of each metric of a finished trial.

        Nobody reads them, and they are most of what a trial leaves in memory and in the state that
        is saved at the start of each trial.
        """
        trial.metric_n_steps.clear()
        trial.metric_analysis.clear()
        trial.run_metadata.invalidate_cache()

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Prints why a trial failed."""
        error: object
        path = trial.error_file  # local: Tune copies it to the sweep's folder only later
        if path and Path(path).exists():
            error = Path(path).read_text(errors="replace")
        else:
            error = trial.get_error()
        say(f"trial {trial.trial_id}: failed: {cause_of(error)}")

    def close(self) -> None:
        """Closes the live table."""
        self._live.close()


class BudgetStopper(tune.Stopper):
    """Stops the sweep when a budget is used up.

    Attributes:
        current: The stopper of this process. Tune saves a stopper with the sweep; a resumed sweep
            uses this one in its place.
    """

    current: BudgetStopper

    def __init__(self, callback: SweepCallback):
        """Creates the stopper of this process.

        Args:
            callback: The callback, which knows what the sweep has used.
        """
        self._callback = callback
        self._printed = False
        BudgetStopper.current = self

    def __reduce__(self) -> Any:
        """Makes Tune restore the current stopper of its process instead of the saved one."""
        return _budget, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Returns whether a budget is used up; prints it the first time."""
        reason = self._callback.exhausted_budget()
        if reason and not self._printed:
            say(f"{reason}: stopping the sweep; the results so far are kept")
            self._printed = True
        return bool(reason)


def _budget() -> BudgetStopper:
    """Returns the stopper of this process. Tune's snapshots refer to this function by its name."""
    return BudgetStopper.current


def _format_point(config: Mapping[str, Any]) -> str:
    """Returns a trial's hyperparameters as a text, such as "learning_rate=0.001  rank=8"."""
    return "  ".join(
        f"{k.split('.')[-1]}={f'{v:.3g}' if isinstance(v, float) else v}" for k, v in config.items()
    )
