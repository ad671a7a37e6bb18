"""Objectives: each is a collator and a way to the logits. All share one step.

What a collator draws at random hangs on the seed, the step and the row's own tokens: not on the rank that holds the row.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from xxhash import xxh3_64_intdigest

from sevenfold.data.encode import end_of_text
from sevenfold.data.rows import Rows
from sevenfold.data.tokens import SENTINELS
from sevenfold.engine import corrupt
from sevenfold.engine.batch import IGNORE, Batch, Decoder, to_batch
from sevenfold.errors import InputError

CPU_LOGITS = 2**22  # on a CPU so many logits are made at once, kept for backward: they stay in its caches and its heap


@dataclass(frozen=True)
class Words:
    """The ids of a tokenizer that objectives need. `special`: never hidden."""

    vocab_size: int
    special: tuple[int, ...] = ()
    mask: int | None = None
    sentinels: tuple[int, ...] = ()
    pad: int = 0
    end: int | None = None
    start: int = 0  # with which a decoder begins

    @staticmethod
    def of(tokenizer: Any, objective: str, start: int | None = None) -> Words:
        """Raises InputError where the tokenizer lacks a token that the objective needs."""
        known = tokenizer.get_vocab()
        sentinels = tuple(itertools.takewhile(lambda i: i is not None, map(known.get, SENTINELS)))
        if objective == "masked" and tokenizer.mask_token_id is None:
            raise InputError("objective masked: the tokenizer has no mask token: give it one (mask_token), or train one")
        if objective == "denoise" and not sentinels:
            raise InputError("objective denoise: the tokenizer has no sentinels (<extra_id_0>, ...): add them, or train one")
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        end = end_of_text(tokenizer)
        special = tuple(sorted({*tokenizer.all_special_ids, *sentinels}))
        return Words(len(tokenizer), special, tokenizer.mask_token_id, sentinels, pad, end, pad if start is None else start)


@dataclass(frozen=True)
class Scoring:
    """How losses are made of a model's logits.

    Attributes:
        per_token: (model, batch, labels [rows, length]) -> -log p of each label, nats, 0 where there is none, of that shape.
        cross_entropy: (logits [n, classes], labels [n]) -> the same of each, [n].
    """

    per_token: Callable[[Any, Batch, torch.Tensor], torch.Tensor]
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Causal:
    """The next token. Also completions alone: which tokens are targets comes with the rows.

    Attributes:
        judges: there is something to be right about: see `losses`.
    """

    judges = False

    def __init__(self, words: Words, seed: int, rate: float, mean_span: float):
        self.words, self.seed, self.rate, self.mean_span = words, seed, rate, mean_span

    def collate(self, rows: Rows, step: int) -> Batch:
        return to_batch(rows)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        made: torch.Tensor = model.forward(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return made

    def losses(self, model: Any, batch: Batch, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of each label, and, where the objective judges, what the model takes for right (int64): both of the labels' shape."""
        return scoring.per_token(model, batch, batch.labels), None

    def _draws(self, tokens: np.ndarray, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, xxh3_64_intdigest(tokens.data)])


class Masked(Causal):
    """BERT's: tokens hidden here and there, each document seen by itself alone, in both directions."""

    def collate(self, rows: Rows, step: int) -> Batch:
        plain = to_batch(rows)
        assert self.words.mask is not None
        read, wanted = plain.input_ids.numpy(), np.full(plain.labels.shape, IGNORE, np.int64)
        for i, tokens in enumerate(rows.tokens):
            used = int(rows.used[i])
            hideable = ~np.isin(tokens, self.words.special)
            hideable[used:] = False
            ids = read[i]
            made, asked = corrupt.masked(
                self._draws(tokens, step), ids, hideable, self.rate, self.words.mask, self.words.vocab_size
            )
            wanted[i, asked] = ids[asked]
            read[i] = made
        return Batch(plain.input_ids, plain.position_ids, torch.from_numpy(wanted), plain.cu_seqlens)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        apart = _same(batch.documents, batch.documents)
        made: torch.Tensor = model.forward(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=apart
        ).logits
        return made


