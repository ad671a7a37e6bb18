"""Objectives of fine-tuning.

Packed examples give the same losses as unpacked ones and as transformers' own; DPO has its
published values; LoRA trains alike on one and on two ranks.
"""

from dataclasses import replace
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
    SPECIAL_TOKENS,
    T5,
    VOCAB,
    Example,
    document,
    example,
    model_of,
    rows_of,
)

from sevenfold.data.rows import Rows
from sevenfold.engine import optim
from sevenfold.engine.batch import IGNORE, micro_batches
from sevenfold.engine.objectives import (
    OBJECTIVES,
    Causal,
    Preference,
    attach_losses,
    preference_margins,
)
from sevenfold.engine.step import evaluate, train_step
from sevenfold.model import build, parallel
from sevenfold.recipe import Adapter, Recipe


def preference(seed: int, prompt_length: int, chosen_length: int, rejected_length: int) -> Example:
    """A DPO pair: the prompt and a chosen reply, the prompt again and a rejected reply."""
    prompt = document(seed, prompt_length)
    chosen, rejected = document(seed + 1, chosen_length), document(seed + 2, rejected_length)
    in_chosen = [False] * prompt_length + [True] * chosen_length
    in_rejected = [False] * prompt_length + [True] * rejected_length
    return [*prompt, *chosen, *prompt, *rejected], in_chosen + in_rejected


PACKED = rows_of([EXAMPLES[:2], EXAMPLES[2:]])


def test_dpo_has_its_published_values() -> None:
    policy = torch.tensor([[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]])
    reference = torch.tensor([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
    losses = -F.logsigmoid(preference_margins(policy, reference, 0.1))
    assert losses.tolist() == pytest.approx([0.693147, 0.313262, 0.126928], abs=1e-6)


def test_packed_completions_have_the_losses_of_unpacked_ones(tree: dict[str, Any]) -> None:
    model, objective, _ = model_of(tree, "sft", LLAMA)
    with torch.no_grad():
        packed = model.token_losses(objective.collate(PACKED, 0))
        unpacked = [
            model.token_losses(objective.collate(rows_of([[one_example]]), 0))
            for one_example in EXAMPLES
        ]
    for row, start, alone, (ids, targets) in zip(
        (0, 0, 1), (0, 21, 0), unpacked, EXAMPLES, strict=True
    ):
        part = packed[row, start : start + len(ids)]
        assert torch.allclose(part, alone[0, : len(ids)], atol=1e-5) and (part > 0).sum() == sum(
            targets
        )


def test_seq2seq_losses_equal_those_of_transformers(tree: dict[str, Any]) -> None:
    model, objective, _ = model_of(tree, "seq2seq", T5)
    with torch.no_grad():
        batch = objective.collate(PACKED, 0)
        losses = model.token_losses(batch)
        for index, (ids, targets) in enumerate(EXAMPLES):
            source = torch.tensor(
                [token for token, is_target in zip(ids, targets, strict=True) if not is_target]
            )[None]
            target = torch.tensor(
                [token for token, is_target in zip(ids, targets, strict=True) if is_target]
            )[None]
            decoder_ids = torch.cat([torch.tensor([[SPECIAL_TOKENS.start]]), target[:, :-1]], 1)
            expected = model(input_ids=source, decoder_input_ids=decoder_ids, labels=target).loss
            assert batch.decoder is not None
            losses_of_document = losses[int(index == 2)][
                batch.decoder.documents[int(index == 2)] == index % 2
            ]
            assert torch.allclose(losses_of_document.mean(), expected, atol=1e-5)


def test_classification_equals_transformers(tree: dict[str, Any]) -> None:
    for config in (BERT, LLAMA):
        changes = {"data": tree["data"] | {"classes": ["a", "b", "c"]}}
        model, objective, _ = model_of(
            tree, "classify", config | {"pad_token_id": SPECIAL_TOKENS.pad}, **changes
        )
        texts = [
            ([*document(i, length), i % 3], [False] * length + [True])
            for i, length in ((1, 9), (2, 21), (3, 33))
        ]
        batch = objective.collate(rows_of([texts[:2], texts[2:]]), 0)
        with torch.no_grad():
            losses, predictions = model.token_losses(batch, with_predictions=True)
            for i, (ids, _) in enumerate(texts):
                logits = model(input_ids=torch.tensor(ids[:-1])[None]).logits[0]
                assert losses[i] == pytest.approx(
                    float(F.cross_entropy(logits, torch.tensor(ids[-1]))), abs=1e-5
                )
                assert int(predictions[i]) == int(logits.argmax())
        assert model.config.num_labels == 3 and model.config.id2label == {0: "a", 1: "b", 2: "c"}
        empty = objective.collate(Rows.empty(2, LENGTH), 0)
        assert (
            empty.labels.tolist() == [IGNORE]
            and float(model.token_losses(empty).detach().sum()) == 0
        )


@pytest.mark.parametrize("adapter", [True, False])
def test_dpo_losses_equal_a_computation_by_hand(tree: dict[str, Any], adapter: bool) -> None:
    model, objective, recipe = model_of(tree, "dpo", LLAMA)
    assert isinstance(objective, Preference)
    pairs = [preference(10, 8, 6, 9), preference(20, 5, 10, 3), preference(30, 14, 7, 7)]
    batch = objective.collate(rows_of([pairs[:2], pairs[2:]]), 0)
    if adapter:
        build.with_adapter(model, recipe.model_copy(update={"adapter": Adapter(rank=4)}))
    else:
        reference, _, _ = model_of(tree, "sft", LLAMA)
        attach_losses(reference, Causal(SPECIAL_TOKENS, 0, 0.15, 3.0))
        objective.reference = reference
    losses = model.token_losses(batch)
    # the policy still equals the reference
    assert losses.tolist() == pytest.approx([np.log(2)] * 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))

    def likelihood(scored: Any, ids: list[int], start: int) -> float:
        with torch.no_grad():
            log_probabilities = scored(input_ids=torch.tensor(ids)[None]).logits[0].log_softmax(-1)
        return float(
            log_probabilities[
                torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])
            ].sum()
        )

    reference_model, _, _ = model_of(tree, "sft", LLAMA)
    for loss, (ids, is_target) in zip(model.token_losses(batch).tolist(), pairs, strict=True):
        prompt_length = is_target.index(True)
        second_start = is_target.index(False, prompt_length)
        chosen, rejected = ids[:second_start], ids[second_start:]
        log_ratios = [
            likelihood(model, ids_of_reply, prompt_length)
            - likelihood(reference_model, ids_of_reply, prompt_length)
            for ids_of_reply in (chosen, rejected)
        ]
        assert loss == pytest.approx(
            float(-F.logsigmoid(torch.tensor(0.1 * (log_ratios[0] - log_ratios[1])))), abs=2e-4
        )


