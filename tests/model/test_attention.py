"""Attention in chunks equals the sdpa attention of transformers, forward and backward."""

from typing import Any

import pytest
import torch

from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives import Causal, Masked, Objective, SpecialTokens, attach_losses
from sevenfold.model import attention, build
from sevenfold.recipe import Recipe

LENGTH = 300  # two chunks of queries and part of a third
SPECIAL_TOKENS = SpecialTokens(
    512, special=(0, 1, 2, 3), mask=3, sentinels=(), pad=2, end=1, start=2
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
WINDOWED = LLAMA | {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 40,
    "max_window_layers": 1,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": LENGTH,
}


def batch(lengths: list[list[int]]) -> Batch:
    """Rows of documents of these lengths; the rest of a row is padding."""
    ids = torch.randint(4, 512, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(0))
    position_ids, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    starts = []
    for i, row in enumerate(lengths):
        start = 0
        for length in [*row, LENGTH - sum(row)]:
            if length:
                position_ids[i, start : start + length] = torch.arange(length)
                starts.append(i * LENGTH + start)
            start += length
        labels[i, : sum(row)] = ids[i, : sum(row)]
    return Batch(
        ids, position_ids, labels, torch.tensor([*starts, len(lengths) * LENGTH], dtype=torch.int32)
    )


@pytest.mark.parametrize(
    ("objective", "kind", "config"),
    [("causal", Causal, LLAMA), ("causal", Causal, WINDOWED), ("masked", Masked, BERT)],
    ids=["llama", "sliding window", "bert"],
)
@pytest.mark.parametrize(
    "lengths", [[[LENGTH], [10, 200, 60]], [[50] * 6, [130, 100, 70]], [[1, 250], [255]]]
)
def test_attention_in_chunks_equals_sdpa(
    tree: dict[str, Any],
    objective: str,
    kind: type[Objective],
    config: dict[str, Any],
    lengths: list[list[int]],
) -> None:
    tree["data"]["sequence_length"] = LENGTH
    tree["objective"], tree["model"] = objective, {"config": config}
    recipe = Recipe.model_validate(tree)
    rows, results = batch(lengths), []
    assert (
        build.choose_attention(recipe, torch.device("cpu"), build.config_of(recipe, 512))
        == attention.NAME
    )
    for name in ("sdpa", attention.NAME):
        model = build.build(recipe, build.config_of(recipe, 512), weights=True, attention=name)
        assert model.config._attn_implementation == name
        losses = attach_losses(model, kind(SPECIAL_TOKENS, 0, 0.3, 3.0))(rows)
        losses.sum().backward()
        results.append(
            (losses.detach(), [p.grad for p in model.parameters() if p.grad is not None])
        )
    (sdpa, grads), (chunks, chunked_grads) = results
    assert torch.allclose(chunks, sdpa, rtol=1e-5, atol=1e-5)
    # some gradients are only rounding errors: a bias on all keys changes nothing
    largest = max(grad.abs().max() for grad in grads)
    assert all(
        (grad - expected).abs().max() <= 1e-6 * largest
        for grad, expected in zip(chunked_grads, grads, strict=True)
    )


def test_keys_that_no_query_attends_to_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def sdpa(
        _: Any, query: torch.Tensor, key: torch.Tensor, *__: Any, **___: Any
    ) -> tuple[torch.Tensor, None]:
        shapes.append((query.shape[2], key.shape[2]))
        return query.transpose(1, 2), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa)
    documents = torch.arange(LENGTH) // 100  # documents of 100 tokens
    mask = (documents[:, None] == documents[None]) & torch.ones(
        LENGTH, LENGTH, dtype=torch.bool
    ).tril()
    query = torch.zeros(1, 2, LENGTH, 8)
    attention.in_chunks(torch.nn.Module(), query, query, query, mask[None, None])
    assert shapes == [(128, 128), (128, 156), (44, 100)]
