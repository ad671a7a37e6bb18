"""Estimates how long a step takes: a roofline of its operations and of its communication.

Besides what hardware.yaml says of a GPU, it is assumed that
- each sequence is a single document of full length (packed documents make attention faster);
- no rank waits for data;
- kernels run one after another, at the rates below;
- FSDP's communication overlaps with the computation of one block; only what takes longer than that
  costs time.

The constants below name their sources. For the accuracy see benchmarks/plan.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.plan import ops, shape
from sevenfold.plan.hardware import Fleet, Gpu
from sevenfold.plan.layouts import Layout, micro_batches
from sevenfold.plan.ops import Work
from sevenfold.recipe import Recipe

# Fitted to the rows of benchmarks/published.py that are marked so, by least squares of the relative
# errors:
MEMORY = 0.75  # the share of the memory bandwidth that a memory-bound kernel reaches
# The share of the bytes of separate operations that is left under torch.compile.
FUSED = 0.38
# Chosen, as no published row distinguishes between values:
LAUNCH = 6e-6  # seconds to launch an operation without torch.compile
SENT = 0.7  # the share of a link's bandwidth that collectives reach
# How much of the time of overlapped collectives is lost, as they slow down concurrent kernels.
CROWDED = 0.25
# The share of a block's bytes that tensor parallelism does not split: norms and residuals.
REPLICATED = 0.4
SPREAD = 0.15  # the range that is shown around an estimate, in each direction


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        parameters: The number of parameters.
        trained: The number of trained parameters.
        in_blocks: The number of parameters in blocks.
        matrices: The shapes of the parameters that Muon optimizes.
        blocks: The number of blocks.
        hidden: The width.
        flops_per_token: FLOPs per token as MFU counts them (build.flops_per_token).
    """

    parameters: int
    trained: int
    in_blocks: int
    matrices: tuple[tuple[int, ...], ...]
    blocks: int
    hidden: int
    flops_per_token: float


@dataclass(frozen=True)
class Speed:
    """The speed of training.

    Attributes:
        step: Seconds per step.
        tokens: Tokens per second of all GPUs.
        gpus: The number of GPUs.
        mfu: Model FLOPs utilization, relative to the peak of the data sheet.
        parts: Seconds per step by part.
    """

    step: float
    tokens: float
    gpus: int
    mfu: float
    parts: dict[str, float]

    @property
    def per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.gpus

    @property
    def range(self) -> tuple[float, float]:
        """The tokens per second between which the real speed should be."""
        return self.tokens * (1 - SPREAD), self.tokens * (1 + SPREAD)


def size(recipe: Recipe, vocab_size: int) -> Size:
    """Returns the size of the recipe's model."""
    return _size(shape.Key(recipe, vocab_size))


@functools.lru_cache(maxsize=64)
def _size(key: shape.Key) -> Size:
    recipe, vocab_size = key.recipe, key.vocab_size
    model = shape.meta(recipe, vocab_size)
    parameters = shape.parameters(recipe, vocab_size)

    def count(subset: Iterable[shape.Parameter]) -> int:
        return sum(math.prod(p.shape) for p in subset)

    with_muon = recipe.optimizer.name == "muon"
    return Size(
        parameters=count(parameters),
        trained=count(p for p in parameters if p.trained),
        in_blocks=count(p for p in parameters if p.stack),
        matrices=tuple(p.shape for p in parameters if with_muon and p.matrix and p.trained),
        blocks=sum(shape.depths(model.config).values()),
        hidden=model.config.hidden_size,
        flops_per_token=build.flops_per_token(model, recipe),
    )


def estimate(recipe: Recipe, vocab_size: int, layout: Layout, fleet: Fleet) -> Speed:
    """Returns the speed of training the recipe.

    Args:
        recipe: The recipe.
        vocab_size: The size of the vocabulary.
        layout: How the model is distributed.
        fleet: The machines.

    Raises:
        InputError: As `check`.
    """
    checkpointing = layout.activation_checkpointing
    passed = ops.count_operations(recipe, vocab_size, layout.micro_batch, checkpointing)
    count = micro_batches(recipe, layout)
    # dpo: the reference model runs a forward pass, too; embed: GradCache repeats that of all
    # micro-batches but one
    forwards = {"dpo": 2.0, "embed": 2 - 1 / count}.get(recipe.objective, 1.0)
    passed = replace(
        passed, forward=passed.forward * forwards, rest_forward=passed.rest_forward * forwards
    )
    return speed_of_pass(
        passed,
        size(recipe, vocab_size),
        layout,
        fleet,
        recipe.train.dtype,
        recipe.train.compile,
        count,
        recipe.tokens_per_step,
        recomputations=int(checkpointing != "none"),
    )


