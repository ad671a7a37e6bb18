"""Builds models from transformers' configs and classes.

The model's code does not know about sharding: `parallel` adds it from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from sevenfold.engine.optim import embedding_parameters
from sevenfold.errors import InputError, first_line
from sevenfold.model.adapter import with_adapter
from sevenfold.model.attention import NAME as SDPA_IN_CHUNKS
from sevenfold.model.config import (
    Family,
    config_of,
    dropouts,
    family,
    local_model,
    model_path,
    runs_own_code,
)
from sevenfold.model.parallel import tensor_plan
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

__all__ = [
    "MODEL_CLASSES",
    "Family",
    "build",
    "check_model",
    "choose_attention",
    "config_of",
    "dropouts",
    "family",
    "flops_per_token",
    "local_model",
    "model_path",
    "runs_own_code",
    "with_adapter",
]

_FAMILY_NAMES: dict[Family, str] = {
    "decoder": "a decoder",
    "encoder": "an encoder",
    "encoder-decoder": "an encoder-decoder",
}
# by objective: transformers' class, and the kind of model that it is, for error messages
MODEL_CLASSES: dict[str, Any] = {
    "causal": (AutoModelForCausalLM, "decoder"),
    "sft": (AutoModelForCausalLM, "decoder"),
    "masked": (AutoModelForMaskedLM, "encoder"),
    "denoise": (AutoModelForSeq2SeqLM, "encoder-decoder"),
    "dpo": (AutoModelForCausalLM, "decoder"),
    "classify": (AutoModelForSequenceClassification, "classifier"),
    "seq2seq": (AutoModelForSeq2SeqLM, "encoder-decoder"),
    "embed": (AutoModel, "encoder"),
}


def check_model(recipe: Recipe, vocab_size: int) -> int:
    """Checks that the recipe's model, and its adapter, can be built.

    It builds them on the meta device, which allocates no memory.

    Args:
        recipe: The recipe.
        vocab_size: The size of the tokenizer's vocabulary.

    Returns:
        The number of parameters, without those of the adapter.

    Raises:
        InputError: The model cannot be built or does not fit the recipe.
    """
    config = config_of(recipe, vocab_size)
    model_class, kind = MODEL_CLASSES[recipe.objective]
    _check_family(recipe, config)
    if recipe.train.loss_chunk and getattr(config, "final_logit_softcapping", None):
        raise InputError(
            "train.loss_chunk does not support a model that caps its logits "
            "(final_logit_softcapping): remove train.loss_chunk"
        )
    if recipe.model.attention == "flex_attention" and _has_attention_dropout(config):
        raise InputError(
            "model.attention: flex_attention does not support attention dropout, which this model "
            "uses: set it to auto"
        )
    if getattr(config, "output_router_logits", False):
        raise InputError(
            f"{recipe.model.path or 'model.config'}: output_router_logits asks for the loss that "
            "balances the experts of a model, which is not added to the loss here: set it to false"
        )
    supported = _supported_attention(recipe, config)
    if recipe.model.attention not in ("auto", *supported):
        raise InputError(
            f"model.attention: {recipe.model.attention}: transformers' {config.model_type} has "
            f"{' and '.join(sorted(supported - {SDPA_IN_CHUNKS}))}: set it to auto"
        )
    with torch.device("meta"):
        try:
            model = model_class.from_config(config, trust_remote_code=runs_own_code(recipe))
        except Exception as e:  # models' code can raise anything
            raise InputError(
                f"{recipe.model.path or 'model.config'}: transformers cannot build the {kind}: "
                f"{first_line(e)}"
            ) from None
        if model.can_generate():
            generation_config(recipe, config)  # tells the user now if it is left out
        count = sum(p.numel() for p in model.parameters())
        if recipe.adapter is not None:
            with_adapter(model, recipe)
    if recipe.parallel.tensor > 1:
        tensor_plan(model, recipe.parallel.tensor)
    return count


def _check_family(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raises InputError if the objective cannot train models of the config's family."""
    expected: Iterable[Family]
    if recipe.objective == "classify":
        expected = _FAMILY_NAMES
    elif recipe.objective == "embed":
        expected = ("encoder", "decoder")
    else:
        expected = (MODEL_CLASSES[recipe.objective][1],)
    found = family(config)
    # the family of a model with code of its own is not known
    if found not in expected and not runs_own_code(recipe):
        raise InputError(
            f"objective {recipe.objective}: "
            f"expected {' or '.join(_FAMILY_NAMES[name] for name in expected)}, "
            f"found {_FAMILY_NAMES[found]} ({config.model_type}): "
            "choose another model or objective"
        )


