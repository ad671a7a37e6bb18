"""Padded micro-batches have a maximum size, which does not change the results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from helpers.objectives import (
    BERT,
    LENGTH,
    LLAMA,
    SPECIAL_TOKENS,
    Example,
    document,
    model_of,
    rows_of,
)

from sevenfold.engine.objectives.padding import bounded_batches
from sevenfold.engine.step import train_step
from sevenfold.model import parallel

CPU = torch.device("cpu")


def test_no_batch_is_larger_than_the_bound() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        longest = int(rng.integers(1, 200))
        max_tokens = int(rng.integers(1, 5)) * longest
        lengths = (longest * rng.random(rng.integers(0, 80)) ** rng.integers(1, 6)).astype(int)
        batches = bounded_batches(lengths.tolist(), max_tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        widths = [max(1, *lengths[batch]) for batch in batches]
        assert all(
            0 < len(batch) * width <= max_tokens
            for batch, width in zip(batches, widths, strict=True)
        )
        # two neighbors would not fit into one batch
        assert all(
            (len(batch) + 1) * width > max_tokens
            for batch, width in zip(batches[:-1], widths[:-1], strict=True)
        )


def text_of(seed: int, length: int) -> Example:
    """A document of this length and its class."""
    return [*document(seed, length), seed % 3], [False] * length + [True]


# Rows of one long document, of many short ones, and of nothing: the ranks need different numbers of
# micro-batches.
CLASSIFIED: list[list[Example]] = [
    [text_of(i, 4) for i in range(12)],
    [text_of(20, 60)],
    [text_of(i, 4) for i in range(30, 42)],
    [text_of(50, 50), text_of(51, 5)],
    [text_of(60, 63)],
    [],
    [text_of(70, 63)],
    [text_of(80, 30), text_of(81, 31)],
]


def classified(
    tree: dict[str, Any], config: dict[str, Any], micro_batch: int
) -> tuple[list[float], list[float], list[int], list[int]]:
    """Losses and gradient norms of two steps, their targets, and the batches' sizes in tokens."""
    model, objective, recipe = model_of(tree, "classify", config)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = parallel.shard(model, CPU, recipe.train).train()
    optimizer = torch.optim.SGD(model.parameters())
    max_rows = len(CLASSIFIED) // world
    rows = rows_of(CLASSIFIED).part(rank * max_rows, (rank + 1) * max_rows)
    batches = objective.batches(rows, 0, micro_batch, max_rows, CPU)
    steps = [train_step(model, batches, [optimizer], 0.1, 1.0) for _ in range(2)]
    return (
        [step.loss for step in steps],
        [step.grad_norm for step in steps],
        [step.targets for step in steps],
        [batch.input_ids.numel() for batch in batches],
    )


@pytest.mark.parametrize("config", [BERT, pytest.param(LLAMA, marks=pytest.mark.slow)])
def test_classification_is_the_same_for_any_workers_and_micro_batches(
    tree: dict[str, Any], tmp_path: Path, config: dict[str, Any]
) -> None:
    tree["data"] |= {"classes": ["a", "b", "c"]}
    config = config | {"pad_token_id": SPECIAL_TOKENS.pad}
    # all documents in one batch, on one process
    model, objective, _ = model_of(tree, "classify", config)
    batch = objective.collate(rows_of(CLASSIFIED), 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses, norms = [], []
    for _ in range(2):
        loss = model.token_losses(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(float(loss.detach()))
    for world, micro_batch in ((1, 2), (4, 1)):
        results = run_ranks(world, tmp_path / str(world), classified, tree, config, micro_batch)
        sizes = [result[-1] for result in results]
        assert max(map(max, sizes)) <= micro_batch * LENGTH < batch.input_ids.numel()
        assert len({len(of_rank) for of_rank in sizes}) == 1
        for rank_losses, rank_norms, targets, _ in results:
            assert rank_losses == pytest.approx(losses, abs=1e-6)
            assert rank_norms == pytest.approx(norms, rel=1e-5)
            assert targets == [len(batch.labels)] * 2
