"""The tiny copy of a model, and the documents that it is tried on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from sevenfold.data.rows import Rows
from sevenfold.engine.objectives import OBJECTIVES, Causal, Objective, Preference, SpecialTokens
from sevenfold.errors import first_line
from sevenfold.model import build
from sevenfold.model.probe.shrink import VOCABULARY, shrunken
from sevenfold.recipe import Recipe

# tokens of each document of the packed row that is tried, unless the model has fewer positions
DOCUMENTS = (13, 17, 10)
PADDING = 3  # tokens after them
MAX_PARAMETERS = 12 * 10**7  # of a tiny model; larger ones take many seconds and gigabytes


class UnsupportedError(Exception):
    """Raised with the reason why a model cannot be trained."""


def special_tokens_of(config: PreTrainedConfig) -> tuple[SpecialTokens, np.ndarray]:
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


def documents(recipe: Recipe, words: np.ndarray, end: int | None) -> Rows:
    """Returns a packed row of random documents, the second half of each of which are targets.

    Args:
        recipe: The recipe.
        words: The ids to draw from.
        end: The token that ends a document.
    """
    lengths = [min(length, recipe.data.sequence_length) for length in DOCUMENTS]
    tokens = np.zeros((1, sum(lengths) + PADDING), np.uint16)
    targets = np.zeros(tokens.shape, bool)
    starts = np.cumsum([0, *lengths])
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


def one_document(recipe: Recipe, config: PreTrainedConfig) -> torch.Tensor:
    """Returns a document for a plain call of the model: int64 [1, length].

    It ends with the end token, which BART's classifier needs.
    """
    special_tokens, words = special_tokens_of(config)
    ids = torch.from_numpy(words[: min(16, recipe.data.sequence_length)])[None]
    if special_tokens.end is not None:
        ids[0, -1] = special_tokens.end
    return ids


def objective_of(recipe: Recipe, special_tokens: SpecialTokens) -> Objective:
    """Returns the recipe's objective; that of preferences runs the model as `Causal` does."""
    objective_class = OBJECTIVES[recipe.objective]
    if issubclass(objective_class, Preference):
        objective_class = Causal
    return objective_class(special_tokens, 0, 0.3, 2)


def tiny_model(recipe: Recipe, config: PreTrainedConfig) -> Any:
    """Returns the smallest copy of the model that transformers can build and run.

    Raises:
        UnsupportedError: There is none.
    """
    reasons = []
    model_class = build.MODEL_CLASSES[recipe.objective][0]
    for small in shrunken(config):
        try:
            small.validate()
            with torch.device("meta"):
                model = model_class.from_config(
                    small, trust_remote_code=build.runs_own_code(recipe)
                )
            size = sum(p.numel() for p in model.parameters())
            if size > MAX_PARAMETERS:
                reasons.append(f"its smallest copy has {size:,} parameters")
                break
            if small.is_encoder_decoder:
                small.decoder_start_token_id = special_tokens_of(small)[0].start
            kernel = build.choose_attention(recipe, torch.device("cpu"), small)
            model = build.build(recipe, small, weights=True, attention=kernel, base=False)
            ids = one_document(recipe, small)
            with torch.no_grad():
                model.eval()(**plain_inputs(model, ids, ids))
        except Exception as e:
            reasons.append(f"{type(e).__name__}: {first_line(e)}")
            continue
        return model
    raise UnsupportedError(
        f"transformers' model fails: {reasons[0] if reasons else 'no copy of it'}"
    )


def output_of(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a classifier, or the hidden states of another model."""
    output = model(**inputs)
    logits: torch.Tensor | None = getattr(output, "logits", None)
    result: torch.Tensor = output.last_hidden_state if logits is None else logits
    return result.float()


def plain_inputs(
    model: Any, input_ids: torch.Tensor, decoder: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the arguments of a plain call of a model."""
    is_pair = model.config.is_encoder_decoder and hasattr(model, "lm_head")
    return {"input_ids": input_ids, **({"decoder_input_ids": decoder} if is_pair else {})}
