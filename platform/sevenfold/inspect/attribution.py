"""Losses of a text's tokens, and which tokens of a prompt determine the next one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sevenfold.engine.decode import decoder_start
from sevenfold.errors import InputError
from sevenfold.inference.load import Loaded

MAX_LOGITS = 2**25  # logits that are in memory at once; 128 MB in float32


@dataclass(frozen=True)
class Scores:
    """The losses of tokens.

    Attributes:
        nats: float64 [tokens], -log p of each token.
        ranks: int64 [tokens], each token's rank by probability; 1 is the most probable.
    """

    nats: np.ndarray
    ranks: np.ndarray


@torch.no_grad()
def decoder_scores(loaded: Loaded, ids: list[int], first: int) -> Scores:
    """Scores the tokens ids[first:] with a decoder, each given all tokens before it.

    Args:
        loaded: A decoder.
        ids: The tokens of the text.
        first: The index of the first token to score, 1 or more.
    """
    outputs = loaded.model(input_ids=_batch_of_one(loaded, ids), use_cache=False)
    logits = outputs.logits[0, first - 1 : -1]
    return _scores(logits, _batch_of_one(loaded, ids)[0, first:])


@torch.no_grad()
def target_scores(loaded: Loaded, source: list[int], target: list[int]) -> Scores:
    """Scores the target of an encoder-decoder, each token given the source and those before it."""
    start = decoder_start(loaded.model, loaded.tokenizer)
    outputs = loaded.model(
        input_ids=_batch_of_one(loaded, source),
        decoder_input_ids=_batch_of_one(loaded, [start, *target[:-1]]),
        use_cache=False,
    )
    return _scores(outputs.logits[0], _batch_of_one(loaded, target)[0])


@torch.no_grad()
def masked_scores(loaded: Loaded, ids: list[int], asked: range) -> Scores:
    """Scores tokens with an encoder, each masked alone and predicted from all other tokens.

    The sum of the log-probabilities is the pseudo-log-likelihood of arXiv 1910.14659.

    Args:
        loaded: An encoder.
        ids: The tokens of the text.
        asked: The positions to score.

    Raises:
        InputError: The tokenizer has no mask token.
    """
    mask_token = loaded.tokenizer.mask_token_id
    if mask_token is None:
        raise InputError(
            f"{loaded.path}: the tokenizer has no mask token, which is needed to score an encoder"
        )
    text, parts = _batch_of_one(loaded, ids), []
    batch_size = min(64, max(1, MAX_LOGITS // (len(ids) * len(loaded.tokenizer))))
    for start in range(asked.start, asked.stop, batch_size):
        stop = min(start + batch_size, asked.stop)
        positions = torch.arange(start, stop, device=loaded.device)
        rows = torch.arange(len(positions))
        masked = text.repeat(len(positions), 1)  # one copy of the text per masked position
        masked[rows, positions] = mask_token
        logits = loaded.model(input_ids=masked, attention_mask=torch.ones_like(masked)).logits
        parts.append(_scores(logits[rows, positions], text[0, positions]))
    return Scores(np.concatenate([p.nats for p in parts]), np.concatenate([p.ranks for p in parts]))


@dataclass(frozen=True)
class Saliency:
    """The attribution of the next token to the tokens of a prompt.

    Attributes:
        token: The id of the next token.
        logp: Its log-probability.
        gradient: float64 [tokens, width], the gradient of `logp` by each token's input embedding.
        scores: float64 [tokens], gradient x input: the dot product of gradient and embedding.
    """

    token: int
    logp: float
    gradient: np.ndarray
    scores: np.ndarray


def saliency(loaded: Loaded, ids: list[int], token: int | None = None) -> Saliency:
    """Computes gradient x input for the next token.

    The gradient is that of arXiv 1312.6034, multiplied by the input (compared with other methods in
    arXiv 1711.06104). The dot product is used and not the L2 norm, since its sign tells whether a
    token makes the next one more or less probable: to first order it is what log p would lose if
    the token's embedding were 0. The gradient is that of log p and not of the logit, since a logit
    that rises together with all others makes nothing more probable.

    Args:
        loaded: A decoder, or an encoder-decoder.
        ids: The prompt, or the source.
        token: The token that follows the prompt, or the first one of the answer to the source.
            None: the most probable one.
    """
    input_ids = _batch_of_one(loaded, ids)
    embeddings = loaded.model.get_input_embeddings()(input_ids).detach().requires_grad_()
    outputs = loaded.model(
        inputs_embeds=embeddings,
        attention_mask=torch.ones_like(input_ids),
        use_cache=False,
        **_decoder_inputs(loaded),
    )
    logits = outputs.logits[0, -1]
    logp = torch.log_softmax(logits.to(_at_least_float32(logits.dtype)), -1)
    next_token = int(logp.argmax()) if token is None else token
    (grad,) = torch.autograd.grad(logp[next_token], embeddings)
    gradient = grad[0].double().cpu().numpy()
    inputs = embeddings[0].detach().double().cpu().numpy()
    return Saliency(
        next_token, float(logp[next_token].detach()), gradient, (gradient * inputs).sum(-1)
    )


@torch.no_grad()
def attention(loaded: Loaded, ids: list[int]) -> np.ndarray:
    """Returns the attention of the last layer from the last position, averaged over the heads.

    For an encoder-decoder it is the cross-attention from the first position of the decoder.

    Args:
        loaded: The model. It must have been loaded with attention="eager".
        ids: The tokens of the text.

    Returns:
        float64 [tokens], with the sum 1.

    Raises:
        InputError: The model does not return attention weights.
    """
    key = "cross_attentions" if loaded.family == "encoder-decoder" else "attentions"
    outputs = loaded.model(
        input_ids=_batch_of_one(loaded, ids), output_attentions=True, **_decoder_inputs(loaded)
    )
    layers = outputs.get(key)
    if not layers or layers[-1] is None:
        raise InputError(
            f"{loaded.path}: models of type {loaded.model.config.model_type} "
            "do not return attention weights"
        )
    weights: np.ndarray = layers[-1][0].double().mean(0)[-1].cpu().numpy()
    return weights


def _decoder_inputs(loaded: Loaded) -> dict[str, torch.Tensor]:
    """Returns the first input of an encoder-decoder's decoder; nothing for other models."""
    if loaded.family != "encoder-decoder":
        return {}
    start = decoder_start(loaded.model, loaded.tokenizer)
    return {"decoder_input_ids": _batch_of_one(loaded, [start])}


def _batch_of_one(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=loaded.device)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scores(logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Scores targets.

    Args:
        logits: [tokens, vocabulary].
        targets: int64 [tokens], the ids of the tokens that the logits predict.
    """
    nats, ranks = [], []
    for part, ids in zip(logits.split(256), targets.split(256), strict=True):
        values = part.to(_at_least_float32(part.dtype))
        target_values = values.gather(1, ids[:, None])
        nats.append((values.logsumexp(1) - target_values[:, 0]).double().cpu().numpy())
        ranks.append(((values > target_values).sum(1) + 1).cpu().numpy())
    return Scores(np.concatenate(nats), np.concatenate(ranks))
