"""How long a step takes: a roofline of the counted operations, and of what is sent between GPUs.

Assumed, beside what hardware.yaml says of a GPU: rows are single documents as long as they may be (documents packed into a row
make attention quicker); data waits for nobody; kernels run one after another at the rates below; what FSDP sends is hidden
behind the products of one block, but for what takes longer than these. Sources of the constants stand beside them; how well it
holds: benchmarks/plan.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.plan import ops, shape
from sevenfold.plan.hardware import Fleet, Gpu
from sevenfold.plan.layouts import Layout, micro_batches
from sevenfold.plan.ops import Work
from sevenfold.recipe import Recipe

# fitted, by least squares of relative errors, to the rows of benchmarks/published.py that say so
MEMORY = 0.75  # of a memory's bandwidth that a kernel reaches which does nothing else
FUSED = 0.38  # of the bytes that operations read and write one by one, those that are left under torch.compile
# chosen: no published row tells them apart
LAUNCH = 6e-6  # seconds that the host takes to start an operation without torch.compile
SENT = 0.7  # of a link's bandwidth that collectives reach
CROWDED = 0.25  # of the time that hidden collectives take, what they take from kernels beside them
REPLICATED = 0.4  # of a block's bytes, those that tensor-parallel neighbours each read and write: norms and residuals
SPREAD = 0.15  # of the estimate, either way, that is told as its range


@dataclass(frozen=True)
class Size:
    """A model: parameters in all, of them those trained, those in blocks, those that Muon takes; the blocks; FLOPs a token,
    as MFU counts them (build.flops_per_token)."""

    parameters: int
    trained: int
    in_blocks: int
    matrices: tuple[tuple[int, ...], ...]
    blocks: int
    hidden: int
    flops_per_token: float


@dataclass(frozen=True)
class Speed:
    """Of a step: seconds, and these by part; tokens a second of all GPUs; MFU against the data sheet's peak."""

    step: float
    tokens: float
    gpus: int
    mfu: float
    parts: dict[str, float]

    @property
    def per_gpu(self) -> float:
        return self.tokens / self.gpus

    @property
    def range(self) -> tuple[float, float]:
        """Tokens a second, between which it should lie."""
        return self.tokens * (1 - SPREAD), self.tokens * (1 + SPREAD)


def size(recipe: Recipe, vocab_size: int) -> Size:
    return _size(shape.Key(recipe, vocab_size))


@functools.lru_cache(maxsize=64)
def _size(key: shape.Key) -> Size:
    recipe, vocab_size = key.recipe, key.vocab_size
    model = shape.meta(recipe, vocab_size)
    found = shape.parameters(recipe, vocab_size)

    def count(of: Iterable[shape.Parameter]) -> int:
        return sum(math.prod(p.shape) for p in of)

    muon = tuple(p.shape for p in found if p.matrix and p.trained) if recipe.optimizer.name == "muon" else ()
    return Size(
        count(found), count(p for p in found if p.trained), count(p for p in found if p.stack), muon,
        sum(shape.depths(model.config).values()), model.config.hidden_size, build.flops_per_token(model, recipe),
    )  # fmt: skip


def estimate(recipe: Recipe, vocab_size: int, layout: Layout, fleet: Fleet) -> Speed:
    """Raises InputError where the GPU has no fast products of the recipe's dtype."""
    how = layout.activation_checkpointing
    passed = ops.of(recipe, vocab_size, layout.micro_batch, how)
    if recipe.objective == "dpo":  # a reference model says what it thinks first
        passed = ops.Pass(passed.forward * 2, passed.backward, passed.rest_forward * 2, passed.rest_backward)
    made, count, again = size(recipe, vocab_size), micro_batches(recipe, layout), int(how != "none")
    return timed(passed, made, layout, fleet, recipe.train.dtype, recipe.train.compile, count, recipe.tokens_per_step, again)


def timed(
    passed: ops.Pass, model: Size, layout: Layout, fleet: Fleet, dtype: str, compiled: bool, micro_batches: int, tokens: int,
    again: int = 0,
) -> Speed:  # fmt: skip
    """Raises InputError as `check`.

    Args:
        passed: a micro-batch's operations.
        tokens: of a step of all GPUs.
        again: how often a block's forward pass is run a second time, for what tensor parallelism then sends again.
    """
    gpu = fleet.gpu
    check(gpu, dtype)
    forward = _taken(passed.forward, gpu, dtype, compiled, layout.tensor)
    backward = _taken(passed.backward, gpu, dtype, compiled, layout.tensor)
    rest = _taken(passed.rest_forward + passed.rest_backward, gpu, dtype, False, layout.tensor)
    gathered, reduced = _sharding(model, layout, fleet)
    inside = model.in_blocks / model.parameters
    hidden_forward, hidden_backward = _total(forward), _total(backward)

    def exposed(sent: float, beside: float) -> float:
        """What is not hidden: the first block's and the root's, what takes longer than the work beside it, the crowding."""
        blocks = sent * inside
        first = blocks / max(1, model.blocks) + sent * (1 - inside)
        return first + max(0.0, blocks - beside) + CROWDED * min(blocks, beside)

    each = exposed(gathered, hidden_forward) + exposed(gathered, hidden_backward)
    last = exposed(gathered, hidden_forward) + exposed(gathered + reduced, hidden_backward)
    neighbours = _tensor(passed, model, layout, fleet, tokens / micro_batches / layout.readers, dtype, again)
    parts = {
        name: micro_batches * (forward[name] + backward[name] + rest[name])
        for name in ("products", "attention", "memory", "host")
    }
    parts["memory"] += _copied(model, layout, gpu, dtype, micro_batches)
    parts["communication"] = (micro_batches - 1) * each + last + micro_batches * neighbours
    parts["optimizer"] = _optimizer(model, layout, gpu, fleet)
    step = sum(parts.values())
    rate = tokens / step
    return Speed(step, rate, layout.gpus, rate / layout.gpus * model.flops_per_token / gpu.flops[dtype], parts)