def speed_of_pass(
    passed: ops.Pass,
    model: Size,
    layout: Layout,
    fleet: Fleet,
    dtype: str,
    compiled: bool,
    micro_batches: int,
    tokens: int,
    recomputations: int = 0,
) -> Speed:
    """Returns the speed of training with these operations.

    Args:
        passed: The operations of a micro-batch.
        model: The size of the model.
        layout: How the model is distributed.
        fleet: The machines.
        dtype: The dtype of the computation.
        compiled: Whether blocks are compiled.
        micro_batches: Micro-batches per step.
        tokens: Tokens per step of all GPUs.
        recomputations: How often the forward pass of a block is recomputed, which repeats the
            communication of tensor parallelism.

    Raises:
        InputError: As `check`.
    """
    gpu = fleet.gpu
    require_dtype(gpu, dtype)
    forward = _seconds(passed.forward, gpu, dtype, compiled, layout.tensor)
    backward = _seconds(passed.backward, gpu, dtype, compiled, layout.tensor)
    rest = _seconds(passed.rest_forward + passed.rest_backward, gpu, dtype, False, layout.tensor)
    parts = {
        name: micro_batches * (forward[name] + backward[name] + rest[name])
        for name in ("products", "attention", "memory", "host")
    }
    parts["memory"] += _copy_seconds(model, layout, gpu, dtype, micro_batches)

    forward_seconds, backward_seconds = sum(forward.values()), sum(backward.values())
    gather, reduce = _fsdp_seconds(model, layout, fleet)
    forward_gather = _exposed(gather, forward_seconds, model)
    each = forward_gather + _exposed(gather, backward_seconds, model)
    # Gradients are only reduced in the last micro-batch.
    last = forward_gather + _exposed(gather + reduce, backward_seconds, model)
    tokens_per_rank = tokens / micro_batches / layout.readers
    tensor = _tensor_seconds(model, layout, fleet, tokens_per_rank, dtype, recomputations)
    parts["communication"] = (micro_batches - 1) * each + last + micro_batches * tensor
    parts["optimizer"] = _optimizer_seconds(model, layout, gpu, fleet)

    step = sum(parts.values())
    rate = tokens / step
    return Speed(
        step=step,
        tokens=rate,
        gpus=layout.gpus,
        mfu=rate / layout.gpus * model.flops_per_token / gpu.flops[dtype],
        parts=parts,
    )


def require_dtype(gpu: Gpu, dtype: str) -> None:
    """Checks that a GPU has fast matmuls in a dtype.

    Raises:
        InputError: It has none.
    """
    if dtype not in gpu.flops:
        raise InputError(
            f"train.dtype {dtype}: {gpu.name} has no fast matmuls in this dtype; "
            "set train.dtype=float32, or choose another GPU"
        )


def _seconds(work: Work, gpu: Gpu, dtype: str, compiled: bool, tensor: int) -> dict[str, float]:
    """Returns the seconds of operations, by part.

    For matmuls it is the sum of computing and memory access, as they hardly overlap.
    """
    peak, memory_rate = gpu.flops[dtype], gpu.bandwidth * MEMORY
    memory_share = REPLICATED + (1 - REPLICATED) / tensor
    matmul = work.matmul / (peak * gpu.gemm) + work.matmul_bytes / memory_rate
    result = {
        "products": matmul / tensor,
        "attention": work.attention / (peak * gpu.attention) / tensor,
        "memory": work.bytes * memory_share * (FUSED if compiled else 1.0) / memory_rate,
    }
    # Launches only cost time where they take longer than the kernels.
    launches = work.kernels * LAUNCH - sum(result.values())
    result["host"] = 0.0 if compiled else max(0.0, launches)
    return result


def _exposed(communication: float, computation: float, model: Size) -> float:
    """Returns the seconds of FSDP's communication that computation does not hide.

    That is the communication of the first block and of the root module, what takes longer than the
    computation, and how much overlapped communication slows down the computation.

    Args:
        communication: Seconds of communication for all parameters.
        computation: Seconds of computation of all blocks.
        model: The size of the model.
    """
    inside = model.in_blocks / model.parameters
    blocks = communication * inside
    first = blocks / max(1, model.blocks) + communication * (1 - inside)
    return first + max(0.0, blocks - computation) + CROWDED * min(blocks, computation)


