"""Compares the losses of a tiny model in training with those by transformers' own model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives import Support, attach_losses, unpacked
from sevenfold.errors import first_line
from sevenfold.model.probe.tiny import (
    UnsupportedError,
    documents,
    objective_of,
    one_document,
    output_of,
    special_tokens_of,
)
from sevenfold.recipe import Recipe

log = logging.getLogger(__name__)

# The largest difference of a token's loss, in nats, that is put down to rounding. Sums in another
# order differ by 1e-6 to 3e-4; a document that sees another one, by 0.1 and more.
TOLERANCE = 1e-3


def right_combination(recipe: Recipe, model: Any) -> Support:
    """Returns the first combination with which the losses are right.

    Raises:
        UnsupportedError: There is none.
    """
    reasons = []
    for support in _combinations():
        try:
            difference = _difference(recipe, model, support)
        except Exception as e:
            log.debug("%s: %s: %r", model.config.model_type, support, e)
            reasons.append(f"{type(e).__name__}: {first_line(e)}")
            continue
        log.debug("%s: %s: %.3g", model.config.model_type, support, difference)
        if difference <= TOLERANCE:
            if recipe.train.loss_chunk and not support.chunked_logits:
                raise UnsupportedError(
                    "train.loss_chunk: the model changes its logits after the output layer: remove "
                    "the setting"
                )
            return support
        reasons.append(
            f"a token's loss differs by {difference:.2g} from that of transformers' model with the "
            "document alone"
        )
    raise UnsupportedError(reasons[-1])


def _combinations() -> Iterator[Support]:
    """Yields what may be supported, the best first."""
    for packing in (True, False):
        for chunked_logits in (True, False):
            yield Support(packing, chunked_logits)


def _difference(recipe: Recipe, model: Any, support: Support) -> float:
    """Returns the largest difference of a token's loss between training and plain transformers."""
    special_tokens, words = special_tokens_of(model.config)
    objective = objective_of(recipe, special_tokens)
    objective.support = support
    losses = attach_losses(model, objective, recipe.train.loss_chunk)
    batch = objective.collate(documents(recipe, words, special_tokens.end), 0)
    with torch.no_grad():
        model.eval()
        if batch.labels.ndim == 1:  # one label per document
            difference = _difference_of_outputs(model, batch)
        else:
            found = losses(batch)[batch.labels != IGNORE]
            plain = batch if batch.attention_mask is not None else unpacked(batch, 0)
            difference = float((found - _plain_losses(model, plain)).abs().max())
    model.train()
    loss = losses(batch).sum()
    loss.backward()
    model.zero_grad()
    if not math.isfinite(difference) or not math.isfinite(float(loss)):
        raise ValueError("the loss is not finite")
    return difference


def randomize(model: Any, seed: int) -> None:
    """Draws all trained matrices at random, so that each of them has an effect on the losses.

    Initial weights can be zero (those of adapters, of some output layers) or so small that a
    document that sees another one would not be noticed.
    """
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim >= 2 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))


def check_causal(recipe: Recipe, model: Any) -> None:
    """Raises UnsupportedError if the prediction of a token depends on the tokens after it."""
    ids = one_document(recipe, model.config)
    changed = ids.clone()
    changed[0, -1] = int(special_tokens_of(model.config)[1][-1])
    model.eval()
    with torch.no_grad():
        before, after = (model(input_ids=i).logits[0, :-1].float() for i in (ids, changed))
    difference = float((before - after).abs().max())
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"its prediction of a token changes by {difference:.2g} with the tokens after it, so "
            "that it would be trained to copy them; some models have to be configured with "
            "is_decoder: true"
        )


def _plain_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Returns the losses by transformers' model of each document of a batch alone.

    Args:
        model: The model.
        batch: One document per row.
    """
    assert batch.attention_mask is not None
    parts = []
    for i, (row, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        inputs = {"input_ids": row[batch.attention_mask[i]][None]}
        length = inputs["input_ids"].shape[1]
        if batch.decoder is not None:
            is_token = batch.decoder.documents[i] >= 0
            length = int(is_token.sum())
            inputs["decoder_input_ids"] = batch.decoder.input_ids[i][is_token][None]
        logits = model(**inputs, use_cache=False).logits[0].float()
        keep = labels[:length] != IGNORE
        parts.append(
            F.cross_entropy(logits[:length][keep], labels[:length][keep], reduction="none")
        )
    return torch.cat(parts)


def _difference_of_outputs(model: Any, batch: Batch) -> float:
    """Returns the largest difference of outputs between padded documents and each one alone."""
    assert batch.attention_mask is not None
    together = output_of(
        model, input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()
    )
    differences = []
    for row, is_token, output in zip(batch.input_ids, batch.attention_mask, together, strict=True):
        alone = output_of(model, input_ids=row[is_token][None])[0]
        found = output[is_token] if alone.ndim > 1 else output
        differences.append(float((found - alone).abs().max()))
    return max(differences)
