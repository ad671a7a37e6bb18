"""The training loop, plain PyTorch: a process group, a model, an iterator of rows, and hooks for what is seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import micro_batches
from sevenfold.engine.meter import Meter
from sevenfold.engine.optim import learning_rate
from sevenfold.engine.step import NoTargets, train_step
from sevenfold.errors import RunError
from sevenfold.recipe import Recipe

MAX_SKIPPED = 10  # steps in a row whose gradient is not finite


@dataclass
class Hooks:
    """What happens around the steps; every rank calls each at the same steps. Metrics are those of all ranks."""

    log: Callable[[int, dict[str, float]], None]
    validate: Callable[[int], dict[str, float]]
    save: Callable[[int], None]
    report: Callable[[int, dict[str, float]], None]


def fit(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Iterator[Rows], rows_per_rank: int,
    device: torch.device, meter: Meter, hooks: Hooks, start: int = 0,
) -> None:  # fmt: skip
    """Runs steps start .. recipe.steps - 1, or fewer where the rows of all ranks end before (rows of padding alone).

    Args:
        rows_per_rank: the most rows that any rank gets in a step: decides the number of micro-batches of all.

    Raises:
        RunError: the gradient was not finite MAX_SKIPPED times in a row.
    """
    steps, train = recipe.steps, recipe.train
    count = -(-rows_per_rank // train.micro_batch)
    skipped = 0
    model.train()
    for step in range(start, steps):
        begin = time.perf_counter()
        drawn = next(rows)
        batches = micro_batches(drawn, train.micro_batch, count, device)
        waited = time.perf_counter() - begin
        # dropout is a function of (seed, step, rank): there is no generator state to save
        torch.manual_seed(((recipe.seed << 31) + (step << 16) + dist.get_rank()) % 2**63)
        rate = learning_rate(step, steps, recipe.optimizer.learning_rate, recipe.schedule)
        try:
            done = train_step(model, batches, optimizer, rate, train.max_grad_norm)
        except NoTargets:
            if _any_tokens(drawn, device):
                raise
            return _finish(step, hooks)
        meter.add(recipe.tokens_per_step, waited)
        skipped = 0 if done.applied else skipped + 1
        if skipped >= MAX_SKIPPED:
            raise RunError(
                f"the gradient was not finite in {skipped} steps in a row, up to step {step + 1}: "
                "lower optimizer.learning_rate or lengthen schedule.warmup_steps"
            )
        at, last = step + 1, step + 1 == steps
        if at % train.log_every == 0 or last or at == 1:
            scalars = {"loss": done.loss, "grad_norm": done.grad_norm, "learning_rate": rate, "targets": done.targets}
            hooks.log(at, {f"train/{k}": v for k, v in (scalars | meter.read()).items()})
        validating = last or _due(at, recipe.validation.every)
        metrics = hooks.validate(at) if validating else {}
        if last or _due(at, recipe.checkpoint.every):
            hooks.save(at)  # before the report: what is reported can be found again
        if validating:
            hooks.report(at, metrics | {"train/loss": done.loss if math.isfinite(done.loss) else float("inf")})
            meter.reset()
    if start >= steps:  # ended between the last save and the last report
        hooks.report(steps, hooks.validate(steps))


def _any_tokens(rows: Rows, device: torch.device) -> bool:
    total = torch.tensor(int(rows.used.sum()), device=device)
    dist.all_reduce(total)
    return bool(total)


def _finish(at: int, hooks: Hooks) -> None:
    """The data ended: what happens after the last step."""
    metrics = hooks.validate(at)
    hooks.save(at)
    hooks.report(at, metrics)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
