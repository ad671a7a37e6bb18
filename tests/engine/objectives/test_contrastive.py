"""Contrastive training: loss and gradient do not depend on ranks and micro-batches.

The reference is a computation on all texts of the global batch at once, each embedded by itself.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks
from helpers.objectives import (
    BERT,
    EXAMPLES,
    LENGTH,
    LLAMA,
    VOCAB,
    Example,
    example,
    model_of,
    rows_of,
)

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE
from sevenfold.engine.step import evaluate, train_step
from sevenfold.model import parallel
from sevenfold.train.validate import steps_of

CPU = torch.device("cpu")
TEMPERATURE, LEARNING_RATE, MAX_NORM = 0.2, 0.1, 1.0


def texts_of(pair: Example) -> tuple[list[int], list[int]]:
    """The query and the document of a pair."""
    query, document = (
        [token for token, is_target in zip(*pair, strict=True) if is_target == side]
        for side in (False, True)
    )
    return query, document


def joined(query: Example, document: Example) -> Example:
    """The pair of one pair's query and another pair's document."""
    ids, answer = texts_of(query)[0], texts_of(document)[1]
    return [*ids, *answer], [False] * len(ids) + [True] * len(answer)


# Some pairs share a query or a document, and are on different ranks and in different micro-batches.
PAIRS = [example(i, 3 + i % 5, 4 + 3 * i % 11) for i in range(12)]
GLOBAL_BATCH: list[list[Example]] = [
    [*PAIRS[:4]],
    [example(30, 20, 40)],
    [PAIRS[4], joined(PAIRS[0], PAIRS[5])],
    [],
    [PAIRS[6], joined(PAIRS[7], PAIRS[4]), PAIRS[8]],
    [PAIRS[0]],
    [*PAIRS[9:]],
    [example(31, 30, 30)],
]


def losses_by_hand(
    model: Any, pairs: list[Example], temperature: float
) -> tuple[torch.Tensor, list[int]]:
    """The losses of all queries, and how many negatives are as similar as their own document."""
    texts = [texts_of(pair) for pair in pairs]

    def vectors(side: int) -> torch.Tensor:
        states = [model(input_ids=torch.tensor([pair[side]])).last_hidden_state for pair in texts]
        return F.normalize(torch.cat([state.mean(1) for state in states]), dim=-1)

    similarities = vectors(0) @ vectors(1).T / temperature
    losses, ahead = [], []
    for i, (query, document) in enumerate(texts):
        own = similarities[i, i]
        negatives = [
            similarities[i, j]
            for j, (other_query, other) in enumerate(texts)
            if other_query != query and other != document
        ]
        losses.append(torch.stack([own, *negatives]).logsumexp(0) - own)
        ahead.append(sum(bool(negative >= own) for negative in negatives))
    return torch.stack(losses), ahead


def test_losses_equal_a_computation_by_hand(tree: dict[str, Any]) -> None:
    model, objective, _ = model_of(tree, "embed", BERT)
    objective.temperature = TEMPERATURE
    pairs = [pair for row in GLOBAL_BATCH for pair in row]
    batch = objective.collate(rows_of(GLOBAL_BATCH), 0)
    with torch.no_grad():
        losses, predictions = model.token_losses(batch, with_predictions=True)
        expected, ahead = losses_by_hand(model, pairs, TEMPERATURE)
    assert batch.labels.tolist() == [0, IGNORE] * len(pairs)
    assert torch.allclose(losses[::2], expected, atol=1e-5) and not losses[1::2].any()
    assert predictions[::2].tolist() == ahead and len(set(ahead)) > 1


def test_equal_embeddings_are_wrong_predictions(tree: dict[str, Any]) -> None:
    model, objective, _ = model_of(tree, "embed", BERT)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # which makes all embeddings 0
        batch = objective.collate(rows_of([EXAMPLES[:2], EXAMPLES[2:]]), 0)
        _, predictions = model.token_losses(batch, with_predictions=True)
    assert predictions[::2].tolist() == [2, 2, 2]


def trained(
    tree: dict[str, Any], config: dict[str, Any], micro_batch: int, order: list[int]
) -> dict[str, Any]:
    """Trains for two steps and validates.

    Args:
        tree: The recipe.
        config: The model's.
        micro_batch: Rows per micro-batch.
        order: The order in which the rows of GLOBAL_BATCH are distributed over the ranks.
    """
    tree = tree | {"train": tree["train"] | {"micro_batch": micro_batch}}
    model, objective, recipe = model_of(tree, "embed", config)
    objective.temperature = TEMPERATURE
    tensor = recipe.parallel.tensor
    place = parallel.DataRank.from_rank(
        torch.distributed.get_rank(), torch.distributed.get_world_size(), tensor
    )
    model = parallel.shard(model, CPU, recipe.train, recipe.parallel).train()
    optimizer = torch.optim.SGD(model.parameters())
    rows = rows_of([GLOBAL_BATCH[i] for i in order])
    max_rows = len(rows) // place.world_size
    own = rows.part(place.rank * max_rows, (place.rank + 1) * max_rows)
    batches = objective.batches(own, 0, micro_batch, max_rows, CPU)
    assert all(batch.input_ids.numel() <= micro_batch * LENGTH for batch in batches)
    steps = [
        train_step(model, batches, [optimizer], LEARNING_RATE, MAX_NORM, tensor=tensor)
        for _ in range(2)
    ]
    held_out = steps_of(rows_of(GLOBAL_BATCH), objective, recipe.train, place, CPU)
    sums = np.zeros(3)
    predictions: list[tuple[int, int]] = []
    for group in held_out:
        token_bytes = torch.zeros(VOCAB, dtype=torch.int64)
        sums += evaluate(model, group, token_bytes, predictions, tensor=tensor)
    right = torch.tensor(sum(label == prediction for label, prediction in predictions))
    torch.distributed.all_reduce(right)
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
        "targets": [step.targets for step in steps],
        "weights": {n: p.full_tensor().numpy() for n, p in model.state_dict().items()},
        "validation": sums[0] / sums[1],
        "accuracy": int(right) / sums[1],
        "micro_batches": len(batches),
    }


def trained_by_hand(tree: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What `trained` returns, computed on one rank without batches, in float64."""
    model, _, recipe = model_of(tree, "embed", config)
    model.double()
    pairs = [pair for row in GLOBAL_BATCH for pair in row]
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses, norms = [], []
    for _ in range(2):
        loss = losses_by_hand(model, pairs, TEMPERATURE)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    size = recipe.train.global_batch
    groups = [GLOBAL_BATCH[start : start + size] for start in range(0, len(GLOBAL_BATCH), size)]
    with torch.no_grad():
        validated = [
            losses_by_hand(model, [pair for row in group for pair in row], TEMPERATURE)
            for group in groups
        ]
    return {
        "losses": losses,
        "norms": norms,
        "targets": [len(pairs)] * 2,
        "weights": {n: p.numpy() for n, p in model.state_dict().items()},
        "validation": sum(float(part.sum()) for part, _ in validated) / len(pairs),
        "accuracy": sum(ahead.count(0) for _, ahead in validated) / len(pairs),
    }


