"""What a layout holds on each GPU at its fullest, by parts: traced on the very model, and by a closed form beside it.

A trace costs seconds, so that few are made: of 3 and 4 blocks of each stack, of 1 and 8 rows, over at most 8 ranks. A step has
phases (trace.Phases), and what is held in each is linear in depth and rows; shards are counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

from sevenfold.model import build
from sevenfold.plan import shape
from sevenfold.plan.hardware import GIB
from sevenfold.plan.layouts import Layout, micro_batches
from sevenfold.plan.trace import Held, Job, Phases, traces
from sevenfold.recipe import Parallel, Recipe

FEW, ROWS, RANKS = 3, 8, 8  # blocks, rows and ranks that are traced; see above


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the fullest moment of a step.

    Attributes:
        gradients: also those that are summed up whole over micro-batches (engine.step.train_step).
        activations: what backward needs, and what is made on the way.
        buffers: parameters that are gathered for a block, what is sent and received, buffers of the model.
        reserve: what is free but not usable: of the allocator; and what CUDA and NCCL take for themselves.
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
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def allocated(self) -> float:
        """As torch.cuda.max_memory_allocated."""
        return self.total - self.reserve


Tracer = Callable[[Sequence[Job]], list[Phases]]


def measured(
    recipe: Recipe, layout: Layout, vocab_size: int | None = None, device: str = "cuda", trace: Tracer = traces
) -> Memory:
    """Of one layout; see `all_measured`."""
    return all_measured(recipe, [layout], vocab_size, device, trace)[layout]


def all_measured(
    recipe: Recipe, layouts: Iterable[Layout], vocab_size: int | None = None, device: str = "cuda", trace: Tracer = traces
) -> dict[Layout, Memory]:
    """By traces of the recipe's model, all that are needed in one go; those made before are not made again.

    With train.compile a block that is not checkpointed is taken to keep what selective checkpointing does, and what its linear
    layers read: the compiler makes all else again in backward, too.

    Args:
        vocab_size: where the recipe does not say it.
        device: as trace.Job.
        trace: another way to trace than ours.

    Raises:
        InputError: as shape.vocabulary and build.config_of, and where the model cannot be split.
    """
    size = shape.vocabulary(recipe, vocab_size)
    wanted = list(layouts)
    families = {layout: _Family.of(recipe, layout, size, device) for layout in wanted}
    _trace([job for layout, family in families.items() for job in family.jobs(layout.micro_batch)], trace)
    return {layout: _at(recipe, layout, family, trace) for layout, family in families.items()}


@dataclass(frozen=True)
class _Family:
    """Layouts that hang together by lines.

    Attributes:
        recipe: with one row a micro-batch, over `ranks` ranks.
        depths: blocks of each stack, as the recipe has them.
        several: micro-batches a step.
    """

    recipe: Recipe
    vocab_size: int
    depths: tuple[tuple[str, int], ...]
    ranks: int
    several: bool
    device: str
    compiled: bool

    @staticmethod
    def of(recipe: Recipe, layout: Layout, vocab_size: int, device: str) -> _Family:
        shard = min(layout.shard, RANKS)
        train = recipe.train.model_copy(update={"micro_batch": 1, "activation_checkpointing": kept(recipe, layout)})
        several = micro_batches(recipe, layout) > 1
        one = recipe.model_copy(update={"train": train, "parallel": Parallel(tensor=layout.tensor)})
        compiled = recipe.train.compile and layout.activation_checkpointing == "none"
        depths = shape.depths(build.config_of(recipe, vocab_size))
        return _Family(one, vocab_size, tuple(depths.items()), shard * layout.tensor, several, device, compiled)

    def jobs(self, rows: int) -> list[Job]:
        return [job for n in _ends(rows) for job in self.at(n)]

    def at(self, rows: int) -> list[Job]:
        """The first has few blocks, each other one more of one stack."""
        few = {k: min(n, FEW + 1) if n <= FEW + 1 else FEW for k, n in self.depths}
        more = [{**few, k: FEW + 1} for k, n in self.depths if n > FEW + 1]
        train = self.recipe.train.model_copy(update={"micro_batch": rows})
        recipe = self.recipe.model_copy(update={"train": train})
        count = 2 if self.several else 1
        return [
            Job(recipe, self.vocab_size, tuple(depths.items()), self.ranks, count, self.device, self.compiled)
            for depths in (few, *more)
        ]


def kept(recipe: Recipe, layout: Layout) -> str:
    """Activation checkpointing that keeps what this layout does; see all_measured."""
    how = layout.activation_checkpointing
    return "selective" if recipe.train.compile and how == "none" else how


def _ends(rows: int) -> tuple[int, ...]:
    return (rows,) if rows in (1, ROWS) else (1, ROWS)


_TRACED: dict[tuple[str, Tracer], Phases] = {}


def _name(job: Job) -> str:
    """Of all that a trace hangs on."""
    return f"{job.recipe.to_yaml()}{replace(job, recipe=None)}"  # type: ignore[arg-type]


def _trace(jobs: Iterable[Job], trace: Tracer) -> None:
    new = {(_name(job), trace): job for job in jobs if (_name(job), trace) not in _TRACED}
    _TRACED.update(zip(new, trace(list(new.values())), strict=True))


def _at(recipe: Recipe, layout: Layout, family: _Family, trace: Tracer) -> Memory:
    held = {rows: _deep(family, rows, trace) for rows in _ends(layout.micro_batch)}
    low, high = held[min(held)], held[max(held)]
    share = (layout.micro_batch - 1) / (ROWS - 1) if len(held) > 1 else 0.0
    phases = {name: Held.mix((1 - share, low[name]), (share, high[name])) for name in low}

    few = Shards.of(recipe, family.vocab_size, family.ranks // layout.tensor, layout.tensor)
    shards = Shards.of(recipe, family.vocab_size, layout.shard, layout.tensor)
    ratio = shards.gradients / max(1, few.gradients)
    moments = []
    for name, now in phases.items():
        stepping = name == "step"
        moments.append(
            Memory(
                parameters=shards.parameters, optimizer=shards.optimizer,
                gradients=shards.gradients if stepping else now.gradients * ratio + now.whole,
                activations=0.0 if stepping else now.activations, logits=now.logits,
                buffers=now.buffers + (max(0.0, now.optimizer - few.muon) if stepping else 0.0),
            )
        )  # fmt: skip
    fullest = max(moments, key=lambda m: m.total)
    more = allocator(fullest) + context(layout) if family.device == "cuda" else HEAP * _churn(fullest)
    return replace(fullest, reserve=more)


def _deep(family: _Family, rows: int, trace: Tracer) -> Phases:
    """At the recipe's depth."""
    few, *more = (_TRACED[_name(job), trace] for job in family.at(rows))
    beyond = [n - FEW for _, n in family.depths if n > FEW + 1]
    return {
        name: Held.mix((1 - sum(beyond), held), *((n, other[name]) for n, other in zip(beyond, more, strict=True)))
        for name, held in few.items()
    }