class Denoise(Causal):
    """T5's span denoising: the encoder reads a document with spans taken out, the decoder says what they were."""

    def collate(self, rows: Rows, step: int) -> Batch:
        pairs = self._sides(rows, step)
        read, wanted = ([[p[side] for p in row] for row in pairs] for side in (0, 1))
        width = rows.tokens.shape[1] if rows.targets is None else max(1, *(sum(map(len, row)) for row in read))
        ids, documents = _laid_out(read, width, self.words.pad)
        labels, owners = _laid_out(wanted, max(1, *(sum(map(len, row)) for row in wanted)), IGNORE)
        inputs = np.full_like(labels, self.words.pad)
        inputs[:, 1:] = np.where(labels[:, :-1] == IGNORE, self.words.pad, labels[:, :-1])
        first = np.diff(owners, axis=1, prepend=-2) != 0
        inputs[first & (owners >= 0)] = self.words.start
        fresh = np.diff(documents, axis=1, prepend=-2) != 0  # padding counts as a document
        edges = np.flatnonzero(fresh.reshape(-1))
        at = np.arange(ids.size) - np.repeat(edges, np.diff(np.append(edges, ids.size)))
        return Batch(
            torch.from_numpy(ids), torch.from_numpy(at.reshape(ids.shape)), torch.from_numpy(labels),
            torch.from_numpy(np.append(edges, ids.size).astype(np.int32)),
            Decoder(torch.from_numpy(inputs), torch.from_numpy(owners)),
        )  # fmt: skip

    def _sides(self, rows: Rows, step: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """What the encoder reads and the decoder says of each document, a list a row."""
        draws = [self._draws(tokens, step) for tokens in rows.tokens]
        return [[self._document(rng, ids) for ids, _ in row] for rng, row in zip(draws, documents(rows), strict=True)]

    def _document(self, rng: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        body = np.flatnonzero(~np.isin(ids, self.words.special))
        noise = np.zeros(len(ids), bool)
        noise[body] = corrupt.spans(rng, len(body), self.rate, self.mean_span, len(self.words.sentinels))
        if not noise.any():
            return ids, ids[:0]
        return corrupt.denoise(ids, noise, np.array(self.words.sentinels), self.words.end)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        assert batch.decoder is not None
        mine, asking = batch.documents, batch.decoder.documents
        encoded = model.encoder(input_ids=batch.input_ids, attention_mask=_same(mine, mine))
        length = asking.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=asking.device).tril()
        across = _same(asking, mine) | (asking < 0)[:, None, :, None]  # padding must look somewhere: else 0/0
        made: torch.Tensor = model.forward(
            encoder_outputs=encoded, attention_mask=across, decoder_input_ids=batch.decoder.input_ids,
            decoder_attention_mask=_same(asking, asking) & before, use_cache=False,
        ).logits  # fmt: skip
        return made


def documents(rows: Rows) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """(ids int64, which are targets) of each document, a list a row."""
    out = []
    for i, tokens in enumerate(rows.tokens):
        targets = np.ones(len(tokens), bool) if rows.targets is None else rows.targets[i]
        begins = [*rows.starts[rows.bounds[i] : rows.bounds[i + 1]].tolist(), len(tokens)]
        ends = [min(int(e), int(rows.used[i])) for e in begins[1:]]
        pairs = zip(begins, ends, strict=False)
        out.append([(tokens[a:b].astype(np.int64), targets[a:b]) for a, b in pairs if a < rows.used[i]])
    return out


def _same(asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Who may look at whom: bool [rows, 1, asking, asked]."""
    return (asking[:, :, None] == asked[:, None, :])[:, None]


def _laid_out(rows: list[list[np.ndarray]], width: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end in rows, and each token's document, -1 where padded: int64 [rows, width] both."""
    ids, owners = np.full((len(rows), width), fill, np.int64), np.full((len(rows), width), -1, np.int64)
    for i, documents in enumerate(rows):
        flat = np.concatenate([np.zeros(0, np.int64), *documents])
        ids[i, : len(flat)] = flat
        owners[i, : len(flat)] = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    return ids, owners


def attach(
    model: Any, objective: Causal, chunk: int | None = None, z_loss: float = 0.0, label_smoothing: float = 0.0,
    cpu_logits: int | None = CPU_LOGITS,
) -> Callable[..., Any]:  # fmt: skip
    """Gives a model the method `token_losses(batch)`: -log p of each label, nats, 0 where there is none, float32; with
    `judged=True` all that Causal.losses gives. A method, so that sharding can gather the root's parameters for it.

    Args:
        chunk: of so many tokens at a time the logits are made, and made again in backward; None: of all at once.
        z_loss: this part of the square of log(sum(exp(logits))) joins the gradient of each token, not the loss returned.
        label_smoothing: this part of each target is spread over all tokens, in the gradient alone as well.
        cpu_logits: where there is no chunk, on a CPU so many logits are made at once; None: all, as elsewhere.
    """
    bent = getattr(model.config, "final_logit_softcapping", None)

    def per_token(self: Any, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
        head = self.get_output_embeddings()
        wanted = labels.flatten()
        size = chunk
        if cpu_logits and not (chunk or bent) and batch.labels.device.type == "cpu":
            size = max(1, cpu_logits // head.weight.shape[0])
        if size is None:
            losses = _cross_entropy(objective.logits(self, batch).flatten(0, 1), wanted, z_loss, label_smoothing)
        else:
            with _passing(head):
                hidden = objective.logits(self, batch).flatten(0, 1)

            def part(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
                return _cross_entropy(F.linear(hidden, head.weight, head.bias), wanted, z_loss, label_smoothing)

            made = functools.partial(checkpoint, part, use_reentrant=False) if chunk else part
            losses = torch.cat([made(h, w) for h, w in zip(hidden.split(size), wanted.split(size), strict=True)])
        return losses.view_as(labels).clone()  # FSDP warns of views

    scoring = Scoring(per_token, functools.partial(_cross_entropy, z_loss=z_loss, label_smoothing=label_smoothing))

    def token_losses(self: Any, batch: Batch, judged: bool = False) -> Any:
        losses, taken = objective.losses(self, batch, scoring)
        return (losses, taken) if judged else losses

    bound: Callable[..., Any] = MethodType(token_losses, model)
    model.token_losses = bound
    return bound


def _cross_entropy(logits: torch.Tensor, wanted: torch.Tensor, z_loss: float, label_smoothing: float) -> torch.Tensor:
    logits = logits.float()
    losses = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none")
    if label_smoothing and torch.is_grad_enabled():
        smooth = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing)
        losses = losses.detach() + (smooth - smooth.detach())  # its gradient alone
    if z_loss:
        z = z_loss * logits.logsumexp(-1).square() * (wanted != IGNORE)
        losses = losses + (z - z.detach())  # 0, but for its gradient
    return losses


@contextlib.contextmanager
def _passing(head: nn.Module) -> Iterator[None]:
    """Lets what the output layer would be given pass through: all that a model does before and after it stays its own."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
