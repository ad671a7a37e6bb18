"""A tiny sharded model, and rows that it can learn from."""

from typing import Any

import numpy as np
import torch

from sevenfold.data.rows import Rows, labels
from sevenfold.engine import optim
from sevenfold.engine.batch import micro_batches, to_batch
from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
from sevenfold.engine.step import train_step
from sevenfold.model import build, parallel
from sevenfold.recipe import Recipe

VOCAB, LENGTH, ROWS, STEPS = 512, 64, 12, 8


def rows_of(step: int) -> Rows:
    """The rows of one step: documents of many lengths, some with few targets and one with none."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(3, VOCAB, (ROWS, LENGTH)).astype(np.uint16)
    tokens[:, 1::2] = (tokens[:, ::2] * 7 + 5) % VOCAB  # a pattern to learn
    starts = rng.random((ROWS, LENGTH)) < 0.05
    starts[:, 0] = True
    starts[1, 11:] = False
    starts[1, 10] = True  # the rest is padding
    used = np.full(ROWS, LENGTH, np.int32)
    used[1] = 10
    targets = np.ones((ROWS, LENGTH), bool)
    targets[0] = False
    return Rows(tokens, np.nonzero(starts)[1].astype(np.int32), used, targets)


def sharded_model(recipe: Recipe) -> Any:
    """Builds the recipe's model with its losses attached, sharded over the ranks."""
    model = build.build(
        recipe, build.config_of(recipe, VOCAB), weights=torch.distributed.get_rank() == 0
    )
    attach_losses(model, Causal(SpecialTokens(VOCAB), 0, 0.15, 3), recipe.train.loss_chunk)
    return parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)


def train_losses(tree: dict[str, Any], micro_batch: int) -> list[float]:
    """Trains for STEPS steps on this rank's share of the rows and returns the losses."""
    recipe = Recipe.model_validate(tree)
    tensor = recipe.parallel.tensor
    place = parallel.DataRank.from_rank(
        torch.distributed.get_rank(), torch.distributed.get_world_size(), tensor
    )
    rank, world = place.rank, place.world_size
    model = sharded_model(recipe)
    optimizers = optim.build(model, recipe.optimizer)
    history = []
    for step in range(STEPS):
        rows = rows_of(step).part(rank * ROWS // world, (rank + 1) * ROWS // world)
        rows_per_rank = -(-ROWS // world)
        count = -(-rows_per_rank // micro_batch)
        batches = micro_batches(rows, micro_batch, count, to_batch, torch.device("cpu"))
        result = train_step(model, batches, optimizers, 1e-2, 1.0, tensor=tensor)
        assert result.applied and result.targets == int((labels(rows_of(step)) >= 0).sum())
        history.append(result.loss)
    return history