def trained_often(tree: dict[str, Any], configs: list[dict[str, Any]]) -> list[list[Any]]:
    """What `trained` returns for each config, for several micro-batches and orders of the rows."""
    in_order = list(range(len(GLOBAL_BATCH)))
    kinds = [(32, in_order), (1, in_order), (2, [5, 0, 3, 7, 1, 6, 4, 2])]
    return [[trained(tree, config, *kind) for kind in kinds] for config in configs]


@pytest.fixture
def embed_tree(tree: dict[str, Any]) -> dict[str, Any]:
    tree["train"] |= {"global_batch": 4}  # validation has two groups of rows
    return tree


@pytest.mark.parametrize(
    ("world", "tensor", "configs"),
    [
        (1, 1, [BERT, LLAMA]),
        (2, 1, [BERT, LLAMA]),
        (4, 1, [BERT, LLAMA]),
        pytest.param(4, 2, [LLAMA], marks=pytest.mark.slow),
    ],
)
def test_the_negatives_are_those_of_the_global_batch_on_any_number_of_workers(
    embed_tree: dict[str, Any],
    tmp_path: Path,
    world: int,
    tensor: int,
    configs: list[dict[str, Any]],
) -> None:
    embed_tree |= {"parallel": {"tensor": tensor}, "cluster": {"num_workers": world}}
    expected = [trained_by_hand(embed_tree, config) for config in configs]
    ranks = run_ranks(world, tmp_path / "pg", trained_often, embed_tree, configs)
    for results in ranks:
        for by_hand, of_config in zip(expected, results, strict=True):
            counts = [result["micro_batches"] for result in of_config]
            assert counts[0] == 1 and min(counts[1:]) > 1
            for result in of_config:
                assert result["losses"] == pytest.approx(by_hand["losses"], abs=1e-6)
                assert result["norms"] == pytest.approx(by_hand["norms"], abs=1e-6, rel=1e-6)
                assert result["targets"] == by_hand["targets"]
                assert result["validation"] == pytest.approx(by_hand["validation"], abs=1e-6)
                assert result["accuracy"] == pytest.approx(by_hand["accuracy"])
                assert result["weights"].keys() == by_hand["weights"].keys()
                for name, weight in result["weights"].items():
                    assert np.abs(weight - by_hand["weights"][name]).max() < 1e-6, name


