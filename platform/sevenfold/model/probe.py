"""Tries a model on a tiny copy of it, before anything is started.

Transformers' model types differ in what they accept: some number the tokens of a row themselves, or
pass their state from one packed document on to the next. Whether documents are trained on as if
each were alone is therefore tried for each config, and not looked up by name.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives import (
    OBJECTIVES,
    Causal,
    Objective,
    Preference,
    SpecialTokens,
    Support,
    attach_losses,
    unpacked,
)
from sevenfold.errors import InputError, first_line
from sevenfold.model import build
from sevenfold.model.adapter import with_adapter
from sevenfold.model.config import family
from sevenfold.model.directory import merged, write_directory
from sevenfold.model.shrink import VOCABULARY, shrunken
from sevenfold.recipe import Recipe

log = logging.getLogger(__name__)

DOCUMENTS = (13, 17, 10)  # tokens of each document of the packed row that is tried
PADDING = 3  # tokens after them
MAX_PARAMETERS = 3 * 10**8  # of a shrunken model; larger ones take many seconds and gigabytes
# The largest difference of a token's loss, in nats, that is put down to rounding. Sums in another
# order differ by 1e-6 to 3e-4; a document that sees another one, by 0.1 and more.
TOLERANCE = 1e-3
MERGED = 1e-2  # the largest relative difference by merging an adapter; random ones are large
ALTERNATIVES = {
    "decoder": "llama, qwen3, gpt_neox or mistral",
    "encoder": "bert, roberta or modernbert",
    "encoder-decoder": "t5 or bart",
}


def probe(recipe: Recipe, config: PreTrainedConfig, tokenizer: Any = None) -> Support:
    """Tries a model on a tiny copy of it, with random weights.

    The losses of a few documents are computed as in training, and by plain calls of transformers'
    model with each document alone. Both have to be equal.

    Args:
        recipe: The recipe.
        config: The model's config, from `config_of`.
        tokenizer: The tokenizer that is exported with it, if it exists already.

    Raises:
        InputError: The model cannot be trained right with this objective.
    """
    key = (
        recipe.objective,
        recipe.model.attention,
        recipe.train.loss_chunk,
        recipe.model.trust_remote_code,
        recipe.model.path if recipe.model.trust_remote_code else None,
        recipe.adapter and recipe.adapter.model_dump_json(),
        json.dumps(config.to_dict(), sort_keys=True, default=str),
    )
    if key not in _RESULTS:
        _RESULTS[key] = _probe(recipe, config, tokenizer)
    result = _RESULTS[key]
    if isinstance(result, str):
        raise InputError(result)
    return result


_RESULTS: dict[Any, Support | str] = {}  # by what the result depends on; a string is the refusal


def _probe(recipe: Recipe, config: PreTrainedConfig, tokenizer: Any) -> Support | str:
    """Returns what the model supports, or the message that refuses it."""
    if recipe.model.attention == "flex_attention":  # it has no backward pass on a CPU
        recipe = recipe.override({"model.attention": "auto"})
    generator_state = torch.get_rng_state()
    try:
        with warnings.catch_warnings(), build.quiet_transformers():
            warnings.simplefilter("ignore")
            model = _shrunken_model(recipe, config)
            return _supported(recipe, model, tokenizer)
    except Exception as e:  # models' code can raise anything
        reason = str(e) if isinstance(e, _Unsupported) else f"{type(e).__name__}: {first_line(e)}"
        alternatives = ALTERNATIVES[family(config)]
        return (
            f"model: {config.model_type} cannot be trained with objective {recipe.objective}: "
            f"{reason} (tried on a tiny copy of the model): choose another model, such as "
            f"{alternatives}"
        )
    finally:
        torch.set_rng_state(generator_state)


class _Unsupported(Exception):
    """Raised with the reason why a model cannot be trained."""


def _shrunken_model(recipe: Recipe, config: PreTrainedConfig) -> Any:
    """Returns the smallest copy of the model that transformers can build and run.

    Raises:
        _Unsupported: There is none.
    """
    reasons = []
    model_class = build.MODEL_CLASSES[recipe.objective][0]
    for small in shrunken(config):
        try:
            with torch.device("meta"):
                model = model_class.from_config(
                    small, trust_remote_code=recipe.model.trust_remote_code
                )
            size = sum(p.numel() for p in model.parameters())
            if size > MAX_PARAMETERS:
                reasons.append(f"its smallest copy has {size:,} parameters")
                break
            if small.is_encoder_decoder:
                small.decoder_start_token_id = _special_tokens(small)[0].start
            kernel = build.choose_attention(recipe, torch.device("cpu"), small)
            model = build.build(recipe, small, weights=True, attention=kernel, base=False)
            special_tokens, words = _special_tokens(small)
            ids = torch.from_numpy(words[:16])[None]
            if special_tokens.end is not None:
                ids[0, -1] = special_tokens.end  # which BART's classifier needs
            with torch.no_grad():
                model.eval()(**_inputs(model, ids, ids))
        except Exception as e:
            reasons.append(f"{type(e).__name__}: {first_line(e)}")
            continue
        return model
    raise _Unsupported(f"transformers' model fails: {reasons[0] if reasons else 'no copy of it'}")


def _supported(recipe: Recipe, model: Any, tokenizer: Any) -> Support:
    """Returns what a model supports, if it can be trained right and exported.

    Raises:
        _Unsupported: It cannot.
    """
    adapted = None if recipe.adapter is None else with_adapter(model, recipe)
    _randomize(model, recipe.seed)
    if build.MODEL_CLASSES[recipe.objective][1] == "decoder":
        _check_causal(model)
    support = _right_combination(recipe, model)
    build.flops_per_token(model, recipe)
    _rehearse_export(recipe, model, adapted, tokenizer)
    return support


def _check_causal(model: Any) -> None:
    """Raises _Unsupported if the prediction of a token depends on the tokens after it."""
    _, words = _special_tokens(model.config)
    ids = torch.from_numpy(words[:16])[None]
    changed = ids.clone()
    changed[0, -1] = int(words[-1])
    model.eval()
    with torch.no_grad():
        before, after = (model(input_ids=i).logits[0, :-1].float() for i in (ids, changed))
    difference = float((before - after).abs().max())
    if not difference <= TOLERANCE:
        raise _Unsupported(
            f"its prediction of a token changes by {difference:.2g} with the tokens after it, so "
            "that it would be trained to copy them; some models have to be configured with "
            "is_decoder: true"
        )


def _right_combination(recipe: Recipe, model: Any) -> Support:
    """Returns the first combination with which the losses are right.

    Raises:
        _Unsupported: There is none.
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
                raise _Unsupported(
                    "train.loss_chunk: the model changes its logits after the output layer: remove "
                    "the setting"
                )
            return support
        reasons.append(
            f"a token's loss differs by {difference:.2g} from that of transformers' model with the "
            "document alone"
        )
    raise _Unsupported(reasons[-1])


