"""The bytes of parameters, gradients and optimizer states on a GPU, counted exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sevenfold.plan import shape
from sevenfold.recipe import Recipe


@dataclass(frozen=True)
class Shards:
    """Bytes of the shards on rank 0, which has the most.

    FSDP2 shards the first dimension; if that is not even, the first ranks have one more row.

    Attributes:
        parameters: Bytes of all parameters.
        gradients: Bytes of the gradients of trained parameters.
        optimizer: Bytes of optimizer states.
        muon: The part of `optimizer` that belongs to Muon.
    """

    parameters: int
    gradients: int
    optimizer: int
    muon: int

    @staticmethod
    def from_recipe(recipe: Recipe, vocab_size: int, shard: int, tensor: int) -> Shards:
        """Returns the shards of a recipe's model.

        All are float32, as model.parallel.shard makes them. AdamW has two states of a parameter's
        size and the step as a number, Muon has one state.

        Args:
            recipe: The recipe.
            vocab_size: The size of the vocabulary.
            shard: The number of FSDP shards.
            tensor: The degree of tensor parallelism.
        """
        total = trained = states = muon = 0
        for p in shape.parameters(recipe, vocab_size):
            count = elements(p, shard, tensor)
            total += count
            if not p.trained:
                continue
            trained += count
            if recipe.optimizer.name == "muon" and p.matrix:
                muon += 4 * count
            else:
                states += 8 * count + 4
        # DPO without an adapter also holds a frozen copy, the reference model.
        copies = 2 if recipe.objective == "dpo" and recipe.adapter is None else 1
        return Shards(
            parameters=4 * copies * total,
            gradients=4 * trained,
            optimizer=states + muon,
            muon=muon,
        )


def elements(p: shape.Parameter, shard: int, tensor: int) -> int:
    """Returns the elements of a parameter on rank 0.

    Args:
        p: The parameter.
        shard: The number of FSDP shards.
        tensor: The degree of tensor parallelism.
    """
    size = list(p.shape)
    if p.split is not None:
        size[p.split] //= tensor
    if size:
        size[0] = -(-size[0] // shard)
    return math.prod(size)
