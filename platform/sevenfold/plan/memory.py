"""Estimates the peak memory of each GPU for a layout, by parts.

`measured` traces a training step of the recipe's model. The tests compare it with arithmetic alone.

A trace takes seconds, so only few are run: with 3 and 4 blocks per stack, 1 and 8 sequences, and at
most 8 ranks. A step has phases (trace.Phases). The memory of each phase is linear in the number of
blocks and of sequences, and shards are counted exactly (plan.shards).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

from sevenfold.model import build
from sevenfold.plan import shape
from sevenfold.plan.hardware import GIB
from sevenfold.plan.layouts import Layout, micro_batches
from sevenfold.plan.shards import Shards
from sevenfold.plan.trace import HeldBytes, Job, Phases, traces
from sevenfold.recipe import Parallel, Recipe

# The numbers of blocks, sequences and ranks that are traced.
TRACED_BLOCKS, TRACED_ROWS, TRACED_RANKS = 3, 8, 8

# What torch.cuda's allocator reserves beyond what is allocated: a share of everything, and a share
# of what is allocated and freed within a step. Fitted to five of our runs on an H200
# (benchmarks/RESULTS.md: 60.8 to 132.8 GB allocated); the error is at most 2 GiB.
SLACK, CHURN = 0.05, 0.10
# CUDA's context with the loaded kernels, and NCCL's channels of one communicator. Not measured by
# us.
CONTEXT, COMMUNICATOR = 0.6 * GIB, 0.4 * GIB
# On a CPU, the share of what is allocated and freed within a step that glibc's heap cannot reuse.
# Fitted to a model of 13M parameters (benchmarks/plan.py). With MALLOC_MMAP_THRESHOLD_=65536, where
# each block is returned to the system by itself, it is 0.03.
HEAP = 0.6


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the peak of a step.

    Attributes:
        parameters: Shards of the parameters.
        gradients: Shards of the gradients, and unsharded ones that are summed over micro-batches
            (engine.step.train_step).
        optimizer: Shards of the optimizer states.
        activations: What the backward pass needs, and temporary tensors.
        logits: Logits, and what the loss computes of them.
        buffers: Gathered parameters of a block, communication buffers, and the model's buffers.
        reserve: Memory that the allocator has reserved but cannot use, and what CUDA and NCCL take.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    reserve: float = 0.0

    @property
    def total(self) -> float:
        """All bytes on the GPU."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def allocated(self) -> float:
        """Bytes as torch.cuda.max_memory_allocated counts them."""
        return self.total - self.reserve


Tracer = Callable[[Sequence[Job]], list[Phases]]


def measured(
    recipe: Recipe,
    layout: Layout,
    vocab_size: int | None = None,
    device: str = "cuda",
    trace: Tracer = traces,
) -> Memory:
    """Returns the memory of one layout; see `all_measured`."""
    return all_measured(recipe, [layout], vocab_size, device, trace)[layout]


def all_measured(
    recipe: Recipe,
    layouts: Iterable[Layout],
    vocab_size: int | None = None,
    device: str = "cuda",
    trace: Tracer = traces,
) -> dict[Layout, Memory]:
    """Returns the memory of layouts by tracing the recipe's model.

    All traces that are needed run together; earlier ones are reused.

    With train.compile, a block without checkpointing is assumed to keep what selective
    checkpointing keeps, and the inputs of its linear layers: the compiler recomputes everything
    else in the backward pass, too.

    Args:
        recipe: The recipe.
        layouts: The layouts.
        vocab_size: The size of the vocabulary if the recipe does not say it.
        device: "cuda" or "cpu", see trace.Job.
        trace: The function that runs the traces.

    Raises:
        InputError: As shape.vocabulary and build.config_of, or the model cannot be split.
    """
    size = shape.vocabulary(recipe, vocab_size)
    families = {
        layout: _Family.from_recipe(recipe, layout, size, device) for layout in list(layouts)
    }
    jobs = [job for layout, family in families.items() for job in family.jobs(layout.micro_batch)]
    _run_traces(jobs, trace)
    return {layout: _peak(recipe, layout, family, trace) for layout, family in families.items()}


