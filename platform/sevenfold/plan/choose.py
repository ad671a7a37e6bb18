"""Chooses the layout of a run: of those that fit, the one with the highest throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sevenfold.data.lanes import ENOUGH, best_lanes, share_used
from sevenfold.errors import InputError
from sevenfold.plan import hardware, layouts, memory, speed
from sevenfold.plan.hardware import GIB, Fleet
from sevenfold.plan.layouts import Layout
from sevenfold.plan.memory import Memory
from sevenfold.plan.speed import Speed
from sevenfold.recipe import Cluster, Recipe

# The share of a GPU's memory that should stay free: the error of the plan, see benchmarks/plan.py.
MARGIN = 0.05
# A simpler layout is preferred if its throughput is lower by no more than this share.
CLOSE = 0.02


@dataclass(frozen=True)
class Candidate:
    """A layout with its estimated memory and speed.

    Attributes:
        layout: How the model is distributed over the GPUs.
        memory: The peak memory of each GPU.
        fleet: The machines.
        speed: The estimated speed; None if the layout does not fit.
    """

    layout: Layout
    memory: Memory
    fleet: Fleet
    speed: Speed | None

    @property
    def free(self) -> float:
        """Bytes that stay free on each GPU; negative if the layout does not fit."""
        return self.fleet.gpu.memory - self.memory.total

    @property
    def tight(self) -> bool:
        """Whether less than MARGIN of a GPU's memory stays free."""
        return self.free < MARGIN * self.fleet.gpu.memory


def fitted(recipe: Recipe, fleet: Fleet) -> Recipe:
    """Returns the recipe with one worker per GPU of the fleet.

    A global batch smaller than the number of GPUs limits the workers to one per sequence. If the
    recipe's lanes leave too many workers waiting, it gets the number of lanes that is best.
    """
    global_batch, gpus = recipe.train.global_batch, fleet.gpus
    gpus = min(gpus, global_batch)
    lanes = recipe.lanes
    if gpus > lanes or share_used(global_batch, gpus, lanes) < ENOUGH:
        lanes = best_lanes(global_batch, gpus) or lanes
    changes = {
        "cluster.num_workers": gpus,
        "cluster.gpus_per_worker": 1,
        "parallel.replicate": 1,
        "parallel.tensor": 1,
    }
    return recipe.override(changes | ({"data.lanes": lanes} if lanes != recipe.lanes else {}))


def candidates(recipe: Recipe, vocab_size: int, fleet: Fleet) -> list[Candidate]:
    """Returns the layouts worth considering: those that fit, fastest first, then the others.

    Those that do not fit are sorted by memory, smallest first. Tensor parallelism is slower where
    it is not needed, and each variant has to be traced, which takes seconds. If anything fits
    without it, only two-way tensor parallelism is considered, with the activation checkpointing of
    the fastest layout; otherwise all its variants are.

    Raises:
        InputError: As layouts.layouts and speed.check.
    """
    speed.require_dtype(fleet.gpu, recipe.train.dtype)
    all_layouts = layouts.layouts(recipe, fleet.gpus, fleet.gpus_per_node, vocab_size)
    unsplit = [layout for layout in all_layouts if layout.tensor == 1]
    split = [layout for layout in all_layouts if layout.tensor > 1]
    result = _evaluated(recipe, vocab_size, fleet, unsplit)
    if fitting := [c for c in result if c.speed is not None]:
        checkpointing = max(fitting, key=_throughput).layout.activation_checkpointing
        split = [
            layout
            for layout in split
            if layout.tensor == 2 and layout.activation_checkpointing == checkpointing
        ]
    result += _evaluated(recipe, vocab_size, fleet, split)
    return sorted(result, key=lambda c: (-_throughput(c), _complexity(c.layout), c.memory.total))


def _evaluated(
    recipe: Recipe, vocab_size: int, fleet: Fleet, options: Sequence[Layout]
) -> list[Candidate]:
    """Estimates the memory of each layout, and the speed of those that fit."""
    # Traces do not depend on the cluster. Without it all fleets share the same cached traces.
    without_cluster = recipe.model_copy(update={"cluster": Cluster()})
    memory_of = memory.all_measured(without_cluster, options, vocab_size)
    result = []
    for layout in options:
        needed = memory_of[layout]
        fits = needed.total <= fleet.gpu.memory
        estimate = speed.estimate(recipe, vocab_size, layout, fleet) if fits else None
        result.append(Candidate(layout, needed, fleet, estimate))
    return result


