"""Collators of the pretraining objectives.

What is masked is a function of seed, step and row; documents of a row do not see each other in any
family.
"""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.objectives import BERT, LENGTH, ROWS, SPECIAL_TOKENS, T5, VOCAB, document, packed

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives import Causal, Denoise, Masked, Objective, attach_losses, masking
from sevenfold.model import build
from sevenfold.recipe import Recipe


def test_masking_has_the_rates_of_bert() -> None:
    rng, ids = np.random.default_rng(0), np.arange(100_000) % 400 + 30
    hideable = np.arange(len(ids)) % 10 > 0
    inputs, is_masked = masking.mask_tokens(rng, ids, hideable, 0.15, 3, VOCAB)
    assert not is_masked[~hideable].any() and (inputs == ids)[~is_masked].all()
    assert abs(is_masked[hideable].mean() - 0.15) < 0.005
    assert (
        abs((inputs[is_masked] == 3).mean() - 0.8) < 0.02
        and abs((inputs[is_masked] == ids[is_masked]).mean() - 0.1) < 0.02
    )


def test_masking_always_leaves_something_to_predict() -> None:
    ids = np.arange(30, 36)
    maskable = np.array([False, True, True, True, True, False])
    counts = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        _, is_masked = masking.mask_tokens(rng, ids, maskable, 0.15, 3, VOCAB)
        assert not is_masked[~maskable].any()
        counts.append(int(is_masked.sum()))
        # the draws of the others are the same
        chosen = maskable & (np.random.default_rng(seed).random(6) < 0.15)
        assert not chosen.any() or np.array_equal(chosen, is_masked)
    assert min(counts) == 1 and max(counts) > 1
    rng = np.random.default_rng(0)
    assert not masking.mask_tokens(rng, ids, np.zeros(6, bool), 0.15, 3, VOCAB)[1].any()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 20, 500])
def test_spans_mask_the_expected_number_of_tokens(length: int) -> None:
    noise = masking.select_spans(np.random.default_rng(length), length, 0.15, 3.0, 100)
    assert len(noise) == length and noise.sum() == (
        0 if length < 2 else min(max(round(0.15 * length), 1), length - 1)
    )
    if length >= 2:
        assert not noise[0] and noise[-1]
        first = noise & ~np.concatenate([[False], noise[:-1]])
        assert first.sum() == max(1, round(noise.sum() / 3))
    # few sentinels: the spans are longer
    assert masking.select_spans(np.random.default_rng(1), 1000, 0.5, 1.0, 7).sum() == 500


def test_inputs_and_targets_of_denoising_restore_the_text() -> None:
    ids = np.arange(100, 140)
    noise = masking.select_spans(np.random.default_rng(3), 40, 0.3, 3.0, 20)
    inputs, target = masking.replace_spans(ids, noise, np.arange(4, 24), 1)
    assert target[-1] == 1 and set(inputs) & set(range(4, 24)) == set(target) & set(range(4, 24))
    spans = {}
    for token in target[:-1]:
        if token < 24:
            spans[token] = span = []
        else:
            span.append(token)
    assert [
        restored for token in inputs for restored in (spans[token] if token < 24 else [token])
    ] == ids.tolist()


@pytest.mark.parametrize("kind", [Masked, Denoise])
def test_masking_depends_only_on_seed_step_and_row(kind: type[Objective]) -> None:
    def labels(seed: int, step: int, rows: Rows) -> list[list[int]]:
        all_labels = kind(SPECIAL_TOKENS, seed, 0.3, 3.0).collate(rows, step).labels
        return [[label for label in row if label != IGNORE] for row in all_labels.tolist()]

    expected = labels(1, 5, ROWS)
    assert sum(map(len, expected)) > 20
    assert labels(1, 5, ROWS.part(2, 3)) + labels(1, 5, ROWS.part(0, 2)) == [
        expected[2],
        expected[0],
        expected[1],
    ]
    assert labels(1, 6, ROWS) != expected and labels(2, 5, ROWS) != expected


def test_the_decoder_reads_the_shifted_targets() -> None:
    batch = Denoise(SPECIAL_TOKENS, 1, 0.3, 3.0).collate(ROWS, 0)
    assert batch.decoder is not None
    labels, inputs, documents = (
        tensor.numpy()
        for tensor in (batch.labels, batch.decoder.input_ids, batch.decoder.documents)
    )
    for row, column in zip(*np.nonzero(labels != IGNORE), strict=True):
        first = column == 0 or documents[row, column - 1] != documents[row, column]
        assert inputs[row, column] == (SPECIAL_TOKENS.start if first else labels[row, column - 1])
    assert (documents == -1).sum() == (labels == IGNORE).sum()
    # a document of two special tokens has nothing to mask
    assert batch.input_ids[2, 5:7].tolist() == [0, 1]


def model_of(tree: dict[str, Any], objective: str, config: dict[str, Any]) -> Any:
    """Builds a model for this objective."""
    tree["model"], tree["objective"] = {"config": config}, objective
    recipe = Recipe.model_validate(tree)
    return build.build(recipe, build.config_of(recipe, VOCAB), weights=True).eval()