def _rehearse_export(recipe: Recipe, model: Any, adapted: Any, tokenizer: Any) -> None:
    """Writes the model as it is exported after training, and loads it again.

    Args:
        recipe: The recipe.
        model: The model.
        adapted: peft's wrapper of it, None without an adapter.
        tokenizer: The tokenizer, None if it does not exist yet.

    Raises:
        _Unsupported: The written model differs, or something fails.
    """
    model_class = build.MODEL_CLASSES[recipe.objective][0]
    special_tokens, words = _special_tokens(model.config)
    ids = torch.from_numpy(words[:16])[None]
    if special_tokens.end is not None:
        ids[0, -1] = special_tokens.end
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            if adapted is not None:
                model, difference = merged(adapted)
                if not difference <= MERGED:
                    raise ValueError(f"the merged adapter changes the output by {difference:.2g}")
            write_directory(model.eval(), tokenizer, folder, 10**9)
            if recipe.model.trust_remote_code:
                return  # its code is not copied
            loaded = model_class.from_pretrained(folder, dtype=torch.float32).eval()
            outputs = [_output(m, **_inputs(m, ids, ids)) for m in (model, loaded)]
    except Exception as e:  # models' code can raise anything
        raise _Unsupported(f"its export fails: {type(e).__name__}: {first_line(e)}") from None
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= TOLERANCE:
        raise _Unsupported(
            f"its export is not the trained model: the outputs differ by {difference:.2g}"
        )