def embeddings_of_both_passes(tree: dict[str, Any]) -> tuple[list[np.ndarray], bool]:
    """The model's outputs in a step with dropout, and whether the gradient is that of autograd.

    Autograd replays the outputs' masks: it starts each micro-batch from the state of the random
    generators from which the first pass started.
    """
    model, objective, recipe = model_of(tree, "embed", BERT | {"hidden_dropout_prob": 0.3})
    model = parallel.shard(model, CPU, recipe.train).train()
    batches = objective.batches(rows_of(GLOBAL_BATCH), 0, 2, len(GLOBAL_BATCH), CPU)
    outputs: list[np.ndarray] = []
    states: list[torch.Tensor] = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state())),
        model.register_forward_hook(
            lambda *a: outputs.append(a[-1].last_hidden_state.detach().numpy())
        ),
    ]
    objective.backward(model, batches, 1.0, 1)
    for hook in hooks:
        hook.remove()
    gradient = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.set_requires_gradient_sync(True)

    # the first pass: all micro-batches but the first one, then the first one
    order = [*range(1, len(batches)), 0]
    rows = []
    for i, state in zip(order, states, strict=False):
        torch.set_rng_state(state)
        rows.append(objective._embed(model, batches[i]))
    texts = torch.zeros(2 * len(batches[0].text_keys), rows[0].shape[1])
    indices = torch.cat([batches[i].text_index for i in order])
    pairs = texts.index_put((indices,), torch.cat(rows)).view(-1, 2, rows[0].shape[1])
    logits = pairs[:, 0] @ pairs[:, 1].T / objective.temperature
    keys = batches[0].text_keys
    same = (keys[:, None] == keys[None]).any(-1) & ~torch.eye(len(keys), dtype=torch.bool)
    own = torch.arange(len(keys))
    F.cross_entropy(logits.masked_fill(same, -torch.inf), own, reduction="sum").backward()
    expected = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    equal = all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(gradient, expected, strict=True)
    )
    return outputs, equal


def test_both_passes_drop_the_same(embed_tree: dict[str, Any], tmp_path: Path) -> None:
    ((outputs, equal),) = run_ranks(1, tmp_path / "pg", embeddings_of_both_passes, embed_tree)
    count = len(outputs) // 2 + 1  # the first micro-batch has only one pass
    assert count > 2 and equal
    for first, second in zip(outputs[: count - 1], outputs[count:], strict=True):
        assert np.array_equal(first, second)


def outcome_without_pairs(tree: dict[str, Any]) -> tuple[float, bool]:
    """The sum of the losses of rows of padding, and whether the gradient is 0."""
    model, objective, recipe = model_of(tree, "embed", BERT)
    model = parallel.shard(model, CPU, recipe.train).train()
    batches = objective.batches(Rows.empty(2, LENGTH), 0, 2, 2, CPU)
    loss = objective.backward(model, batches, 1.0, 1)
    gradients = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    return float(loss), bool(gradients) and not any(bool(g.any()) for g in gradients)


def test_a_step_without_pairs_has_no_gradient(embed_tree: dict[str, Any], tmp_path: Path) -> None:
    outcomes = run_ranks(2, tmp_path / "pg", outcome_without_pairs, embed_tree)
    assert outcomes == [(0.0, True)] * 2


def test_similarities_are_computed_in_parts(
    embed_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, objective, _ = model_of(embed_tree, "embed", BERT)
    batch = objective.collate(rows_of(GLOBAL_BATCH), 0)
    with torch.no_grad():
        whole = model.token_losses(batch)
        monkeypatch.setattr("sevenfold.engine.objectives.contrastive.MAX_SIMILARITIES", 40)
        assert torch.allclose(model.token_losses(batch), whole, atol=1e-6)