@dataclass(frozen=True)
class Shards:
    """Bytes of rank 0, which has most: FSDP2 deals out rows, and the first ranks have one more where that is not even.

    Attributes:
        muon: of `optimizer`, Muon's alone.
    """

    parameters: int
    gradients: int
    optimizer: int
    muon: int

    @staticmethod
    def of(recipe: Recipe, vocab_size: int, shard: int, tensor: int) -> Shards:
        """float32 all of them, as model.parallel.shard has it; AdamW has two of a parameter's size and a number, Muon one."""
        held = trained = states = muon = 0
        for p in shape.parameters(recipe, vocab_size):
            count = elements(p, shard, tensor)
            held += count
            if not p.trained:
                continue
            trained += count
            if recipe.optimizer.name == "muon" and p.matrix:
                muon += 4 * count
            else:
                states += 8 * count + 4
        copies = 2 if recipe.objective == "dpo" and recipe.adapter is None else 1  # what it was, frozen
        return Shards(4 * copies * held, 4 * trained, states + muon, muon)


def elements(p: shape.Parameter, shard: int, tensor: int) -> int:
    """Of rank 0's part."""
    size = list(p.shape)
    if p.split is not None:
        size[p.split] //= tensor
    if size:
        size[0] = -(-size[0] // shard)
    return math.prod(size)


# what torch.cuda's allocator reserves beyond what is allocated, of all and of what comes and goes within a step: fitted on five
# runs of ours on an H200 (benchmarks/RESULTS.md: 60.8 to 132.8 GB allocated), off by 2 GiB at most
SLACK, CHURN = 0.05, 0.10
# not measured here: CUDA's context with the kernels that are loaded, and NCCL's channels of one communicator
CONTEXT, COMMUNICATOR = 0.6 * GIB, 0.4 * GIB
# on a CPU, what glibc's heap cannot use again of what comes and goes: fitted on a model of 13M (benchmarks/plan.py). With
# MALLOC_MMAP_THRESHOLD_=65536, where each block is given back by itself, it is 0.03.
HEAP = 0.6


def allocator(held: Memory) -> float:
    """Bytes that torch.cuda's allocator reserves and cannot use at the fullest moment."""
    return SLACK * held.allocated + CHURN * _churn(held)


def _churn(held: Memory) -> float:
    return held.activations + held.logits + held.buffers


def context(layout: Layout) -> float:
    """Bytes that CUDA and NCCL take, which torch does not count."""
    return CONTEXT + COMMUNICATOR * sum(n > 1 for n in (layout.replicate, layout.shard, layout.tensor))


def closed_form(recipe: Recipe, layout: Layout, vocab_size: int | None = None) -> Memory:
    """Of one layout, on a GPU, by arithmetic alone: a check beside the trace, and quick. Attention is taken to keep no
    probabilities (FlashAttention, arXiv 2205.14135); what a block keeps is counted as in arXiv 2205.05198, by what its
    products make: with full checkpointing its input, with selective these too (compiled: and what they read), else twice these
    and norms' float32 copies.
    """
    size = shape.vocabulary(recipe, vocab_size)
    shards = Shards.of(recipe, size, layout.shard, layout.tensor)
    config, how = build.config_of(recipe, size), kept(recipe, layout)
    a, d, sides = (2 if recipe.train.dtype == "bfloat16" else 4), config.hidden_size, shape.sides(recipe)
    acts = block = biggest = 0.0
    for i, (name, depth) in enumerate(shape.blocks_of(recipe, size).items()):
        inside = [p for p in shape.parameters(recipe, size) if p.stack == name]
        tokens = layout.micro_batch * sides[min(i, len(sides) - 1)]
        ways = [layout.tensor if p.split is not None else 1 for p in inside]
        matrices = [(p, n) for p, n in zip(inside, ways, strict=True) if len(p.shape) == 2]
        made = sum(p.shape[0] // (n if p.split == 0 else 1) for p, n in matrices) / depth
        widest = max(p.shape[1] // (n if p.split == 1 else 1) for p, n in matrices)
        eager = tokens * (2 * a * made + 8 * d)
        read = 2 * d + widest if recipe.train.compile and layout.activation_checkpointing == "none" else 0
        acts += depth * {"full": a * tokens * d, "selective": a * tokens * (made + 2 * d + read)}.get(how, eager)
        block = max(block, sum(elements(p, 1, layout.tensor) for p in inside) / depth)
        biggest = max(biggest, eager)
    outside = sum(elements(p, 1, layout.tensor) for p in shape.parameters(recipe, size) if p.stack is None)
    head = recipe.objective not in ("classify", "embed")
    rows = layout.micro_batch * sides[-1]
    logits = 12.0 * size * min(rows, recipe.train.loss_chunk or rows) * head
    trained = sum(elements(p, 1, layout.tensor) for p in shape.parameters(recipe, size) if p.trained)
    whole = 4.0 * trained * (micro_batches(recipe, layout) > 1)
    part = trained / sum(elements(p, 1, layout.tensor) for p in shape.parameters(recipe, size))
    gathered, again = a * (outside + 2 * block), biggest if how != "none" else 0.0
    moments = (  # the loss, the last block's backward, the look-up table's, the optimizer's step
        Memory(shards.parameters, whole, shards.optimizer, acts, logits, gathered),
        Memory(shards.parameters, whole, shards.optimizer, acts + again, 0.0, gathered + (a + 4) * block * part),
        Memory(shards.parameters, shards.gradients, shards.optimizer, 8.0 * outside * part, 0.0, 0.0),
        Memory(shards.parameters, shards.gradients, shards.optimizer, 0.0, 0.0, 0.0),
    )
    fullest = max(moments, key=lambda m: m.total)
    return replace(fullest, reserve=allocator(fullest) + context(layout))
