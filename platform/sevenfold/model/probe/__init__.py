"""Tries a model on a tiny copy of it, before anything is started.

Transformers' model types differ in what they accept: some number the tokens of a row themselves, or
pass their state from one packed document on to the next. Whether documents are trained on as if
each were alone is therefore tried for each config, and not looked up by name.
"""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import torch
from transformers import PreTrainedConfig

from sevenfold.engine.objectives import Support
from sevenfold.errors import InputError, first_line
from sevenfold.model import build
from sevenfold.model.adapter import with_adapter
from sevenfold.model.config import family
from sevenfold.model.probe.losses import check_causal, randomize, right_combination
from sevenfold.model.probe.rehearsal import rehearse_export, take_step
from sevenfold.model.probe.tiny import UnsupportedError, tiny_model
from sevenfold.recipe import Recipe

__all__ = ["probe"]

ALTERNATIVES = {
    "decoder": "llama, qwen3, gpt_neox or mistral",
    "encoder": "bert, roberta or modernbert",
    "encoder-decoder": "t5 or bart",
}
_RESULTS: dict[Any, Support | str] = {}  # by what the result depends on; a string is the refusal


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
        recipe.train.activation_checkpointing,
        recipe.optimizer.name,
        recipe.trusted_code,
        recipe.model.path if recipe.trusted_code else None,
        recipe.adapter and recipe.adapter.model_dump_json(),
        json.dumps(config.to_dict(), sort_keys=True, default=str),
    )
    if key not in _RESULTS:
        _RESULTS[key] = _probe(recipe, config, tokenizer)
    result = _RESULTS[key]
    if isinstance(result, str):
        raise InputError(result)
    return result


def _probe(recipe: Recipe, config: PreTrainedConfig, tokenizer: Any) -> Support | str:
    """Returns what the model supports, or the message that refuses it."""
    if recipe.model.attention == "flex_attention":  # it has no backward pass on a CPU
        recipe = recipe.override({"model.attention": "auto"})
    generator_state = torch.get_rng_state()
    try:
        with warnings.catch_warnings(), build.quiet_transformers():
            warnings.simplefilter("ignore")
            model = tiny_model(recipe, config)
            return _supported(recipe, model, tokenizer)
    except Exception as e:  # models' code can raise anything
        is_known = isinstance(e, UnsupportedError | InputError)
        reason = str(e) if is_known else f"{type(e).__name__}: {first_line(e)}"
        alternatives = ALTERNATIVES[family(config)]
        return (
            f"model: {config.model_type} cannot be trained with objective {recipe.objective}: "
            f"{reason} (tried on a tiny copy of the model): choose another model, such as "
            f"{alternatives}"
        )
    finally:
        torch.set_rng_state(generator_state)


def _supported(recipe: Recipe, model: Any, tokenizer: Any) -> Support:
    """Returns what a model supports, if it can be trained right and exported.

    Raises:
        UnsupportedError: It cannot.
    """
    if getattr(model.config, "expert_capacity", None):
        raise UnsupportedError(
            "its experts take at most expert_capacity tokens of a batch, so that the loss of a "
            "document depends on the documents beside it"
        )
    randomize(model, recipe.seed)
    adapted = None
    if recipe.adapter is not None:
        adapted = with_adapter(model, recipe)
        randomize(model, recipe.seed)
    if build.MODEL_CLASSES[recipe.objective][1] == "decoder":
        check_causal(recipe, model)
    support = right_combination(recipe, model)
    build.flops_per_token(model, recipe)
    config = copy.deepcopy(model.config)
    rehearse_export(recipe, model, adapted, tokenizer)
    take_step(recipe, config, support)
    return support