def with_first_document(batch: Batch, token: int) -> Batch:
    """The batch with another first document in row 0."""
    ids = batch.input_ids.clone()
    ids[0, batch.documents[0] == 0] = token
    return Batch(ids, batch.position_ids, batch.labels, batch.cu_seqlens, batch.decoder)


@pytest.mark.parametrize(
    ("objective", "kind", "config"), [("masked", Masked, BERT), ("denoise", Denoise, T5)]
)
def test_documents_do_not_see_each_other(
    tree: dict[str, Any], objective: str, kind: type[Objective], config: dict[str, Any]
) -> None:
    model, built_objective = model_of(tree, objective, config), kind(SPECIAL_TOKENS, 0, 0.3, 3.0)
    losses = attach_losses(model, built_objective)
    batch = built_objective.collate(ROWS, 0)
    documents = batch.documents if batch.decoder is None else batch.decoder.documents
    with torch.no_grad():
        before, after = losses(batch)[0], losses(with_first_document(batch, 77))[0]
    has_label = batch.labels[0] != IGNORE
    first, second = has_label & (documents[0] == 0), has_label & (documents[0] == 1)
    assert first.any() and second.any()
    assert (
        torch.equal(before[second], after[second])
        and (before[first] - after[first]).abs().max() > 1e-3
    )
    single_row = packed([[document(2, 30)]])
    # the same document with the same masking, in a row of its own
    with torch.no_grad():
        inputs = torch.zeros((1, LENGTH), dtype=torch.long)
        in_document = batch.documents[0] == 1
        inputs[0, : in_document.sum()] = batch.input_ids[0, in_document]
        single_batch = built_objective.collate(single_row, 0)
        labels, decoder = torch.full_like(batch.labels[:1], IGNORE), None
        if batch.decoder is None:
            labels[0, : in_document.sum()] = batch.labels[0, in_document]
            position_ids = single_batch.position_ids
        else:
            in_target = batch.decoder.documents[0] == 1
            labels[0, : in_target.sum()] = batch.labels[0, in_target]
            decoder_inputs = torch.full_like(labels, SPECIAL_TOKENS.pad)
            decoder_inputs[0, : in_target.sum()] = batch.decoder.input_ids[0, in_target]
            decoder_documents = torch.full_like(labels, -1)
            decoder_documents[0, : in_target.sum()] = 0
            decoder = type(batch.decoder)(decoder_inputs, decoder_documents)
            position_ids = torch.cat(
                [
                    torch.arange(int(in_document.sum())),
                    torch.arange(LENGTH - int(in_document.sum())),
                ]
            )[None]
        losses_alone = losses(
            Batch(inputs, position_ids, labels, single_batch.cu_seqlens, decoder)
        )[0]
    assert torch.allclose(losses_alone[labels[0] != IGNORE], before[second], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "kind", "config"),
    [("causal", Causal, None), ("masked", Masked, BERT), ("denoise", Denoise, T5)],
)
def test_logits_in_chunks_are_the_same(
    tree: dict[str, Any], objective: str, kind: type[Objective], config: Any
) -> None:
    model = model_of(tree, objective, config or tree["model"]["config"])
    built_objective = kind(SPECIAL_TOKENS, 0, 0.3, 3.0)
    batch, results = built_objective.collate(ROWS, 0), []
    for chunk, rows_kept in ((None, 2**22), (None, 9), (10, 1), (7, 1), (10_000, 1)):
        losses = attach_losses(model, built_objective, chunk, cpu_logits=rows_kept * VOCAB)(batch)
        losses.sum().backward()
        results.append(
            (losses.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
        model.zero_grad()
        assert (
            model(
                **dict.fromkeys(
                    ("input_ids", "decoder_input_ids")[: 1 + (objective == "denoise")],
                    batch.input_ids,
                )
            ).logits.shape[-1]
            == VOCAB
        )
    for losses, grads in results[1:]:
        assert torch.allclose(losses, results[0][0], atol=1e-5)
        for grad, expected in zip(grads, results[0][1], strict=True):
            assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("chunk", [None, 10])
def test_z_loss_only_changes_the_gradient(tree: dict[str, Any], chunk: int | None) -> None:
    model = model_of(tree, "causal", tree["model"]["config"])
    batch = Causal(SPECIAL_TOKENS, 0, 0.3, 3.0).collate(ROWS, 0)
    plain = attach_losses(model, Causal(SPECIAL_TOKENS, 0, 0.3, 3.0))(batch)
    logits = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits
    (plain + 0.1 * logits.logsumexp(-1).square() * (batch.labels != IGNORE)).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = attach_losses(model, Causal(SPECIAL_TOKENS, 0, 0.3, 3.0), chunk, 0.1)(batch)
    losses.sum().backward()
    assert torch.allclose(losses, plain, atol=1e-5)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6
