"""What a run costs: hours and money, including what failures and checkpoints take.

It also covers the CPUs that prepare the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from sevenfold.data.stream import TASK_CPUS
from sevenfold.engine.checkpoint.interval import optimal_interval
from sevenfold.plan.hardware import Fleet
from sevenfold.plan.layouts import Layout
from sevenfold.plan.speed import Size, Speed
from sevenfold.recipe import Recipe

HOUR, DAY = 3600.0, 86_400.0
# Tokens per second that one CPU core reads, tokenizes and packs in Ray Data (benchmarks/RESULTS.md,
# the stream).
TOKENS_PER_CORE = 23e6
# Bytes per trained parameter in a checkpoint, in float32: the weight, and one moment. AdamW has two
# moments, Muon one.
WEIGHT_BYTES = MOMENT_BYTES = 4
# Seconds per byte of a save, measured for 707 MB per worker (benchmarks/RESULTS.md, checkpoints):
# the call, which blocks training, and the whole save until the checkpoint is committed.
SAVE_CALL, SAVE_TOTAL = 0.096 / 707e6, 2.471 / 707e6
# Bytes per second that each node writes to and reads from storage. Assumed: Llama 3's 2 TB/s for
# 2,048 nodes (arXiv 2407.21783).
STORAGE = 1e9
# The share of a step by which a save in the background slows it down: measured by
# benchmarks/goodput.py on a machine without a free core. It is an upper limit: a node with GPUs has
# free cores.
SLOWDOWN = 0.47
# The next two are assumed, as in benchmarks/goodput.py.
RECOVERY = 150.0  # seconds from a failure to the first step after it
SPOT_DAYS = 20.0  # mean days until a spot node is taken away: 5% of the nodes per day


class Policy(NamedTuple):
    """How a run saves checkpoints; all times in seconds.

    Attributes:
        interval: Training time between two saves.
        cost: Training time that a save takes away.
        committed: Time from the start of a save until the checkpoint is valid.
        recovery: Time from a failure to the first step after it.
    """

    interval: float
    cost: float
    committed: float
    recovery: float


def expected_goodput(p: Policy, mtbf: float) -> float:
    """Returns the expected goodput in closed form: the share of time spent on steps that are kept.

    Failures are exponentially distributed and can also happen during a recovery. The k-th save
    after a failure counts if no failure happens for
    t_k = recovery + k (interval + cost) - cost + committed. On average, the sum over k of
    exp(-t_k / mtbf) saves count between two failures. This is Daly's cost function (FGCS 22(3),
    2006) for a checkpoint that becomes valid some time after the save.

    Args:
        p: How the run saves checkpoints.
        mtbf: Mean time between failures, in seconds.
    """
    lag, period = p.recovery + p.committed - p.cost, p.interval + p.cost
    if period > 700 * mtbf:  # exp would overflow: practically no save ever counts
        return 0.0
    return p.interval / mtbf * math.exp(-lag / mtbf) / math.expm1(period / mtbf)


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes:
        tokens: Tokens of the run; None if data.epochs limits it, as the plan does not know how many
            tokens the data has.
        hours: Hours to train on them, including failures; None if tokens is None.
        usd: The price of all machines for these hours; None if hours or price are not known.
        goodput: The expected goodput: the share of time spent on steps that are kept.
        checkpoint: Bytes of one checkpoint.
        best_save_every: Steps between saves that lose the least time.
        save_every: Steps between saves in the recipe; None if it saves only at the end.
        mtbf_hours: Mean hours between failures of the run.
        cores: Busy CPU cores that prepare the data.
        data_cpus: Logical CPUs that the data tasks request from Ray.
    """

    tokens: int | None
    hours: float | None
    usd: float | None
    goodput: float
    checkpoint: int
    best_save_every: int
    save_every: int | None
    mtbf_hours: float
    cores: float
    data_cpus: float


def checkpoint_bytes(model: Size) -> int:
    """Returns the bytes of a checkpoint: float32 weights and moments of the trained parameters.

    With AdamW that is 12 bytes per parameter.
    """
    with_muon = sum(math.prod(shape) for shape in model.matrices)
    return model.trained * (WEIGHT_BYTES + 2 * MOMENT_BYTES) - with_muon * MOMENT_BYTES


def policy(size: int, fleet: Fleet, mtbf: float) -> Policy:
    """Returns the policy that saves at the best interval.

    Args:
        size: Bytes of a checkpoint.
        fleet: The machines.
        mtbf: Mean time between failures, in seconds.
    """
    bytes_per_gpu = size / fleet.gpus
    transfer = size / fleet.nodes / STORAGE
    committed = bytes_per_gpu * SAVE_TOTAL + 2 * transfer  # written, then read back
    cost = bytes_per_gpu * SAVE_CALL + SLOWDOWN * committed
    return Policy(optimal_interval(cost, mtbf, committed), cost, committed, RECOVERY)


def mean_seconds_between_failures(recipe: Recipe, fleet: Fleet) -> float:
    """Returns the mean time between failures of the run, including the loss of spot nodes."""
    rate = fleet.gpus / (recipe.checkpoint.mtbf_hours * HOUR)
    return 1 / (rate + (fleet.nodes / (SPOT_DAYS * DAY) if fleet.spot else 0.0))


def cost(recipe: Recipe, model: Size, speed: Speed, layout: Layout, fleet: Fleet) -> Cost:
    """Returns what a run of the recipe costs.

    Args:
        recipe: The recipe.
        model: The size of its model.
        speed: The estimated speed.
        layout: How the model is distributed.
        fleet: The machines.
    """
    fleet = fleet.with_gpus(layout.gpus)
    checkpoint = checkpoint_bytes(model)
    mtbf = mean_seconds_between_failures(recipe, fleet)
    best = policy(checkpoint, fleet, mtbf)
    best_steps = max(1, math.ceil(best.interval / speed.step))
    tokens = recipe.steps * recipe.tokens_per_step or None

    every = recipe.checkpoint.every
    interval = best.interval
    saves_every: int | None = best_steps if every == "auto" else None
    if isinstance(every, int):
        interval = every * speed.step
        saves_every = every
    elif every is None and tokens is not None:
        interval = recipe.steps * speed.step

    goodput = expected_goodput(best._replace(interval=interval), mtbf)
    hours = tokens / speed.tokens / HOUR / goodput if tokens and goodput else None
    usd = None if hours is None or fleet.usd_per_hour is None else hours * fleet.usd_per_hour
    return Cost(
        tokens=tokens,
        hours=hours,
        usd=usd,
        goodput=goodput,
        checkpoint=checkpoint,
        best_save_every=best_steps,
        save_every=saves_every,
        mtbf_hours=mtbf / HOUR,
        cores=speed.tokens / TOKENS_PER_CORE,
        data_cpus=layout.gpus * TASK_CPUS if recipe.data.executor == "ray" else 0.0,
    )
