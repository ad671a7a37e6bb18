"""Collators: what is hidden is a function of seed, step and row; documents of a row do not see each other in any family."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from sevenfold.data.rows import Rows
from sevenfold.engine import corrupt, objectives
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives import Causal, Denoise, Masked, Words, attach
from sevenfold.model import build
from sevenfold.recipe import Recipe

VOCAB, LENGTH = 512, 64
WORDS = Words(VOCAB, special=(0, 1, 2, 3, *range(4, 24)), mask=3, sentinels=tuple(range(4, 24)), pad=2, end=1, start=2)
BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "initializer_range": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def packed(documents: list[list[list[int]]]) -> Rows:
    """Rows of documents, padded."""
    tokens = np.zeros((len(documents), LENGTH), np.uint16)
    starts, used = [], []
    for i, row in enumerate(documents):
        flat = [t for d in row for t in d]
        tokens[i, : len(flat)] = flat
        begins = [0, *itertools.accumulate(map(len, row))]
        starts += begins if begins[-1] < LENGTH else begins[:-1]
        used.append(len(flat))
    return Rows(tokens, np.array(starts, np.int32), np.array(used, np.int32))


def document(seed: int, length: int) -> list[int]:
    body = np.random.default_rng(seed).integers(30, VOCAB, length - 2).tolist()
    return [0, *body, 1]


ROWS = packed([[document(1, 20), document(2, 30)], [document(3, 64)], [document(4, 5), document(5, 2), document(6, 40)]])


def test_masking_hides_what_bert_hides() -> None:
    rng, ids = np.random.default_rng(0), np.arange(100_000) % 400 + 30
    hideable = np.arange(len(ids)) % 10 > 0
    read, asked = corrupt.masked(rng, ids, hideable, 0.15, 3, VOCAB)
    assert not asked[~hideable].any() and (read == ids)[~asked].all()
    assert abs(asked[hideable].mean() - 0.15) < 0.005
    assert abs((read[asked] == 3).mean() - 0.8) < 0.02 and abs((read[asked] == ids[asked]).mean() - 0.1) < 0.02


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 20, 500])
def test_spans(length: int) -> None:
    noise = corrupt.spans(np.random.default_rng(length), length, 0.15, 3.0, 100)
    assert len(noise) == length and noise.sum() == (0 if length < 2 else min(max(round(0.15 * length), 1), length - 1))
    if length >= 2:
        assert not noise[0] and noise[-1]
        first = noise & ~np.concatenate([[False], noise[:-1]])
        assert first.sum() == max(1, round(noise.sum() / 3))
    assert corrupt.spans(np.random.default_rng(1), 1000, 0.5, 1.0, 7).sum() == 500  # few sentinels: longer spans


def test_denoising_loses_nothing() -> None:
    ids = np.arange(100, 140)
    noise = corrupt.spans(np.random.default_rng(3), 40, 0.3, 3.0, 20)
    read, target = corrupt.denoise(ids, noise, np.arange(4, 24), 1)
    assert target[-1] == 1 and set(read) & set(range(4, 24)) == set(target) & set(range(4, 24))
    spans = {}
    for t in target[:-1]:
        if t < 24:
            spans[t] = now = []
        else:
            now.append(t)
    assert [x for t in read for x in (spans[t] if t < 24 else [t])] == ids.tolist()


@pytest.mark.parametrize("kind", [Masked, Denoise])
def test_what_is_hidden_hangs_on_seed_step_and_row_alone(kind: type[Causal]) -> None:
    def labels(seed: int, step: int, rows: Rows) -> list[list[int]]:
        found = kind(WORDS, seed, 0.3, 3.0).collate(rows, step).labels
        return [[t for t in row if t != IGNORE] for row in found.tolist()]

    whole = labels(1, 5, ROWS)
    assert sum(map(len, whole)) > 20
    assert labels(1, 5, ROWS.part(2, 3)) + labels(1, 5, ROWS.part(0, 2)) == [whole[2], whole[0], whole[1]]
    assert labels(1, 6, ROWS) != whole and labels(2, 5, ROWS) != whole


def test_the_decoder_is_told_what_came_before() -> None:
    batch = Denoise(WORDS, 1, 0.3, 3.0).collate(ROWS, 0)
    assert batch.decoder is not None
    wanted, given, owner = (t.numpy() for t in (batch.labels, batch.decoder.input_ids, batch.decoder.documents))
    for i, j in zip(*np.nonzero(wanted != IGNORE), strict=True):
        first = j == 0 or owner[i, j - 1] != owner[i, j]
        assert given[i, j] == (WORDS.start if first else wanted[i, j - 1])
    assert (owner == -1).sum() == (wanted == IGNORE).sum()
    assert batch.input_ids[2, 5:7].tolist() == [0, 1]  # nothing to take out of a document of two special tokens


def model_of(tree: dict[str, Any], objective: str, config: dict[str, Any]) -> Any:
    tree["model"], tree["objective"] = {"config": config}, objective
    recipe = Recipe.model_validate(tree)
    return build.build(recipe, build.config_of(recipe, VOCAB), weights=True).eval()


def changed(batch: Batch, to: int) -> Batch:
    """With another first document in row 0."""
    ids = batch.input_ids.clone()
    ids[0, batch.documents[0] == 0] = to
    return Batch(ids, batch.position_ids, batch.labels, batch.cu_seqlens, batch.decoder)


@pytest.mark.parametrize(("objective", "kind", "config"), [("masked", Masked, BERT), ("denoise", Denoise, T5)])
def test_documents_do_not_see_each_other(
    tree: dict[str, Any], objective: str, kind: type[Causal], config: dict[str, Any]
) -> None:
    model, made = model_of(tree, objective, config), kind(WORDS, 0, 0.3, 3.0)
    losses = attach(model, made)
    batch = made.collate(ROWS, 0)
    owner = batch.documents if batch.decoder is None else batch.decoder.documents
    with torch.no_grad():
        before, after = losses(batch)[0], losses(changed(batch, 77))[0]
    asked = batch.labels[0] != IGNORE
    first, second = asked & (owner[0] == 0), asked & (owner[0] == 1)
    assert first.any() and second.any()
    assert torch.equal(before[second], after[second]) and (before[first] - after[first]).abs().max() > 1e-3
    alone = packed([[document(2, 30)]])
    with torch.no_grad():  # as the document alone would be: hidden likewise, in a row of its own
        read = torch.zeros((1, LENGTH), dtype=torch.long)
        mine = batch.documents[0] == 1
        read[0, : mine.sum()] = batch.input_ids[0, mine]
        shifted = made.collate(alone, 0)
        wanted, decoder = torch.full_like(batch.labels[:1], IGNORE), None
        if batch.decoder is None:
            wanted[0, : mine.sum()] = batch.labels[0, mine]
            place = shifted.position_ids
        else:
            theirs = batch.decoder.documents[0] == 1
            wanted[0, : theirs.sum()] = batch.labels[0, theirs]
            inputs, number = torch.full_like(wanted, WORDS.pad), torch.full_like(wanted, -1)
            inputs[0, : theirs.sum()], number[0, : theirs.sum()] = batch.decoder.input_ids[0, theirs], 0
            decoder = type(batch.decoder)(inputs, number)
            place = torch.cat([torch.arange(int(mine.sum())), torch.arange(LENGTH - int(mine.sum()))])[None]
        by_itself = losses(Batch(read, place, wanted, shifted.cu_seqlens, decoder))[0]
    assert torch.allclose(by_itself[wanted[0] != IGNORE], before[second], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "kind", "config"), [("causal", Causal, None), ("masked", Masked, BERT), ("denoise", Denoise, T5)]
)
def test_logits_in_chunks_are_the_same(
    tree: dict[str, Any], objective: str, kind: type[Causal], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = model_of(tree, objective, config or tree["model"]["config"]), kind(WORDS, 0, 0.3, 3.0)
    batch, found = made.collate(ROWS, 0), []
    for chunk, kept in ((None, 2**22), (None, 9), (10, 1), (7, 1), (10_000, 1)):
        monkeypatch.setattr(objectives, "CPU_LOGITS", kept * VOCAB)
        losses = attach(model, made, chunk)(batch)
        losses.sum().backward()
        found.append((losses.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
        assert (
            model(
                **dict.fromkeys(("input_ids", "decoder_input_ids")[: 1 + (objective == "denoise")], batch.input_ids)
            ).logits.shape[-1]
            == VOCAB
        )
    for losses, grads in found[1:]:
        assert torch.allclose(losses, found[0][0], atol=1e-5)
        for a, b in zip(grads, found[0][1], strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6


@pytest.mark.parametrize("chunk", [None, 10])
def test_z_loss_is_in_the_gradient_alone(tree: dict[str, Any], chunk: int | None) -> None:
    model, batch = model_of(tree, "causal", tree["model"]["config"]), Causal(WORDS, 0, 0.3, 3.0).collate(ROWS, 0)
    plain = attach(model, Causal(WORDS, 0, 0.3, 3.0))(batch)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    (plain + 0.1 * logits.logsumexp(-1).square() * (batch.labels != IGNORE)).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = attach(model, Causal(WORDS, 0, 0.3, 3.0), chunk, 0.1)(batch)
    losses.sum().backward()
    assert torch.allclose(losses, plain, atol=1e-5)
    for p, g in zip(model.parameters(), wanted, strict=True):
        assert (p.grad - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6
