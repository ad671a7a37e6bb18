"""What a run takes: hours and money to its tokens, with what failures take; its checkpoints; the CPUs that feed it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from sevenfold.data.stream import TASK_CPUS
from sevenfold.engine.interval import best_seconds
from sevenfold.plan.hardware import Fleet
from sevenfold.plan.layouts import Layout
from sevenfold.plan.speed import Size, Speed
from sevenfold.recipe import Recipe

HOUR, DAY = 3600.0, 86_400.0
TOKENS_PER_CORE = 23e6  # a second: text that is read, tokenized and packed by Ray Data (benchmarks/RESULTS.md, the stream)
WEIGHTS, MOMENT = 4, 4  # bytes a trained parameter in a checkpoint: float32, of AdamW two moments, of Muon one
# of a save, measured (benchmarks/RESULTS.md, checkpoints) for 707 MB a worker: seconds a byte
CALL, SUMS = 0.096 / 707e6, 2.471 / 707e6
STORAGE = 1e9  # bytes a second a node, writing and reading; assumed: Llama 3's 2 TB/s for 2,048 nodes (arXiv 2407.21783)
SLOWER = 0.05  # of a step, beside a save; assumed, as benchmarks/goodput.py
RECOVERY = 150.0  # seconds from a failure to the step that goes on; assumed, ibid.
SPOT_DAYS = 20.0  # mean days until a spot node is taken; assumed, ibid.: 5% of the nodes a day


class Policy(NamedTuple):
    """How a run saves. Seconds: of training between saves, that a save takes from it, until it is committed (from the save's
    beginning), and from a failure to the step that goes on."""

    interval: float
    cost: float
    committed: float
    recovery: float


def closed(p: Policy, mtbf: float) -> float:
    """The part of the time whose steps last, failures coming at any moment alike (exponential, also while recovering).

    Save k counts where recovery + k (interval + cost) - cost + committed pass without a failure; from one failure to the next
    there are on average sum over k of exp(-that / mtbf) of them. Daly's cost function (FGCS 22(3), 2006), for a commit that
    comes later than the save.
    """
    lag, period = p.recovery + p.committed - p.cost, p.interval + p.cost
    if period > 700 * mtbf:  # exp would overflow: nothing is ever saved
        return 0.0
    return p.interval / mtbf * math.exp(-lag / mtbf) / math.expm1(period / mtbf)


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        tokens: of the run; None where it lasts as long as its data (data.epochs), of which the plan knows nothing.
        hours: to these, failures included; None with tokens.
        usd: for all machines; None where no price is known either.
        effective: part of the time whose steps last.
        checkpoint: bytes of one.
        best: steps between saves that lose the least time.
        every: steps between saves, as the recipe says; None: at the end alone.
        mtbf: mean hours between failures of the run.
        cores: of CPUs at work that feed it; asked: logical CPUs that its data tasks ask Ray for.
    """

    tokens: int | None
    hours: float | None
    usd: float | None
    effective: float
    checkpoint: int
    best: int
    every: int | None
    mtbf: float
    cores: float
    asked: float


def checkpoint_bytes(model: Size) -> int:
    """Float32 weights and moments of what is trained: 12 bytes a parameter with AdamW."""
    muon = sum(math.prod(s) for s in model.matrices)
    return model.trained * (WEIGHTS + 2 * MOMENT) - muon * MOMENT


def policy(size: int, fleet: Fleet, mtbf: float) -> Policy:
    """Saves as often as is best. size: bytes of a checkpoint. mtbf: seconds."""
    share = size / fleet.gpus
    through = size / fleet.nodes / STORAGE
    committed = share * SUMS + 2 * through  # written, and read back
    cost = share * CALL + SLOWER * committed
    return Policy(best_seconds(cost, mtbf, committed), cost, committed, RECOVERY)


def between_failures(recipe: Recipe, fleet: Fleet) -> float:
    """Mean seconds between two failures of the run: a machine's, or a spot node's being taken."""
    rate = fleet.gpus / (recipe.checkpoint.mtbf_hours * HOUR)
    return 1 / (rate + (fleet.nodes / (SPOT_DAYS * DAY) if fleet.spot else 0.0))


def cost(recipe: Recipe, model: Size, speed: Speed, layout: Layout, fleet: Fleet) -> Cost:
    fleet = fleet.of(layout.gpus)
    size, mtbf = checkpoint_bytes(model), between_failures(recipe, fleet)
    best = policy(size, fleet, mtbf)
    tokens = recipe.steps * recipe.tokens_per_step or None
    every = recipe.checkpoint.every
    interval = best.interval
    if isinstance(every, int):
        interval = every * speed.step
    elif every is None and tokens is not None:
        interval = recipe.steps * speed.step
    effective = closed(best._replace(interval=interval), mtbf)
    hours = tokens / speed.tokens / HOUR / effective if tokens and effective else None
    usd = None if hours is None or fleet.usd_per_hour is None else hours * fleet.usd_per_hour
    steps = max(1, math.ceil(best.interval / speed.step))
    told = steps if every == "auto" else every if isinstance(every, int) else None
    return Cost(
        tokens, hours, usd, effective, size, steps, told, mtbf / HOUR, speed.tokens / TOKENS_PER_CORE,
        layout.gpus * TASK_CPUS if recipe.data.executor == "ray" else 0.0,
    )  # fmt: skip