@dataclass(frozen=True)
class _Family:
    """Layouts whose memory is interpolated from the same traces.

    They differ in the micro-batch and the number of ranks.

    Attributes:
        recipe: The recipe with one sequence per micro-batch.
        vocab_size: The size of the vocabulary.
        depths: The recipe's number of blocks of each stack.
        ranks: The number of ranks to trace.
        several: Whether a step has several micro-batches.
        device: "cuda" or "cpu".
        compiled: Whether blocks are compiled and not checkpointed.
    """

    recipe: Recipe
    vocab_size: int
    depths: tuple[tuple[str, int], ...]
    ranks: int
    several: bool
    device: str
    compiled: bool

    @staticmethod
    def from_recipe(recipe: Recipe, layout: Layout, vocab_size: int, device: str) -> _Family:
        """Returns the family of a layout."""
        shard = min(layout.shard, TRACED_RANKS)
        train = recipe.train.model_copy(
            update={"micro_batch": 1, "activation_checkpointing": kept(recipe, layout)}
        )
        parallel = Parallel(tensor=layout.tensor)
        depths = shape.depths(build.config_of(recipe, vocab_size))
        return _Family(
            recipe=recipe.model_copy(update={"train": train, "parallel": parallel}),
            vocab_size=vocab_size,
            depths=tuple(depths.items()),
            ranks=shard * layout.tensor,
            several=micro_batches(recipe, layout) > 1,
            device=device,
            compiled=recipe.train.compile and layout.activation_checkpointing == "none",
        )

    def jobs(self, micro_batch: int) -> list[Job]:
        """Returns the traces that this micro-batch needs."""
        return [job for rows in _traced_rows(micro_batch) for job in self.at(rows)]

    def at(self, rows: int) -> list[Job]:
        """Returns the traces with this number of sequences.

        The first has few blocks, each other one has one more block in one of the stacks.
        """
        most = TRACED_BLOCKS + 1
        few = {name: min(n, most) if n <= most else TRACED_BLOCKS for name, n in self.depths}
        one_more = [{**few, name: most} for name, n in self.depths if n > most]
        train = self.recipe.train.model_copy(update={"micro_batch": rows})
        recipe = self.recipe.model_copy(update={"train": train})
        return [
            Job(
                recipe=recipe,
                vocab_size=self.vocab_size,
                depths=tuple(depths.items()),
                gpus=self.ranks,
                micro_batches=2 if self.several else 1,
                device=self.device,
                compiled=self.compiled,
            )
            for depths in (few, *one_more)
        ]


def kept(recipe: Recipe, layout: Layout) -> str:
    """Returns the activation checkpointing to trace for a layout; see `all_measured`."""
    how = layout.activation_checkpointing
    return "selective" if recipe.train.compile and how == "none" else how


def _traced_rows(micro_batch: int) -> tuple[int, ...]:
    """Returns the numbers of sequences to trace for a micro-batch."""
    return (micro_batch,) if micro_batch in (1, TRACED_ROWS) else (1, TRACED_ROWS)


_TRACED: dict[tuple[str, Tracer], Phases] = {}


def _cache_key(job: Job) -> str:
    """Returns everything that a trace depends on, as text."""
    return f"{job.recipe.to_yaml()}{replace(job, recipe=None)}"  # type: ignore[arg-type]


def _run_traces(jobs: Iterable[Job], trace: Tracer) -> None:
    """Runs the traces that are not in _TRACED and puts them there."""
    keys = {(_cache_key(job), trace): job for job in jobs}
    new = {key: job for key, job in keys.items() if key not in _TRACED}
    _TRACED.update(zip(new, trace(list(new.values())), strict=True))


def _peak(recipe: Recipe, layout: Layout, family: _Family, trace: Tracer) -> Memory:
    """Returns the memory at the peak of a step, from traces that have been run."""
    by_rows = {
        rows: _at_full_depth(family, rows, trace) for rows in _traced_rows(layout.micro_batch)
    }
    low, high = by_rows[min(by_rows)], by_rows[max(by_rows)]
    weight = (layout.micro_batch - 1) / (TRACED_ROWS - 1) if len(by_rows) > 1 else 0.0
    phases = {name: HeldBytes.mix((1 - weight, low[name]), (weight, high[name])) for name in low}

    traced = Shards.from_recipe(
        recipe, family.vocab_size, family.ranks // layout.tensor, layout.tensor
    )
    shards = Shards.from_recipe(recipe, family.vocab_size, layout.shard, layout.tensor)
    ratio = shards.gradients / max(1, traced.gradients)
    by_phase = []
    for name, held in phases.items():
        gradients: float = shards.gradients
        activations = temporary = 0.0
        if name == "step":
            # What the optimizer holds beyond its states is temporary: Muon's updates.
            temporary = max(0.0, held.optimizer - traced.muon)
        else:
            gradients = held.gradients * ratio + held.unsharded_gradients
            activations = held.activations
        by_phase.append(
            Memory(
                parameters=shards.parameters,
                gradients=gradients,
                optimizer=shards.optimizer,
                activations=activations,
                logits=held.logits,
                buffers=held.buffers + temporary,
            )
        )
    peak = max(by_phase, key=lambda m: m.total)
    if family.device == "cuda":
        return replace(peak, reserve=allocator(peak) + context(layout))
    return replace(peak, reserve=HEAP * _temporary(peak))


def _at_full_depth(family: _Family, rows: int, trace: Tracer) -> Phases:
    """Extrapolates traces of few blocks to the recipe's number of blocks."""
    few, *one_more = (_TRACED[_cache_key(job), trace] for job in family.at(rows))
    missing = [n - TRACED_BLOCKS for _, n in family.depths if n > TRACED_BLOCKS + 1]
    return {
        name: HeldBytes.mix(
            (1 - sum(missing), held),
            *((n, deeper[name]) for n, deeper in zip(missing, one_more, strict=True)),
        )
        for name, held in few.items()
    }


def allocator(held: Memory) -> float:
    """Returns the bytes that torch.cuda's allocator reserves and cannot use at the peak."""
    return SLACK * held.allocated + CHURN * _temporary(held)


def _temporary(held: Memory) -> float:
    """Returns the bytes that are allocated and freed within a step."""
    return held.activations + held.logits + held.buffers


def context(layout: Layout) -> float:
    """Returns the bytes that CUDA and NCCL take, which torch does not count."""
    communicators = sum(n > 1 for n in (layout.replicate, layout.shard, layout.tensor))
    return CONTEXT + COMMUNICATOR * communicators
