"""The ways to distribute a recipe's model over GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sevenfold.data.lanes import max_rows_per_rank
from sevenfold.errors import InputError
from sevenfold.model import parallel
from sevenfold.plan import shape
from sevenfold.recipe import Recipe

MICRO_BATCHES = (1, 2, 4, 8)  # sequences per micro-batch
CHECKPOINTING = ("none", "selective", "full")
# Degrees of tensor parallelism, within a node only: every matmul waits for its communication.
TENSOR_SIZES = (2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """How a model is distributed over GPUs: gpus = replicate x shard x tensor.

    Tensor-parallel ranks are adjacent, then come those of a shard group.

    Attributes:
        gpus: The number of GPUs.
        replicate: Replicas of the model in HSDP; 1 is plain FSDP.
        tensor: The degree of tensor parallelism.
        micro_batch: Sequences per micro-batch.
        activation_checkpointing: none, selective or full.
    """

    gpus: int
    replicate: int = 1
    tensor: int = 1
    micro_batch: int = 1
    activation_checkpointing: str = "none"

    @property
    def shard(self) -> int:
        """The number of FSDP shards of a replica."""
        return self.gpus // self.replicate // self.tensor

    @property
    def readers(self) -> int:
        """The data-parallel size: GPUs of a tensor-parallel group read the same sequences."""
        return self.gpus // self.tensor


def micro_batches(recipe: Recipe, layout: Layout) -> int:
    """Returns the number of micro-batches per step of each data-parallel rank."""
    sequences = max_rows_per_rank(
        recipe.train.global_batch, layout.readers, max(recipe.lanes, layout.readers)
    )
    return max(1, -(-sequences // layout.micro_batch))


def layouts(
    recipe: Recipe, gpus: int, gpus_per_node: int, vocab_size: int | None = None
) -> list[Layout]:
    """Returns the layouts worth considering, the simplest first.

    They are FSDP over all GPUs, HSDP whose replicas are whole nodes, and tensor parallelism within
    a node; each with micro-batches that divide a rank's sequences per step, and with each kind of
    activation checkpointing. HSDP together with tensor parallelism is left out, and so are layouts
    with more data-parallel ranks than lanes or sequences per step.

    Args:
        recipe: The recipe.
        gpus: The number of GPUs.
        gpus_per_node: GPUs of each node.
        vocab_size: The size of the vocabulary if the recipe does not say it.

    Raises:
        InputError: The recipe has too few lanes or sequences per step for this number of GPUs.
    """
    model = shape.meta(recipe, shape.vocabulary(recipe, vocab_size))
    found = [
        Layout(gpus, replicate, tensor, micro_batch, checkpointing)
        for replicate, tensor in _meshes(model, gpus, gpus_per_node)
        for micro_batch in _micro_batches(recipe, gpus // tensor)
        for checkpointing in CHECKPOINTING
    ]
    if not found:
        most = min(recipe.lanes, recipe.train.global_batch)
        raise InputError(
            f"{gpus} GPUs are too many: train.global_batch {recipe.train.global_batch} and "
            f"{recipe.lanes} lanes feed {most} at most; raise train.global_batch and data.lanes, "
            "or plan for fewer GPUs"
        )
    return found


def _meshes(model: object, gpus: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    """Yields (replicate, tensor)."""
    yield 1, 1
    if gpus % gpus_per_node == 0:
        for replicas in _divisors(gpus // gpus_per_node):
            if replicas > 1:
                yield replicas, 1
    for tensor in TENSOR_SIZES:
        fits_nodes = tensor <= gpus_per_node and gpus_per_node % tensor == 0 and gpus % tensor == 0
        if fits_nodes and _supports_tensor_parallelism(model, tensor):
            yield 1, tensor


def _supports_tensor_parallelism(model: object, tensor: int) -> bool:
    """Whether the model can be split over this number of GPUs."""
    try:
        parallel.tensor_plan(model, tensor)
    except InputError:
        return False
    return True


def _micro_batches(recipe: Recipe, readers: int) -> Iterator[int]:
    """Yields the recipe's micro-batch and those that divide a rank's sequences per step."""
    if readers > recipe.lanes or readers > recipe.train.global_batch:
        return
    per_rank = -(-recipe.train.global_batch // readers)
    own = recipe.train.micro_batch
    for micro_batch in sorted({*MICRO_BATCHES, own}):
        divides = per_rank % micro_batch == 0 and micro_batch <= per_rank
        if divides or micro_batch == own <= per_rank:
            yield micro_batch


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