def _has_attention_dropout(config: PreTrainedConfig) -> bool:
    return any(getattr(config, name) for name in dropouts(config) if "att" in name)


def choose_attention(recipe: Recipe, device: torch.device, config: PreTrainedConfig) -> str:
    """Chooses the fastest attention implementation that keeps packed documents apart.

    FlexAttention does not support attention dropout. Attention in chunks supports neither compiled
    blocks (the slices depend on the mask's values) nor T5 (whose masks are biases).

    Returns:
        A value of transformers' attn_implementation, or `attention.NAME`.
    """
    if recipe.model.attention != "auto":
        return recipe.model.attention
    kind = MODEL_CLASSES[recipe.objective][1]
    wanted = "sdpa"
    if recipe.objective in ("classify", "embed"):
        pass  # each row is one padded document
    elif device.type == "cuda":
        if kind == "decoder" and not _has_attention_dropout(config):
            wanted = "flex_attention"
    elif kind != "encoder-decoder" and not recipe.train.compile:
        wanted = SDPA_IN_CHUNKS
    supported = _supported_attention(recipe, config)
    return next(name for name in (wanted, "sdpa", "eager") if name in supported)


def _supported_attention(recipe: Recipe, config: PreTrainedConfig) -> set[str]:
    """Returns the attention implementations that the model's class in transformers has."""
    auto_class = MODEL_CLASSES[recipe.objective][0]
    model_class = auto_class._model_mapping.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class is None:  # code of its own
        return {"eager", "sdpa", "flex_attention", SDPA_IN_CHUNKS}
    supported = {"eager"}
    if model_class._supports_sdpa:
        supported |= {"sdpa", SDPA_IN_CHUNKS}
    if model_class._supports_flex_attn:
        supported.add("flex_attention")
    return supported


def build(
    recipe: Recipe,
    config: PreTrainedConfig,
    *,
    weights: bool,
    attention: str = "sdpa",
    base: bool = True,
) -> PreTrainedModel:
    """Builds the recipe's model on the CPU, in float32.

    Args:
        recipe: The recipe.
        config: The model's config, from `config_of`.
        weights: Whether to load or initialize the weights. If False the parameters stay
            uninitialized, and their memory untouched; for ranks that receive them from rank 0.
        attention: The attention implementation, from `choose_attention`. A model without SDPA gets
            transformers' eager attention instead.
        base: Whether the weights are those of the recipe's base, if it has one.
    """
    torch.manual_seed(recipe.seed)
    model_class: Any = MODEL_CLASSES[recipe.objective][0]
    implementation = "sdpa" if attention == SDPA_IN_CHUNKS else attention
    if implementation not in _supported_attention(recipe, config):
        implementation = "eager"
    kwargs: dict[str, Any] = {
        "attn_implementation": implementation,
        "dtype": torch.float32,
        "trust_remote_code": runs_own_code(recipe),
    }
    model: PreTrainedModel
    if weights and base and recipe.model.path is not None:
        folder = local_model(recipe.model.path)
        with quiet_transformers():  # it warns that a new head is not among the base's weights
            model, loaded = model_class.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                ignore_mismatched_sizes=recipe.objective == "classify",
                output_loading_info=True,
                **kwargs,
            )
        _check_complete(recipe, model, loaded["missing_keys"])
    else:
        with nullcontext() if weights else no_init_weights():
            model = model_class.from_config(config, **kwargs)
        model.tie_weights()
    if model.can_generate():
        model.generation_config = generation_config(recipe, config)
    # a model whose implementation cannot be set calls SDPA in its own code
    if attention == SDPA_IN_CHUNKS and model._can_set_attn_implementation():
        model.set_attn_implementation(attention)
    return model