def check(gpu: Gpu, dtype: str) -> None:
    """Raises InputError where the GPU has no fast products of the dtype."""
    if dtype not in gpu.flops:
        raise InputError(f"train.dtype {dtype}: {gpu.name} has no fast products of it: take float32, or another GPU")


def _taken(work: Work, gpu: Gpu, dtype: str, compiled: bool, tensor: int) -> dict[str, float]:
    """Seconds, by part. Of products both what computing and what reading and writing take: they hide each other badly."""
    peak, rate = gpu.flops[dtype], gpu.bandwidth * MEMORY
    shared = REPLICATED + (1 - REPLICATED) / tensor
    out = {
        "products": (work.products / (peak * gpu.gemm) + work.product_bytes / rate) / tensor,
        "attention": work.attention / (peak * gpu.attention) / tensor,
        "memory": work.bytes * shared * (FUSED if compiled else 1.0) / rate,
    }
    out["host"] = 0.0 if compiled else max(0.0, work.kernels * LAUNCH - sum(out.values()))
    return out


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _sharding(model: Size, layout: Layout, fleet: Fleet) -> tuple[float, float]:
    """Seconds to gather all parameters once (bfloat16), and to sum all gradients up (float32) and share them out.

    A ring over nodes crosses each node's border once, so that a node's whole network carries it (NCCL's tests count it so);
    tensor-parallel neighbours' rings share it.
    """
    shard, per_node = layout.shard, max(1, fleet.gpus_per_node // layout.tensor)
    within = shard <= per_node
    rate = SENT * (fleet.link if within else min(fleet.link, fleet.network / min(layout.tensor, fleet.gpus_per_node)))
    part = (shard - 1) / shard / layout.tensor
    gathered = 2.0 * model.parameters * part / rate
    reduced = 4.0 * model.trained * part / rate
    if layout.replicate > 1:  # each GPU's shard is summed up with those of the other copies
        copies = layout.replicate
        across = SENT * (fleet.network / fleet.gpus_per_node if layout.gpus > fleet.gpus_per_node else fleet.link)
        reduced += 2 * 4.0 * model.trained / shard / layout.tensor * (copies - 1) / copies / across
    return gathered, reduced


def _tensor(passed: ops.Pass, model: Size, layout: Layout, fleet: Fleet, tokens: float, dtype: str, again: int) -> float:
    """Seconds of a micro-batch's all-reduces: two a block forward, two backward (arXiv 1909.08053), nothing beside them."""
    if layout.tensor == 1:
        return 0.0
    size = tokens * model.hidden * (2 if dtype == "bfloat16" else 4)
    each = 2 * size * (layout.tensor - 1) / layout.tensor / (fleet.link * SENT)
    return model.blocks * (4 + 2 * again) * each


def _copied(model: Size, layout: Layout, gpu: Gpu, dtype: str, micro_batches: int) -> float:
    """Seconds that FSDP2 copies in a step: of each micro-batch shards are cast (read 4, write 2) and what was gathered is laid
    out (2, 2), both twice; gradients are laid out as float32 to be summed up (2, 4), or added to those before (6, 4)."""
    held, summed = (2 * (6 / layout.shard + 4), 6) if dtype == "bfloat16" else (2 * (8 / layout.shard + 8), 8)
    if micro_batches > 1:
        summed = micro_batches * 10 + 8
    moved = micro_batches * held * model.parameters + summed * model.trained
    return moved / layout.tensor / (gpu.bandwidth * MEMORY)


def _optimizer(model: Size, layout: Layout, gpu: Gpu, fleet: Fleet) -> float:
    """Seconds: AdamW reads weights, gradients and both moments and writes all but gradients, clipping reads gradients, reads
    and writes them (40 bytes in float32); Muon's Newton-Schulz steps are shared out by matrix."""
    own = model.trained / layout.shard / layout.tensor
    seconds = 40 * own / (gpu.bandwidth * MEMORY)
    for shape_ in model.matrices:
        rows, columns = min(shape_[0], math.prod(shape_[1:])), max(shape_[0], math.prod(shape_[1:]))
        flops = 5 * (4.0 * rows * rows * columns + 2.0 * rows**3)
        sent = 2 * 4.0 * rows * columns / (SENT * (fleet.link if layout.gpus <= fleet.gpus_per_node else fleet.network))
        seconds += flops / layout.gpus / (gpu.flops.get("bfloat16", gpu.flops["float32"]) * gpu.gemm) + sent * (layout.gpus > 1)
    return seconds
