"""The training loop in plain PyTorch.

It needs a process group, a model, an iterator of rows, and hooks for logging, saving and reporting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sevenfold.data.rows import Rows
from sevenfold.engine.checkpoint.best import BestTracker
from sevenfold.engine.checkpoint.interval import Interval, is_due
from sevenfold.engine.guard import Guard
from sevenfold.engine.meter import Meter
from sevenfold.engine.objectives import Objective
from sevenfold.engine.optim import learning_rate, sparsity
from sevenfold.engine.signals import Signal, agreed
from sevenfold.engine.step import NoTargetsError, StepResult, train_step
from sevenfold.engine.step_plan import StepPlan
from sevenfold.errors import StoppedError
from sevenfold.recipe import Recipe


@dataclass(kw_only=True)
class Hooks:
    """The callbacks of the training loop.

    Every rank calls each hook at the same steps. Metrics are reduced over all ranks.

    Attributes:
        signal: Returns the request that rank 0 has received since the last step; NONE on the other
            ranks.
        roll_back: Called with a step and the number of steps skipped in a row up to it. Loads the
            last checkpoint, skips the data of these steps from then on, and returns the
            checkpoint's step. Raises RunError if there is no checkpoint.
        log: Logs the metrics of a step.
        say: Shows a message to the user.
        save: Starts saving a checkpoint of a step.
        wait_for_save: Waits until no checkpoint is being written.
        validate: Validates after a step, logs the metrics and returns them. It calls the function
            that it gets between its parts, on every rank: that one may save, or end the run.
        report: Reports the metrics of a validation.
    """

    signal: Callable[[], Signal]
    roll_back: Callable[[int, int], int]
    log: Callable[[int, dict[str, float]], None]
    say: Callable[[str], None]
    save: Callable[[int], None]
    wait_for_save: Callable[[], Any]
    validate: Callable[[int, Callable[[], None]], dict[str, float]]
    report: Callable[[int, dict[str, float]], None]


@dataclass(kw_only=True)
class Trainer:
    """Everything that a rank needs for a training step.

    Attributes:
        recipe: The recipe of the run.
        plan: The number of steps.
        model: Sharded over all ranks; has the method `token_losses`.
        optimizers: The optimizers of the model's parameters.
        objective: Cuts rows into micro-batches.
        rows: Yields this rank's rows of each step.
        rows_per_rank: The largest number of rows that any rank gets in a step.
        device: The device of this rank.
        meter: Measures the speed.
        guard: Decides which steps are skipped and when to roll back.
        interval: Decides when a checkpoint is due.
        best: Tracks the best validation.
        loss: The training loss of the last step; infinity if it is not finite, None before a step.
    """

    recipe: Recipe
    plan: StepPlan
    model: Any
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Objective
    rows: Iterator[Rows]
    rows_per_rank: int
    device: torch.device
    meter: Meter
    guard: Guard
    interval: Interval
    best: BestTracker
    loss: float | None = None

    def step(self, step: int, signal: Signal = Signal.NONE) -> StepResult | None:
        """Runs one training step.

        Args:
            step: The step's number, from 0.
            signal: The request that this rank has received; it reaches all ranks with the step.

        Returns:
            The result, or None if the rows of all ranks hold only padding: the data is exhausted.

        Raises:
            NoTargetsError: The rows hold text, but no target token.
        """
        recipe = self.recipe
        start = time.perf_counter()
        rows = next(self.rows)
        batches = self.objective.batches(
            rows, step, recipe.train.micro_batch, self.rows_per_rank, self.device
        )
        waited = time.perf_counter() - start
        data_rank = dist.get_rank() // recipe.parallel.tensor
        # dropout depends on (seed, step, rank) only, so that no generator state has to be saved
        torch.manual_seed(((recipe.seed << 31) + (step << 16) + data_rank) % 2**63)
        lr = learning_rate(step, self.plan.total, recipe.optimizer.learning_rate, recipe.schedule)
        try:
            result = train_step(
                self.model,
                batches,
                self.optimizers,
                lr,
                recipe.train.max_grad_norm,
                tensor=recipe.parallel.tensor,
                skip_above_norm=self.guard.skip_above_norm,
                signal=signal,
            )
        except NoTargetsError:
            if self._any_tokens(rows):
                raise
            return None
        seconds = time.perf_counter() - start
        self.meter.add(recipe.tokens_per_step, seconds, waited)
        self.interval.add(seconds)
        return result

    def _any_tokens(self, rows: Rows) -> bool:
        """Returns whether any rank's rows hold a token."""
        total = torch.tensor(int(rows.used.sum()), device=self.device)
        dist.all_reduce(total)
        return bool(total)


