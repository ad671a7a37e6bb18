"""Objectives of fine-tuning beside completions: pairs of texts, answers preferred to others, classes, search."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch, to_batch
from sevenfold.engine.objectives import Causal, Denoise, Masked, Scoring, Words, documents
from sevenfold.recipe import Recipe


class Seq2Seq(Denoise):
    """Source to target: the encoder reads the one, the decoder says the other."""

    def _sides(self, rows: Rows, step: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        return [[(ids[~wanted], ids[wanted]) for ids, wanted in row] for row in documents(rows)]


class Preference(Causal):
    """DPO (arXiv 2305.18290): the answer that was chosen is to gain on the one that was rejected, measured from where the model
    began. A label is a pair's: 0.

    Attributes:
        reference: the model at its beginning, frozen and laid out as the model; None: the model without its adapter.
        beta: see the recipe's `preference`.
    """

    judges = True
    reference: Any = None
    beta = 0.1

    def collate(self, rows: Rows, step: int) -> Batch:
        halves: list[int] = []  # where answers begin in the rows laid end to end
        segments = np.full(rows.tokens.shape, -1, np.int64)
        count = 0
        for i, row in enumerate(documents(rows)):
            at = 0
            for ids, wanted in row:
                middle = int(np.flatnonzero(wanted[:-1] & ~wanted[1:])[0]) + 1  # the first answer's end
                segments[i, at : at + middle] = 2 * count
                segments[i, at + middle : at + len(ids)] = 2 * count + 1
                halves.append(i * rows.tokens.shape[1] + at + middle)
                at += len(ids)
                count += 1
        edges = np.union1d(rows.edges, halves).astype(np.int64)
        apart = Rows(rows.tokens, (edges[:-1] % rows.tokens.shape[1]).astype(np.int32), rows.used, rows.targets)
        plain = to_batch(apart)
        pairs = torch.full((max(1, count),), 0 if count else IGNORE)
        return replace(plain, labels=pairs, segments=torch.from_numpy(segments), targets=plain.labels)

    def losses(self, model: Any, batch: Batch, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert batch.targets is not None
        policy = self._likelihoods(scoring.per_token(model, batch, batch.targets), batch)
        with torch.no_grad():
            if self.reference is not None:
                before = self.reference.token_losses(replace(batch, labels=batch.targets))
            else:
                with _as_it_began(model):
                    before = scoring.per_token(model, batch, batch.targets)
        margins = preference_margins(policy, self._likelihoods(before, batch), self.beta)
        return -F.logsigmoid(margins) * (batch.labels != IGNORE), (margins <= 0).long()

    def _likelihoods(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """log p of the answers: [pairs, 2], chosen and rejected."""
        assert batch.segments is not None
        out = losses.new_zeros(2 * len(batch.labels))
        mine = batch.segments.flatten()
        return -out.index_add(0, mine.clamp(min=0), losses.flatten() * (mine >= 0)).view(-1, 2)


def preference_margins(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """What DPO's loss is -log sigmoid of (arXiv 2305.18290, equation 7): [pairs].

    Args:
        policy, reference: log p of the chosen and the rejected answer: [pairs, 2].
    """
    gains = policy - reference
    return beta * (gains[:, 0] - gains[:, 1])


@contextlib.contextmanager
def _as_it_began(model: Any) -> Iterator[None]:
    """Without its adapter, and without dropout."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    training = model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True  # not enable_adapters(), which also unfreezes and freezes: FSDP keeps account of that
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)


class Classify(Causal):
    """One class a document, by the head that transformers has for it. A row of a batch is a document."""

    judges = True

    def collate(self, rows: Rows, step: int) -> Batch:
        found = [ids for row in documents(rows) for ids, _ in row]
        batch = padded([ids[:-1] for ids in found], self.words.pad)
        wanted = torch.tensor([int(ids[-1]) for ids in found] or [IGNORE])
        return replace(batch, labels=wanted)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        made: torch.Tensor = model.forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return made

    def losses(self, model: Any, batch: Batch, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.logits(model, batch)
        return scoring.cross_entropy(logits, batch.labels), logits.argmax(-1)


class Embed(Causal):
    """Contrastive: among the documents of its micro-batch a query is to find its own (InfoNCE, arXiv 1807.03748; by cosine over
    mean-pooled states, as arXiv 1908.10084). What has the same tokens does not count against itself: a document that is
    there twice, another document of the same query. A label is the
    number of a query's document in the micro-batch; rows of a batch are the queries, then the documents.

    Attributes:
        temperature: see the recipe's `contrastive`.
    """

    judges = True
    temperature = 0.05

    def collate(self, rows: Rows, step: int) -> Batch:
        found = [(ids[~wanted], ids[wanted]) for row in documents(rows) for ids, wanted in row]
        batch = padded([q for q, _ in found] + [d for _, d in found] or [np.zeros(0, np.int64)] * 2, self.words.pad)
        return replace(batch, labels=torch.arange(len(found)) if found else torch.tensor([IGNORE]))

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        assert batch.attention_mask is not None
        states = model.forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
        mask = batch.attention_mask[:, :, None]
        pooled = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        queries, found = pooled.chunk(2)
        asked, texts = ((t[:, None] == t[None]).all(-1) for t in batch.input_ids.chunk(2))
        same = (asked | texts) & ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
        return (queries @ found.T / self.temperature).masked_fill(same, float("-inf"))

    def losses(self, model: Any, batch: Batch, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.logits(model, batch)
        return F.cross_entropy(logits, batch.labels, ignore_index=IGNORE, reduction="none"), logits.argmax(-1)


def padded(texts: list[np.ndarray], pad: int) -> Batch:
    """Each text in a row of its own, padded at its end; without a text a row of padding, whose first token is seen."""
    texts = texts or [np.zeros(0, np.int64)]
    width = max(1, *map(len, texts))
    ids, mask = np.full((len(texts), width), pad, np.int64), np.zeros((len(texts), width), bool)
    mask[:, 0] = True  # attention to nothing is 0/0
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
        mask[i, : len(text)] = True
    places = torch.arange(width).expand(len(texts), -1).contiguous()
    edges = torch.arange(0, ids.size + 1, width, dtype=torch.int32)
    made = torch.from_numpy(ids)
    return Batch(made, places, torch.full_like(made, IGNORE), edges, attention_mask=torch.from_numpy(mask))


OBJECTIVES: dict[str, type[Causal]] = {
    "causal": Causal, "masked": Masked, "denoise": Denoise,
    "sft": Causal, "dpo": Preference, "classify": Classify, "seq2seq": Seq2Seq, "embed": Embed,
}  # fmt: skip


def of(recipe: Recipe, tokenizer: Any, config: Any) -> Causal:
    """The recipe's objective. config: the model's, which knows with what its decoder begins. Raises InputError as Words.of."""
    words = Words.of(tokenizer, recipe.objective, getattr(config, "decoder_start_token_id", None))
    if getattr(config, "pad_token_id", None) is not None:
        words = replace(words, pad=config.pad_token_id)
    made = OBJECTIVES[recipe.objective](words, recipe.seed, recipe.corruption.rate, recipe.corruption.mean_span)
    if isinstance(made, Preference):
        made.beta = recipe.preference.beta
    if isinstance(made, Embed):
        made.temperature = recipe.contrastive.temperature
    return made
