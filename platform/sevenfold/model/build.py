"""Models by transformers' own configs and classes. A model never knows that it is sharded."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sevenfold import storage
from sevenfold.engine.optim import embedding_parameters
from sevenfold.errors import InputError
from sevenfold.recipe import Adapter, Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_path(path: str) -> str:
    """Where the model of a path lies: a run of ours keeps it in its folder `model`."""
    at = storage.locate(path)
    inner = storage.RunFolder(at).model
    if storage.exists(storage.join(inner, "config.json")):
        return inner
    if storage.exists(storage.join(at, "config.json")):
        return at
    raise InputError(f"{at}: expected a run or a Hugging Face directory (config.json), found none")


def config_of(recipe: Recipe, vocab_size: int) -> PreTrainedConfig:
    """The transformers config of the recipe's model.

    Raises:
        InputError: an unknown model type or field, a vocabulary or context that is too small for the data.
    """
    fields = {"vocab_size": vocab_size, "max_position_embeddings": recipe.data.sequence_length, **(recipe.model.config or {})}
    try:
        if recipe.model.path is not None:
            folder = storage.local(model_path(recipe.model.path))
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(**fields)
            unknown = fields.keys() - AutoConfig.for_model(fields["model_type"]).to_dict().keys()
            if unknown:
                raise InputError(f"model.config: {fields['model_type']} has no field {sorted(unknown)[0]!r}")
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"{recipe.model.path or 'model.config'}: {_line(e)}") from None
    if config.vocab_size < vocab_size:
        raise InputError(f"model: vocab_size {config.vocab_size} is below the tokenizer's {vocab_size}")
    length = recipe.data.sequence_length
    if getattr(config, "max_position_embeddings", length) < length:
        raise InputError(f"data.sequence_length {length} is above the model's {config.max_position_embeddings} positions")
    return config


def check(recipe: Recipe, vocab_size: int) -> int:
    """Makes the recipe's model, and its adapter, on the meta device, where nothing is allocated.

    Returns the number of parameters, without the adapter's. Raises InputError where it cannot be made.
    """
    config = config_of(recipe, vocab_size)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, AssertionError) as e:
            raise InputError(f"{recipe.model.path or 'model.config'}: no decoder can be made of it: {_line(e)}") from None
        count = sum(p.numel() for p in model.parameters())
        if recipe.adapter is not None:
            with_adapter(model, recipe.adapter, recipe.seed)
    return count


def _line(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:300]


def build(recipe: Recipe, config: PreTrainedConfig, *, weights: bool) -> PreTrainedModel:
    """The recipe's model on the CPU, float32.

    Args:
        weights: False leaves the parameters unwritten (no memory is touched), for ranks that are sent theirs.
    """
    torch.manual_seed(recipe.seed)
    kwargs: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float32}
    if weights and recipe.model.path is not None:
        model = AutoModelForCausalLM.from_pretrained(
            storage.local(model_path(recipe.model.path)), local_files_only=True, trust_remote_code=False, **kwargs
        )
    else:
        with nullcontext() if weights else no_init_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **kwargs)
        model.tie_weights()
    return model


def with_adapter(model: PreTrainedModel, adapter: Adapter, seed: int) -> Any:
    """Puts LoRA layers into the model itself and freezes the rest; returns peft's wrapper, which saves and merges."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # the adapter's start does not hang on how the base came to be
    settings = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules, task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 for a field by its old name
        try:
            return get_peft_model(model, settings)
        except ValueError as e:
            raise InputError(f"adapter.target_modules: {_line(e)}") from None


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Of forward and backward: 6 a matrix parameter and 12 * layers * hidden * sequence for attention (arXiv 2204.02311,
    appendix B), the causal half not taken off."""
    config = model.config
    embeddings = {id(p) for p in embedding_parameters(model)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings)
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in embeddings:
        matrices += head.weight.numel()  # tied: a look-up below, a matrix above
    return 6.0 * matrices + 12.0 * config.num_hidden_layers * config.hidden_size * sequence_length
