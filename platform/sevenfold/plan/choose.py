"""Which layout: of those that fit, the one that trains the most tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sevenfold.errors import InputError
from sevenfold.plan import hardware, layouts, memory, speed
from sevenfold.plan.hardware import GIB, Fleet
from sevenfold.plan.layouts import Layout
from sevenfold.plan.memory import Memory
from sevenfold.plan.speed import Speed
from sevenfold.recipe import Cluster, Recipe

MARGIN = 0.05  # of a GPU's memory, that should stay free: the plan's error, see benchmarks/plan.py
CLOSE = 0.02  # of the speed: by so little a simpler layout is not slower


@dataclass(frozen=True)
class Candidate:
    """speed: None where it does not fit."""

    layout: Layout
    memory: Memory
    fleet: Fleet
    speed: Speed | None

    @property
    def free(self) -> float:
        """Bytes that are left on each GPU; below 0 it does not fit."""
        return self.fleet.gpu.memory - self.memory.total

    @property
    def tight(self) -> bool:
        return self.free < MARGIN * self.fleet.gpu.memory


def fitted(recipe: Recipe, fleet: Fleet) -> Recipe:
    """The recipe on all GPUs of a fleet, or on as many as its global batch can be dealt out to; one that lacks lanes for them
    gets some.

    Raises InputError where there is not a row for each of two GPUs.
    """
    batch, gpus = recipe.train.global_batch, fleet.gpus
    gpus = min(gpus, batch)
    lanes = recipe.lanes
    if gpus > lanes:
        lanes = min((n for n in range(gpus, batch + 1) if batch % n == 0), default=lanes)
    changes = {"cluster.num_workers": gpus, "cluster.gpus_per_worker": 1, "parallel.replicate": 1, "parallel.tensor": 1}
    return recipe.override(changes | ({"data.lanes": lanes} if lanes != recipe.lanes else {}))


def candidates(recipe: Recipe, vocab_size: int, fleet: Fleet) -> list[Candidate]:
    """Sensible layouts, the quickest first, then those that do not fit, the smallest first. Tensor parallelism, which is
    slower where it is not needed and costs traces, is looked at by two ways and the best checkpointing alone, and by all
    where nothing fits without it.

    Raises InputError as layouts.layouts and speed.check.
    """
    speed.check(fleet.gpu, recipe.train.dtype)
    known = layouts.layouts(recipe, fleet.gpus, fleet.gpus_per_node, vocab_size)
    out = _held(recipe, vocab_size, fleet, [k for k in known if k.tensor == 1])
    split = [k for k in known if k.tensor > 1]
    if roomy := [c for c in out if c.speed is not None]:
        how = max(roomy, key=_rate).layout.activation_checkpointing
        split = [k for k in split if k.tensor == 2 and k.activation_checkpointing == how]
    out += _held(recipe, vocab_size, fleet, split)
    return sorted(out, key=lambda c: (-_rate(c), _parts(c.layout), c.memory.total))


def _held(recipe: Recipe, vocab_size: int, fleet: Fleet, found: Sequence[Layout]) -> list[Candidate]:
    alike = recipe.model_copy(update={"cluster": Cluster()})  # traces do not hang on it, and are made once for all fleets
    held = memory.all_measured(alike, found, vocab_size)
    return [
        Candidate(
            k, held[k], fleet, speed.estimate(recipe, vocab_size, k, fleet) if held[k].total <= fleet.gpu.memory else None
        )
        for k in found
    ]


def _rate(c: Candidate) -> float:
    return c.speed.tokens if c.speed is not None else 0.0


def _parts(layout: Layout) -> float:
    return layout.tensor * 1000 + layout.replicate


def best(found: Sequence[Candidate], recipe: Recipe, table: hardware.Table) -> Candidate:
    """The quickest that fits with a margin, or fits at all; of those as quick within 2%, the one without tensor parallelism,
    with fewer copies, with more memory left.

    Raises InputError where none fits: says which is nearest, and what it would fit on.
    """
    fitting = [c for c in found if c.speed is not None]
    if not fitting:
        raise InputError(_nearest(found, recipe, table))
    fitting = [c for c in fitting if not c.tight] or fitting
    least = max(map(_rate, fitting)) * (1 - CLOSE)
    close = [c for c in fitting if _rate(c) >= least]
    return min(close, key=lambda c: (c.layout.tensor, c.layout.replicate, -c.free))


def _nearest(found: Sequence[Candidate], recipe: Recipe, table: hardware.Table) -> str:
    near = min(found, key=lambda c: c.memory.total)
    gpu, need = near.fleet.gpu, near.memory.total
    larger = sorted((g.memory, g.name) for n in table["gpus"] if (g := hardware.gpu(table, n)).memory >= need)
    fits = f"; it would fit on {near.layout.gpus} {larger[0][1]}" if larger else ""
    fewer = near.memory
    shards = fewer.parameters + fewer.gradients + fewer.optimizer
    more = f", or on more GPUs of this kind ({shards / GIB:.1f} GiB are shards)" if shards > need - gpu.memory else ""
    length = "" if need - shards < gpu.memory else "; its activations alone are too large: a shorter data.sequence_length"
    return (
        f"{recipe.name} fits in no layout on {near.layout.gpus} {gpu.name} of {gpu.memory / GIB:.1f} GiB: the nearest, "
        f"{named(near.layout)}, needs {need / GIB:.1f} GiB{fits}{more}{length}"
    )


def named(layout: Layout) -> str:
    """As FSDP 64, micro-batch 1, full checkpointing."""
    kinds = [f"FSDP {layout.shard}"]
    if layout.replicate > 1:
        kinds = [f"HSDP {layout.replicate} x {layout.shard}"]
    if layout.tensor > 1:
        kinds.append(f"TP {layout.tensor}")
    how = {"none": "no"}.get(layout.activation_checkpointing, layout.activation_checkpointing)
    return f"{' + '.join(kinds)}, micro-batch {layout.micro_batch}, {how} checkpointing"


def why(chosen: Candidate, found: Sequence[Candidate]) -> str:
    """A sentence."""
    fitting = [c for c in found if c.speed is not None]
    roomy = [c for c in fitting if not c.tight]
    said = f"{len(fitting)} of {len(found)} layouts fit, {len(roomy)} with {MARGIN:.0%} to spare; "
    others = [_rate(c) for c in (roomy or fitting) if c is not chosen]
    if others and _rate(chosen) >= max(others):
        said += f"of these the quickest, by {_rate(chosen) / max(others) - 1:.1%}; "
    elif others:
        said += f"within {CLOSE:.0%} of the quickest of these, and simpler or with more memory left; "
    tight = " (tight: it may run out)" if chosen.tight else ""
    return f"{said}{chosen.free / GIB:.1f} GiB of {chosen.fleet.gpu.memory / GIB:.1f} stay free{tight}"