def fit(trainer: Trainer, hooks: Hooks, start: int = 0, *, missed: bool = False) -> int:
    """Trains from step `start` to the recipe's last step.

    It ends earlier if the data of all ranks is exhausted (their rows hold only padding), or if the
    validation metric has not improved for as long as the recipe allows (early stopping).

    Args:
        trainer: Runs the steps.
        hooks: The callbacks around the steps.
        start: The number of steps done before, by an earlier run.
        missed: Whether the validation of step `start` was not made, or its report may have been
            lost. The step is then validated and reported now; `trainer.loss` is its loss.

    Returns:
        The total number of steps done, those before `start` included.

    Raises:
        StoppedError: The run was asked to stop.
        RunError: See `Guard.record`, `BestTracker.update` and `Hooks.roll_back`.
    """
    recipe, plan, best = trainer.recipe, trainer.plan, trainer.best
    missed = missed or start >= plan.total or best.exhausted or best.missed_validation(start)
    # checkpoints of earlier versions do not say the loss, by which the best step may be chosen
    needs_loss = best.enabled and best.settings.metric == "train/loss"
    if missed and not (needs_loss and trainer.loss is None):
        _validate(trainer, hooks, start, loss=trainer.loss)
    trainer.model.train()
    step = start
    while step < plan.total and not best.exhausted:
        result = trainer.step(step, hooks.signal())
        step += 1
        if result is None:  # the data is exhausted: this step changed nothing and is not counted
            step -= 1
            _validate(trainer, hooks, step, save=True)
            break
        must_roll_back = trainer.guard.record(step, result.applied, result.grad_norm)
        if not result.applied:
            hooks.say(
                f"step {step} skipped: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
            )
        if must_roll_back:
            step = hooks.roll_back(step, trainer.guard.skipped_in_a_row)
            trainer.meter.reset()
            continue
        plan.update(step)
        trainer.loss = result.loss if math.isfinite(result.loss) else math.inf
        _log(trainer, hooks, step, result)
        saved = _handle_signal(hooks, step, result.signal)
        save = not saved and (step == plan.total or trainer.interval.due(step))
        if step == plan.total or is_due(step, recipe.validation.every):
            _validate(trainer, hooks, step, save=save, loss=trainer.loss)
        elif save:
            hooks.save(step)
    if best.best is not None:
        hooks.say(best.summary())
    return step


def _log(trainer: Trainer, hooks: Hooks, step: int, result: StepResult) -> None:
    """Logs a step every `log_every` steps, and always the first, the last and skipped steps."""
    recipe, plan = trainer.recipe, trainer.plan
    due = step % recipe.train.log_every == 0 or step in (1, plan.total) or not result.applied
    if not due:
        return
    metrics = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate(
            step - 1, plan.total, recipe.optimizer.learning_rate, recipe.schedule
        ),
        "targets": result.targets,
    }
    if recipe.optimizer.l1:
        metrics["sparsity"] = sparsity(trainer.optimizers)
    if not plan.is_exact:
        metrics["steps"] = plan.total
    metrics |= trainer.meter.read()
    hooks.log(step, {f"train/{name}": value for name, value in metrics.items()})


def _handle_signal(hooks: Hooks, step: int, signal: Signal, saved: bool = False) -> bool:
    """Saves or stops, as the signal requests.

    Args:
        hooks: The callbacks around the steps.
        step: The number of steps done.
        signal: What is requested.
        saved: Whether a save of this step was started before.

    Returns:
        Whether the step is saved.

    Raises:
        StoppedError: The signal requests a stop.
    """
    if signal is Signal.NONE:
        return saved
    if signal is Signal.ABANDON:
        raise StoppedError(f"Stopped at step {step}.")
    reason = "Stop requested" if signal is Signal.STOP else "A machine of this run will be lost"
    hooks.say(f"{reason}: saving step {step}.")
    if not saved:
        hooks.save(step)
    hooks.wait_for_save()
    if signal is Signal.STOP:
        raise StoppedError(
            f"Stopped. Checkpoint saved at step {step}; run the same command to resume."
        )
    return True


def _validate(
    trainer: Trainer, hooks: Hooks, step: int, *, save: bool = False, loss: float | None = None
) -> None:
    """Validates and reports a step; saves it if `save` is set or the validation is the best so far.

    Args:
        trainer: Runs the steps.
        hooks: The callbacks around the steps.
        step: The number of steps done.
        save: Saves the step even if it is not the best.
        loss: The step's training loss, which is reported too.
    """
    best = trainer.best
    saved = save and not best.enabled
    if saved:
        # saved first: the checkpoint is written during the validation, and exists once the step is
        # reported
        hooks.save(step)

    def act_on_signals() -> None:
        # A validation may take longer than the time that a stop is given. One that was left is made
        # when the run is resumed.
        nonlocal saved
        signal = agreed(hooks.signal(), trainer.device)
        saved = _handle_signal(hooks, step, signal, saved)

    metrics = hooks.validate(step, act_on_signals) | ({} if loss is None else {"train/loss": loss})
    improved = best.update(step, metrics)
    if improved or (save and best.enabled):
        hooks.save(step)  # saved after the validation: the checkpoint records which one is the best
    hooks.report(step, metrics)
    trainer.meter.reset()
