"""The training loop, plain PyTorch: a process group, a model, an iterator of rows, and hooks for what is seen."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import micro_batches
from sevenfold.engine.best import Best
from sevenfold.engine.guard import Guard
from sevenfold.engine.interval import Interval, due
from sevenfold.engine.meter import Meter
from sevenfold.engine.notice import Notice
from sevenfold.engine.objectives import Causal
from sevenfold.engine.optim import learning_rate, sparsity
from sevenfold.engine.step import NoTargets, Step, train_step
from sevenfold.errors import RunError
from sevenfold.recipe import Recipe


class LeftError(RunError):
    """The run was asked to end before its last step."""


@dataclass
class Hooks:
    """What happens around the steps; every rank calls each at the same steps. Metrics are those of all ranks.

    Attributes:
        noticed: what rank 0 has been told meanwhile.
        settle: returns when the checkpoint under way is written.
        tell: a sentence for whoever watches.
        go_back: after this step, the last of so many that were left out; loads the last checkpoint, passes over their data
            from then on, and returns the checkpoint's step. Raises RunError where there is none.
    """

    log: Callable[[int, dict[str, float]], None]
    validate: Callable[[int], dict[str, float]]
    save: Callable[[int], None]
    noticed: Callable[[], Notice]
    settle: Callable[[], Any]
    report: Callable[[int, dict[str, float]], None]
    tell: Callable[[str], None]
    go_back: Callable[[int, int], int]


@dataclass
class Trainer:
    """What takes a step: all that the loop needs of a rank.

    Attributes:
        model: with the method token_losses, sharded over all ranks.
        rows: of this rank, step after step.
        rows_per_rank: the most rows that any rank gets in a step: decides the number of micro-batches of all.
    """

    recipe: Recipe
    model: Any
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Causal
    rows: Iterator[Rows]
    rows_per_rank: int
    device: torch.device
    meter: Meter
    guard: Guard
    interval: Interval
    best: Best

    def step(self, step: int, notice: Notice = Notice.NONE) -> Step | None:
        """Step `step` (from 0). None where the rows of all ranks have ended. Raises NoTargets. notice: as train_step."""
        recipe = self.recipe
        begin = time.perf_counter()
        drawn = next(self.rows)
        collate = functools.partial(self.objective.collate, step=step)
        count = -(-self.rows_per_rank // recipe.train.micro_batch)
        batches = micro_batches(drawn, recipe.train.micro_batch, count, collate, self.device)
        waited = time.perf_counter() - begin
        place = dist.get_rank() // recipe.parallel.tensor
        # dropout is a function of (seed, step, rank): there is no generator state to save
        torch.manual_seed(((recipe.seed << 31) + (step << 16) + place) % 2**63)
        rate = learning_rate(step, recipe.steps, recipe.optimizer.learning_rate, recipe.schedule)
        try:
            done = train_step(
                self.model, batches, self.optimizers, rate, recipe.train.max_grad_norm, recipe.parallel.tensor,
                self.guard.most_norm, notice,
            )  # fmt: skip
        except NoTargets:
            if self._any_tokens(drawn):
                raise
            return None
        seconds = time.perf_counter() - begin
        self.meter.add(recipe.tokens_per_step, seconds, waited)
        self.interval.add(seconds)
        return done

    def _any_tokens(self, rows: Rows) -> bool:
        total = torch.tensor(int(rows.used.sum()), device=self.device)
        dist.all_reduce(total)
        return bool(total)


def fit(trainer: Trainer, hooks: Hooks, start: int = 0, unreported: Mapping[str, float] | None = None) -> int:
    """Runs steps start .. recipe.steps - 1, or fewer where the rows of all ranks end before (rows of padding alone) or
    validations get no better any more. Returns the steps done in all.

    Args:
        unreported: what was logged of step `start`, where its report may not have arrived: it is validated and reported again.

    Raises:
        LeftError: as Hooks.noticed had it.
        RunError: as Guard.judge, Best.judge and Hooks.go_back.
    """
    recipe, steps, step, best = trainer.recipe, trainer.recipe.steps, start, trainer.best
    if step >= steps or best.over or best.missed(step) or unreported is not None:  # ended between a save and its report
        _validate(step, trainer, hooks, loss=(unreported or {}).get("train/loss"))
    trainer.model.train()
    while step < steps and not best.over:
        done = trainer.step(step, hooks.noticed())
        if done is None:
            _validate(step, trainer, hooks, save=True)
            break
        at, last = step + 1, step + 1 == steps
        back = trainer.guard.judge(at, done.applied, done.grad_norm)
        if not done.applied:
            hooks.tell(f"step {at} was left out: loss {done.loss:.4g}, gradient norm {done.grad_norm:.4g}")
        if back:
            step = hooks.go_back(at, trainer.guard.in_a_row)
            trainer.meter.reset()
            continue
        if at % recipe.train.log_every == 0 or last or at == 1 or not done.applied:
            rate = learning_rate(step, steps, recipe.optimizer.learning_rate, recipe.schedule)
            scalars = {"loss": done.loss, "grad_norm": done.grad_norm, "learning_rate": rate, "targets": done.targets}
            if recipe.optimizer.l1:
                scalars["sparsity"] = sparsity(trainer.optimizers)
            hooks.log(at, {f"train/{k}": v for k, v in (scalars | trainer.meter.read()).items()})
        save = last or trainer.interval.due(at)
        if done.noticed is Notice.LEAVE:
            raise LeftError(f"left at step {at}")
        if done.noticed:
            why = "this run is to end" if done.noticed is Notice.END else "a machine of this run will be taken away"
            hooks.tell(f"{why}: saving step {at} at once")
            hooks.save(at)
            hooks.settle()
            if done.noticed is Notice.END:
                raise LeftError(f"stopped after step {at}, which is saved; the same command goes on from there")
            save = False
        if last or due(at, recipe.validation.every):
            _validate(at, trainer, hooks, save, done.loss if math.isfinite(done.loss) else float("inf"))
        elif save:
            hooks.save(at)
        step += 1
    if best.mark is not None:
        hooks.tell(best.why())
    return step


def _validate(at: int, trainer: Trainer, hooks: Hooks, save: bool = False, loss: float | None = None) -> None:
    """What happens after a step that is validated. save: also where it is not the best; loss: the step's."""
    best = trainer.best
    if save and not best.kept:
        hooks.save(at)  # first: it goes on beside the validation, and what is reported can be found again
    metrics = hooks.validate(at) | ({} if loss is None else {"train/loss": loss})
    better = best.judge(at, metrics)
    if better or (save and best.kept):
        hooks.save(at)  # after it: the checkpoint tells which is the best
    hooks.report(at, metrics)
    trainer.meter.reset()