def _fsdp_seconds(model: Size, layout: Layout, fleet: Fleet) -> tuple[float, float]:
    """Returns the seconds to gather all parameters once and to reduce-scatter all gradients.

    Parameters are bfloat16, gradients float32. A ring over nodes crosses the border of each node
    once, so that it can use a node's whole network bandwidth (NCCL's tests count it so). The rings
    of tensor-parallel neighbours share that bandwidth.
    """
    shard, per_node = layout.shard, max(1, fleet.gpus_per_node // layout.tensor)
    if shard <= per_node:
        bandwidth = fleet.link
    else:
        rings = min(layout.tensor, fleet.gpus_per_node)
        bandwidth = min(fleet.link, fleet.network / rings)
    rate = SENT * bandwidth
    ring_share = (shard - 1) / shard / layout.tensor
    gather = 2.0 * model.parameters * ring_share / rate
    reduce = 4.0 * model.trained * ring_share / rate
    if layout.replicate > 1:  # the shards' gradients are all-reduced between the replicas
        replicas = layout.replicate
        several_nodes = layout.gpus > fleet.gpus_per_node
        across = SENT * (fleet.network / fleet.gpus_per_node if several_nodes else fleet.link)
        shard_bytes = 4.0 * model.trained / shard / layout.tensor
        reduce += 2 * shard_bytes * (replicas - 1) / replicas / across
    return gather, reduce


def _tensor_seconds(
    model: Size, layout: Layout, fleet: Fleet, tokens: float, dtype: str, recomputations: int
) -> float:
    """Returns the seconds that a micro-batch's all-reduces of tensor parallelism take.

    Each block has two in the forward and two in the backward pass (arXiv 1909.08053). Nothing
    overlaps with them.
    """
    if layout.tensor == 1:
        return 0.0
    size = tokens * model.hidden * (2 if dtype == "bfloat16" else 4)
    each = 2 * size * (layout.tensor - 1) / layout.tensor / (fleet.link * SENT)
    return model.blocks * (4 + 2 * recomputations) * each


def _copy_seconds(model: Size, layout: Layout, gpu: Gpu, dtype: str, micro_batches: int) -> float:
    """Returns the seconds that FSDP2 spends on copies in a step.

    In bytes per parameter: each micro-batch casts shards (reads 4, writes 2) and lays out what was
    gathered (2 and 2), both twice. Gradients are laid out as float32 to be reduced (2 and 4), or
    added to those of earlier micro-batches (6 and 4).
    """
    if dtype == "bfloat16":
        per_micro_batch, per_step = 2 * (6 / layout.shard + 4), 6
    else:
        per_micro_batch, per_step = 2 * (8 / layout.shard + 8), 8
    if micro_batches > 1:
        per_step = micro_batches * 10 + 8
    moved = micro_batches * per_micro_batch * model.parameters + per_step * model.trained
    return moved / layout.tensor / (gpu.bandwidth * MEMORY)


def _optimizer_seconds(model: Size, layout: Layout, gpu: Gpu, fleet: Fleet) -> float:
    """Returns the seconds of clipping and the optimizer's step.

    AdamW reads weights, gradients and both moments and writes all but the gradients; clipping reads
    gradients, then reads and writes them: 40 bytes per parameter in float32. Muon's Newton-Schulz
    iterations are distributed over the GPUs by matrix.
    """
    per_gpu = model.trained / layout.shard / layout.tensor
    seconds = 40 * per_gpu / (gpu.bandwidth * MEMORY)
    link = fleet.link if layout.gpus <= fleet.gpus_per_node else fleet.network
    for matrix in model.matrices:
        sides = matrix[0], math.prod(matrix[1:])
        rows, columns = min(sides), max(sides)
        flops = 5 * (4.0 * rows * rows * columns + 2.0 * rows**3)
        sent = 2 * 4.0 * rows * columns / (SENT * link)
        peak = gpu.flops.get("bfloat16", gpu.flops["float32"])
        compute = flops / layout.gpus / (peak * gpu.gemm)
        seconds += compute + sent * (layout.gpus > 1)
    return seconds
