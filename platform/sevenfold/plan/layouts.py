"""How a recipe may be laid over GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sevenfold.data.order import most_rows
from sevenfold.errors import InputError
from sevenfold.model import parallel
from sevenfold.plan import shape
from sevenfold.recipe import Recipe

ROWS = (1, 2, 4, 8)  # a micro-batch
CHECKPOINTING = ("none", "selective", "full")
WAYS = (2, 4, 8)  # of tensor parallelism, within a node: every product waits for it


@dataclass(frozen=True)
class Layout:
    """gpus = replicate x shard x tensor; tensor-parallel ranks are neighbours, then those of a shard group.

    Attributes:
        activation_checkpointing: none, selective or full.
    """

    gpus: int
    replicate: int = 1
    tensor: int = 1
    micro_batch: int = 1
    activation_checkpointing: str = "none"

    @property
    def shard(self) -> int:
        """GPUs that a copy's parameters are dealt out over, tensor parallelism apart."""
        return self.gpus // self.replicate // self.tensor

    @property
    def readers(self) -> int:
        """Groups of GPUs that read rows of their own."""
        return self.gpus // self.tensor


def micro_batches(recipe: Recipe, layout: Layout) -> int:
    """Of a step, a reader's."""
    rows = most_rows(recipe.train.global_batch, layout.readers, max(recipe.lanes, layout.readers))
    return max(1, -(-rows // layout.micro_batch))


def layouts(recipe: Recipe, gpus: int, gpus_per_node: int, vocab_size: int | None = None) -> list[Layout]:
    """Those that may be sensible, the plainest first: FSDP over all GPUs, HSDP with whole nodes a copy, tensor parallelism
    within a node; micro-batches that divide what a reader is given in a step; each kind of activation checkpointing.

    Left out: more readers than lanes or rows a step; copies and tensor parallelism at once.

    Args:
        vocab_size: where the recipe does not say it.

    Raises:
        InputError: the recipe deals out too few rows for so many GPUs.
    """
    model = shape.meta(recipe, shape.vocabulary(recipe, vocab_size))
    found = [
        Layout(gpus, replicate, tensor, rows, kind)
        for replicate, tensor in _meshes(model, gpus, gpus_per_node)
        for rows in _rows(recipe, gpus // tensor)
        for kind in CHECKPOINTING
    ]
    if not found:
        most = min(recipe.lanes, recipe.train.global_batch)
        raise InputError(
            f"{gpus} GPUs, but train.global_batch {recipe.train.global_batch} and {recipe.lanes} lanes feed {most} at most: "
            "raise train.global_batch and data.lanes, or plan for fewer"
        )
    return found


def _meshes(model: object, gpus: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    """(replicate, tensor)."""
    yield 1, 1
    nodes = gpus // gpus_per_node
    for copies in _divisors(nodes) if gpus % gpus_per_node == 0 else ():
        if copies > 1:
            yield copies, 1
    for ways in WAYS:
        if ways <= gpus_per_node and gpus_per_node % ways == 0 and gpus % ways == 0 and splits(model, ways):
            yield 1, ways


def splits(model: object, ways: int) -> bool:
    """Whether tensor parallelism of so many ways can be had."""
    try:
        parallel.tensor_plan(model, ways)
    except InputError:
        return False
    return True


def _rows(recipe: Recipe, readers: int) -> Iterator[int]:
    """Of a micro-batch: the recipe's own, and those of ROWS that divide what a reader is given."""
    if readers > recipe.lanes or readers > recipe.train.global_batch:
        return
    share = -(-recipe.train.global_batch // readers)
    own = recipe.train.micro_batch
    for rows in sorted({*ROWS, own}):
        if (share % rows == 0 and rows <= share) or rows == own <= share:
            yield rows


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