def lora_losses(tree: dict[str, Any], objective: str) -> list[float]:
    """The losses of ten steps, and the validation loss at the end."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    recipe = Recipe.model_validate(tree)
    model = build.build(recipe, build.config_of(recipe, VOCAB), weights=rank == 0)
    build.with_adapter(
        model, recipe.model_copy(update={"adapter": Adapter(rank=4, dora=objective == "sft")})
    )
    built_objective = OBJECTIVES[objective](SPECIAL_TOKENS, 0, 0.15, 3.0)
    attach_losses(model, built_objective)
    model = parallel.shard(model, torch.device("cpu"), recipe.train)
    optimizers, losses = optim.build(model, recipe.optimizer), []
    batches = []
    for step in range(10):
        seeds = range(8 * step % 24, 8 * step % 24 + 8)
        kinds = {"sft": lambda s: example(s, 10, 20), "dpo": lambda s: preference(s, 8, 12, 9)}
        rows = rows_of([[kinds[objective](seed)] for seed in seeds]).part(
            rank * 8 // world, (rank + 1) * 8 // world
        )
        batches = micro_batches(
            rows,
            2,
            4 // world,
            lambda rows_of_batch: built_objective.collate(rows_of_batch, 0),
            torch.device("cpu"),
        )
        losses.append(train_step(model, batches, optimizers, 2e-2, 1.0).loss)
    judgements: list[tuple[int, int]] | None = [] if built_objective.has_predictions else None
    nats, targets, _ = evaluate(model, batches, torch.zeros(VOCAB, dtype=torch.long), judgements)
    assert judgements is None or len(judgements) == 8 // world
    return [*losses, nats / targets]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_lora_is_the_same_on_one_and_two_workers(
    tree: dict[str, Any], tmp_path: Path, objective: str
) -> None:
    tree["model"] = {"config": LLAMA}
    (single,) = run_ranks(1, tmp_path / "one", lora_losses, tree, objective)
    for losses in run_ranks(2, tmp_path / "two", lora_losses, tree, objective):
        # the rounding of ten steps depends on the processor
        assert losses == pytest.approx(single, rel=1e-5)
    assert single[-1] < single[0] - 0.05


def test_moving_a_batch_moves_all_its_tensors(tree: dict[str, Any]) -> None:
    _, objective, _ = model_of(tree, "dpo", LLAMA)
    batch = objective.collate(rows_of([[preference(10, 8, 6, 9)]]), 0)
    moved = batch.to(torch.device("cpu"))
    assert moved.segments is not None and torch.equal(moved.segments, batch.segments)  # type: ignore[arg-type]
    assert replace(moved, decoder=None).targets is not None and moved.attention_mask is None