def _check_complete(recipe: Recipe, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raises InputError if the base has not all weights, which would then be random.

    A classifier's head is new, and a pooler has no effect where hidden states are averaged.
    """
    allowed = "pooler" if recipe.objective == "embed" else None
    if recipe.objective == "classify":
        allowed = rf"pooler|^(?!{model.base_model_prefix}\.)"
    lacking = sorted(name for name in missing if not (allowed and re.search(allowed, name)))
    if lacking:
        raise InputError(
            f"{recipe.model.path}: expected all weights of {type(model).__name__}, found none for "
            f"{len(lacking)} of them, such as {lacking[0]}, which would be random numbers: choose "
            "a complete model, or an objective that does not need them"
        )


def check_weights(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Checks that a base has all weights, by the names and shapes in its files.

    Only a local directory is checked now; another base, when it is loaded.

    Raises:
        InputError: It lacks some, or its files are damaged.
    """
    if recipe.model.path is None or not os.path.isdir(model_path(recipe.model.path)):
        return
    model_class: Any = MODEL_CLASSES[recipe.objective][0]
    try:
        with quiet_transformers():
            model, loaded = model_class.from_pretrained(
                local_model(recipe.model.path),
                config=config,
                local_files_only=True,
                ignore_mismatched_sizes=recipe.objective == "classify",
                trust_remote_code=runs_own_code(recipe),
                output_loading_info=True,
                device_map="meta",
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise InputError(f"{recipe.model.path}: {first_line(e)}") from None
    _check_complete(recipe, model, loaded["missing_keys"])


def generation_config(recipe: Recipe, config: PreTrainedConfig) -> GenerationConfig:
    """Returns the base model's generation config, which may name several end tokens.

    Ranks that do not load the weights need it too. A config that transformers refuses is left out,
    with a message.
    """
    if recipe.model.path is not None:
        folder = local_model(recipe.model.path, weights=False)
        try:
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:  # not every model has one
            pass
        except (ValueError, TypeError) as e:
            say(f"{folder}/generation_config.json is left out: {first_line(e)}")
    return GenerationConfig.from_model_config(config)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' warnings and progress bars."""
    verbosity = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()


def flops_per_token(model: PreTrainedModel, recipe: Recipe) -> float:
    """Returns the FLOPs of forward and backward per token of text.

    They are 6 per parameter of a matrix, plus 12 * layers * hidden size * sequence length for
    attention (arXiv 2204.02311, appendix B); the half that a causal mask saves is not subtracted.
    The encoder and the decoder of an encoder-decoder count by the tokens that each of them reads.
    """
    config, length = model.config, recipe.data.sequence_length
    embeddings = {id(p) for p in embedding_parameters(model)}

    def stack_flops(module: nn.Module, layers: int, share: float) -> float:
        """Returns the FLOPs of a stack of blocks that reads `share` tokens per token of text."""
        matrices = sum(
            p.numel() for p in module.parameters() if p.ndim >= 2 and id(p) not in embeddings
        )
        return share * (6.0 * matrices + 12.0 * layers * config.hidden_size * length * share)

    head: Any = model.get_output_embeddings()
    if not config.is_encoder_decoder:
        # a tied weight is a lookup in the embedding layer, but a matmul in the output layer
        is_tied = head is not None and id(head.weight) in embeddings
        tied = head.weight.numel() if is_tied else 0
        return stack_flops(model, config.num_hidden_layers, 1.0) + 6.0 * tied
    # tokens removed from the text, and sentinels, per token of text
    rate, spans = recipe.corruption.rate, recipe.corruption.rate / recipe.corruption.mean_span
    if recipe.objective == "seq2seq":
        rate, spans = 0.5, 0.0  # assumes that sources and targets have the same length
    decoder_share = rate + spans
    head_flops = 0.0 if head is None else 6.0 * head.weight.numel() * decoder_share
    # T5's name, and BART's
    names = ("num_decoder_layers", "decoder_layers")
    depths = (getattr(config, name, None) for name in names)
    decoder_layers = next((n for n in depths if n), config.num_hidden_layers)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    return (
        head_flops
        + stack_flops(encoder, config.num_hidden_layers, 1 - rate + spans)
        + stack_flops(decoder, decoder_layers, decoder_share)
    )