def _throughput(candidate: Candidate) -> float:
    """Tokens per second; 0 if it does not fit."""
    return candidate.speed.tokens if candidate.speed is not None else 0.0


def _complexity(layout: Layout) -> float:
    """Orders layouts by tensor parallelism, then by the number of replicas."""
    return layout.tensor * 1000 + layout.replicate


def best(found: Sequence[Candidate], recipe: Recipe, table: hardware.Table) -> Candidate:
    """Returns the fastest candidate that fits with a margin, or that fits at all.

    Of those within 2% of the fastest it takes the one with the least tensor parallelism, then with
    the fewest replicas, then with the most free memory.

    Raises:
        InputError: None fits. The message names the smallest one and a GPU that it would fit on.
    """
    fitting = [c for c in found if c.speed is not None]
    if not fitting:
        raise InputError(_nothing_fits(found, recipe, table))
    fitting = [c for c in fitting if not c.tight] or fitting
    threshold = max(map(_throughput, fitting)) * (1 - CLOSE)
    close = [c for c in fitting if _throughput(c) >= threshold]
    return min(close, key=lambda c: (c.layout.tensor, c.layout.replicate, -c.free))


def _nothing_fits(found: Sequence[Candidate], recipe: Recipe, table: hardware.Table) -> str:
    """Returns the message for a recipe that fits in no layout."""
    nearest = min(found, key=lambda c: c.memory.total)
    gpu, needed = nearest.fleet.gpu, nearest.memory.total
    gpus = nearest.layout.gpus
    sharded = nearest.memory.parameters + nearest.memory.gradients + nearest.memory.optimizer

    message = (
        f"{recipe.name} does not fit on {gpus} {gpu.name} of {gpu.memory / GIB:.1f} GiB: the "
        f"smallest layout ({named(nearest.layout)}) needs {needed / GIB:.1f} GiB per GPU"
    )
    table_gpus = (hardware.gpu(table, name) for name in table["gpus"])
    sufficient = sorted((g.memory, g.name) for g in table_gpus if g.memory >= needed)
    if sufficient:
        message += f"; it would fit on {gpus} {sufficient[0][1]}"
    if sharded > needed - gpu.memory:
        message += f", or on more {gpu.name} ({sharded / GIB:.1f} GiB of it shrink with more GPUs)"
    if needed - sharded >= gpu.memory:
        message += "; its activations alone are too large: reduce data.sequence_length"
    return message


def named(layout: Layout) -> str:
    """Returns a layout as text, such as "FSDP 64, micro-batch 1, full checkpointing"."""
    parts = [f"FSDP {layout.shard}"]
    if layout.replicate > 1:
        parts = [f"HSDP {layout.replicate} x {layout.shard}"]
    if layout.tensor > 1:
        parts.append(f"TP {layout.tensor}")
    checkpointing = layout.activation_checkpointing
    if checkpointing == "none":
        checkpointing = "no"
    return f"{' + '.join(parts)}, micro-batch {layout.micro_batch}, {checkpointing} checkpointing"


def why(chosen: Candidate, found: Sequence[Candidate]) -> str:
    """Returns the reason for a choice as text."""
    fitting = [c for c in found if c.speed is not None]
    with_margin = [c for c in fitting if not c.tight]
    reason = f"{len(fitting)} of {len(found)} layouts fit, "
    reason += f"{len(with_margin)} with {MARGIN:.0%} to spare; "
    others = [_throughput(c) for c in (with_margin or fitting) if c is not chosen]
    if others and _throughput(chosen) >= max(others):
        reason += f"the fastest of them, by {_throughput(chosen) / max(others) - 1:.1%}; "
    elif others:
        reason += (
            f"within {CLOSE:.0%} of the fastest of them, and simpler or with more free memory; "
        )
    warning = " (tight: it may run out of memory)" if chosen.tight else ""
    total = chosen.fleet.gpu.memory
    return f"{reason}{chosen.free / GIB:.1f} of {total / GIB:.1f} GiB stay free per GPU{warning}"
