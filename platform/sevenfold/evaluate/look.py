"""Inside a model: what each token of a text cost it, and what the next one hangs on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sevenfold.errors import InputError
from sevenfold.model.load import Loaded

LOGITS = 2**25  # that stand in memory at once: 128 MB


@dataclass(frozen=True)
class Scores:
    """Of so many tokens: -log p, nats, float64 [tokens]; each one's rank by probability, 1 is the likeliest, int64 [tokens]."""

    nats: np.ndarray
    ranks: np.ndarray


@torch.no_grad()
def decoder_scores(loaded: Loaded, ids: list[int], first: int) -> Scores:
    """Of the tokens ids[first:], each given all before it. `first`: 1 or more."""
    logits = loaded.model(input_ids=_row(loaded, ids), use_cache=False).logits[0, first - 1 : -1]
    return _scores(logits, _row(loaded, ids)[0, first:])


@torch.no_grad()
def target_scores(loaded: Loaded, source: list[int], target: list[int]) -> Scores:
    """Of an encoder-decoder's target, each token given the source and those before it."""
    inputs = _row(loaded, [loaded.start, *target[:-1]])
    logits = loaded.model(input_ids=_row(loaded, source), decoder_input_ids=inputs, use_cache=False).logits[0]
    return _scores(logits, _row(loaded, target)[0])


@torch.no_grad()
def masked_scores(loaded: Loaded, ids: list[int], asked: range) -> Scores:
    """Of the tokens at positions `asked` of an encoder's text, each one masked alone and told from all others: their sum is
    the pseudo-log-likelihood of arXiv 1910.14659. Raises InputError where the tokenizer has no mask token."""
    mask = loaded.tokenizer.mask_token_id
    if mask is None:
        raise InputError(f"{loaded.path}: expected a tokenizer with a mask token, found none: nothing can be hidden from it")
    row, parts = _row(loaded, ids), []
    size = min(64, max(1, LOGITS // (len(ids) * len(loaded.tokenizer))))
    for begin in range(asked.start, asked.stop, size):
        at = torch.arange(begin, min(begin + size, asked.stop), device=loaded.device)
        hidden = row.repeat(len(at), 1)
        hidden[torch.arange(len(at)), at] = mask
        logits = loaded.model(input_ids=hidden, attention_mask=torch.ones_like(hidden)).logits
        parts.append(_scores(logits[torch.arange(len(at)), at], row[0, at]))
    return Scores(np.concatenate([p.nats for p in parts]), np.concatenate([p.ranks for p in parts]))


@dataclass(frozen=True)
class Saliency:
    """What a prompt's tokens do to the next token.

    Attributes:
        token: the next token's id; `logp`: its log-probability.
        gradient: float64 [tokens, width], of logp by each token's input embedding.
        scores: float64 [tokens], gradient x input: the dot product of the two.
    """

    token: int
    logp: float
    gradient: np.ndarray
    scores: np.ndarray


def saliency(loaded: Loaded, ids: list[int], token: int | None = None) -> Saliency:
    """Gradient x input for the next token (default: the likeliest) of a decoder's prompt, or the first of an encoder-decoder's
    answer to a source.

    The gradient is that of arXiv 1312.6034, times the input (compared in arXiv 1711.06104). The dot product, not the L2 norm,
    since its sign tells whether a token speaks for the next one or against it: to first order it is what log p would lose if
    the token's embedding were 0. Of log p, not of the logit: a logit that rises with all others makes nothing likelier.
    """
    read = _row(loaded, ids)
    inputs = loaded.model.get_input_embeddings()(read).detach().requires_grad_()
    more = {"decoder_input_ids": _row(loaded, [loaded.start])} if loaded.family == "encoder-decoder" else {}
    out = loaded.model(inputs_embeds=inputs, attention_mask=torch.ones_like(read), use_cache=False, **more)
    logits = out.logits[0, -1]
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    chosen = int(logp.argmax()) if token is None else token
    (gradient,) = torch.autograd.grad(logp[chosen], inputs)
    found = float(logp[chosen].detach())
    g, x = gradient[0].double().cpu().numpy(), inputs[0].detach().double().cpu().numpy()
    return Saliency(chosen, found, g, (g * x).sum(-1))


@torch.no_grad()
def attention(loaded: Loaded, ids: list[int]) -> np.ndarray:
    """float64 [tokens]: how the last layer looks back from the last position, mean over heads; it sums to 1. Of an
    encoder-decoder: across, from the decoder's first position. The model must have been loaded with attention="eager".

    Raises InputError where the model shows none.
    """
    cross = loaded.family == "encoder-decoder"
    more = {"decoder_input_ids": _row(loaded, [loaded.start])} if cross else {}
    out = loaded.model(input_ids=_row(loaded, ids), output_attentions=True, **more)
    layers = out.get("cross_attentions" if cross else "attentions")
    if not layers or layers[-1] is None:
        raise InputError(f"{loaded.path}: expected attention, found none: a {loaded.model.config.model_type} shows none")
    made: np.ndarray = layers[-1][0].double().mean(0)[-1].cpu().numpy()
    return made


def _row(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=loaded.device)


def _scores(logits: torch.Tensor, wanted: torch.Tensor) -> Scores:
    """logits: [tokens, vocabulary]; wanted: int64 [tokens]."""
    nats, ranks = [], []
    for part, ids in zip(logits.split(256), wanted.split(256), strict=True):
        each = part.to(torch.promote_types(part.dtype, torch.float32))
        own = each.gather(1, ids[:, None])
        nats.append((each.logsumexp(1) - own[:, 0]).double().cpu().numpy())
        ranks.append(((each > own).sum(1) + 1).cpu().numpy())
    return Scores(np.concatenate(nats), np.concatenate(ranks))