def _combinations() -> Iterator[Support]:
    """Yields what may be supported, the best first."""
    for packing in (True, False):
        for chunked_logits in (True, False):
            yield Support(packing, chunked_logits)


def _randomize(model: Any, seed: int) -> None:
    """Draws all matrices at random, so that each of them has an effect on the losses.

    Initial weights can be zero (those of adapters, of some output layers) or so small that a
    document that sees another one would not be noticed.
    """
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))


def _difference(recipe: Recipe, model: Any, support: Support) -> float:
    """Returns the largest difference of a token's loss between training and plain transformers."""
    special_tokens, words = _special_tokens(model.config)
    objective = _objective(recipe, special_tokens)
    objective.support = support
    losses = attach_losses(model, objective, recipe.train.loss_chunk)
    batch = objective.collate(_rows(recipe, words, special_tokens.end), 0)
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


def _objective(recipe: Recipe, special_tokens: SpecialTokens) -> Objective:
    """Returns the recipe's objective; that of preferences runs the model as `Causal` does."""
    objective_class = OBJECTIVES[recipe.objective]
    if issubclass(objective_class, Preference):
        objective_class = Causal
    return objective_class(special_tokens, 0, 0.3, 2)


def _special_tokens(config: PreTrainedConfig) -> tuple[SpecialTokens, np.ndarray]:
    """Returns special tokens that suit a shrunken config, and the ids of all other tokens."""
    text = config.get_text_config()
    fields = {**vars(config), **vars(text)}
    named = [v for k, v in fields.items() if k.endswith(("token_id", "token_index"))]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    special = {i for i in ids if type(i) is int} | {0}
    words = [i for i in range(getattr(text, "vocab_size", VOCABULARY)) if i not in special]
    mask, *sentinels = [words.pop() for _ in range(9)]
    pad = getattr(text, "pad_token_id", None)
    start = getattr(config, "decoder_start_token_id", None)
    end = getattr(text, "eos_token_id", None)
    pad = pad if type(pad) is int and pad >= 0 else 0
    return SpecialTokens(
        vocab_size=len(words),
        special=tuple(sorted(special)),
        mask=mask,
        sentinels=tuple(sentinels),
        pad=pad,
        end=end if type(end) is int and end >= 0 else None,
        start=pad if start is None else start,
    ), np.array(words)


def _rows(recipe: Recipe, words: np.ndarray, end: int | None) -> Rows:
    """Returns a packed row of random documents, the second half of each of which are targets.

    Args:
        recipe: The recipe.
        words: The ids to draw from.
        end: The token that ends a document.
    """
    tokens = np.zeros((1, sum(DOCUMENTS) + PADDING), np.uint16)
    targets = np.zeros(tokens.shape, bool)
    starts = np.cumsum([0, *DOCUMENTS])
    rng = np.random.default_rng(0)
    for start, stop in itertools.pairwise(starts):
        tokens[0, start:stop] = rng.choice(words, stop - start)
        targets[0, (start + stop) // 2 : stop] = True
        if recipe.objective == "classify":
            stop -= 1
            tokens[0, stop] = 1  # the index of the class
        if end is not None:
            tokens[0, stop - 1] = end
    used = np.array([starts[-1]], np.int32)
    return Rows(tokens, starts.astype(np.int32), used, targets)


def _inputs(model: Any, input_ids: torch.Tensor, decoder: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the arguments of a plain call of a model."""
    is_pair = model.config.is_encoder_decoder and hasattr(model, "lm_head")
    return {"input_ids": input_ids, **({"decoder_input_ids": decoder} if is_pair else {})}


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
    together = _output(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
    differences = []
    for row, is_token, output in zip(batch.input_ids, batch.attention_mask, together, strict=True):
        alone = _output(model, input_ids=row[is_token][None])[0]
        found = output[is_token] if alone.ndim > 1 else output
        differences.append(float((found - alone).abs().max()))
    return max(differences)


def _output(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a classifier, or the hidden states of another model."""
    output = model(**inputs)
    logits: torch.Tensor | None = getattr(output, "logits", None)
    result: torch.Tensor = output.last_hidden_state if logits is None else logits
    return result.float()
