"""Models by transformers' own configs and classes. A model never knows that it is sharded."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from sevenfold import storage
from sevenfold.engine.optim import embedding_parameters
from sevenfold.errors import InputError
from sevenfold.model import attention as in_chunks
from sevenfold.model.parallel import tensor_plan
from sevenfold.recipe import Recipe

Family = Literal["decoder", "encoder", "encoder-decoder"]
_NAMED: dict[Family, str] = {"decoder": "a decoder", "encoder": "an encoder", "encoder-decoder": "an encoder-decoder"}
CLASSES: dict[str, Any] = {  # by objective; the family's name for errors
    "causal": (AutoModelForCausalLM, "decoder"),
    "sft": (AutoModelForCausalLM, "decoder"),
    "masked": (AutoModelForMaskedLM, "encoder"),
    "denoise": (AutoModelForSeq2SeqLM, "encoder-decoder"),
    "dpo": (AutoModelForCausalLM, "decoder"),
    "classify": (AutoModelForSequenceClassification, "classifier"),
    "seq2seq": (AutoModelForSeq2SeqLM, "encoder-decoder"),
    "embed": (AutoModel, "encoder"),
}
TASKS = {"classify": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM", "embed": "FEATURE_EXTRACTION"}  # peft's; else CAUSAL_LM


def model_path(path: str) -> str:
    """Where the model of a path lies: a run of ours keeps it in its folder `model`."""
    at = storage.locate(path)
    inner = storage.RunFolder(at).model
    if storage.exists(storage.join(inner, "config.json")):
        return inner
    if storage.exists(storage.join(at, "config.json")):
        return at
    raise InputError(f"{at}: expected a run or a Hugging Face directory (config.json), found none")


def config_of(recipe: Recipe, vocab_size: int, tokenizer: Any = None) -> PreTrainedConfig:
    """The transformers config of the recipe's model; a new one knows the tokenizer's special tokens where it is given.

    Raises:
        InputError: an unknown model type or field, a vocabulary or context that is too small for the data.
    """
    try:
        if recipe.model.path is not None:
            folder = storage.local(model_path(recipe.model.path))
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=recipe.model.trust_remote_code)
        else:
            config = _new(recipe.model.config or {}, vocab_size, recipe.data.sequence_length)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id") if tokenizer is not None else ():
                setattr(config, name, getattr(tokenizer, name))
            if tokenizer is not None and config.is_encoder_decoder:
                config.decoder_start_token_id = config.pad_token_id
        if recipe.objective == "classify":
            _with_classes(config, recipe.data.classes, tokenizer)
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError) as e:
        if "trust_remote_code" in str(e):
            raise InputError(
                f"{recipe.model.path}: the model brings Python code of its own: read it, then set model.trust_remote_code=true"
            ) from None
        raise InputError(f"{recipe.model.path or 'model.config'}: {_line(e)}") from None
    if recipe.train.dropout is not None:
        names = dropouts(config)
        if not names:
            raise InputError(f"train.dropout: {config.model_type} has no dropout: leave it out, or choose another family")
        for name in names:
            setattr(config, name, recipe.train.dropout)
    if config.vocab_size < vocab_size:
        raise InputError(f"model: vocab_size {config.vocab_size} is below the tokenizer's {vocab_size}")
    length = recipe.data.sequence_length
    if getattr(config, "max_position_embeddings", length) < length:
        raise InputError(f"data.sequence_length {length} is above the model's {config.max_position_embeddings} positions")
    return config


def _with_classes(config: PreTrainedConfig, classes: list[str], tokenizer: Any) -> None:
    config.num_labels = len(classes)
    config.id2label, config.label2id = dict(enumerate(classes)), {c: i for i, c in enumerate(classes)}
    if tokenizer is not None and config.pad_token_id is None:  # a decoder finds the last token of a text by it
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def family(config: PreTrainedConfig) -> Family:
    """By what the config says of itself and the class that was saved: BERT's could be an encoder's or a decoder's."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    decodes = getattr(config, "is_decoder", False) or re.search("CausalLM|LMHead", " ".join(config.architectures or []))
    return "encoder" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes else "decoder"


def dropouts(config: PreTrainedConfig) -> list[str]:
    """The config's fields that are the probability of a dropout (None: as another field says). Layerdrop is none."""
    named = {k: v for k, v in config.to_dict().items() if re.search("dropout|pdrop", k)}
    return [k for k, v in named.items() if v is None or (type(v) in (int, float) and 0 <= v < 1)]


def _new(fields: dict[str, Any], vocab_size: int, length: int) -> PreTrainedConfig:
    known = AutoConfig.for_model(fields["model_type"]).to_dict().keys()
    if unknown := fields.keys() - known:
        raise InputError(f"model.config: {fields['model_type']} has no field {sorted(unknown)[0]!r}")
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": length, "n_positions": length}
    return AutoConfig.for_model(**({k: v for k, v in sizes.items() if k in known} | fields))


def check(recipe: Recipe, vocab_size: int) -> int:
    """Makes the recipe's model, and its adapter, on the meta device, where nothing is allocated.

    Returns the number of parameters, without the adapter's. Raises InputError where it cannot be made.
    """
    config = config_of(recipe, vocab_size)
    made, wanted = CLASSES[recipe.objective]
    fits: Iterable[Family] = {"classify": _NAMED, "embed": ("encoder", "decoder")}.get(recipe.objective, (wanted,))
    if (found := family(config)) not in fits and not recipe.model.trust_remote_code:  # whose kind is not known
        raise InputError(
            f"objective {recipe.objective}: expected {' or '.join(_NAMED[f] for f in fits)}, found {_NAMED[found]} "
            f"({config.model_type}): choose another model or objective"
        )
    if recipe.train.loss_chunk and getattr(config, "final_logit_softcapping", None):
        raise InputError("train.loss_chunk: this model bends its logits (final_logit_softcapping): leave loss_chunk out")
    if recipe.model.attention == "flex_attention" and _drops_attention(config):
        raise InputError("model.attention flex_attention: it has no dropout, and this model asks for it: choose auto")
    with torch.device("meta"):
        try:
            model = made.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        except (ValueError, KeyError, TypeError, AssertionError) as e:
            raise InputError(f"{recipe.model.path or 'model.config'}: no {wanted} can be made of it: {_line(e)}") from None
        count = sum(p.numel() for p in model.parameters())
        if recipe.adapter is not None:
            with_adapter(model, recipe)
    if recipe.parallel.tensor > 1:
        tensor_plan(model, recipe.parallel.tensor)
    return count


def _line(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:300]


def _drops_attention(config: PreTrainedConfig) -> bool:
    return any(getattr(config, name) for name in dropouts(config) if "att" in name)


def attention(recipe: Recipe, device: torch.device, config: PreTrainedConfig) -> str:
    """The kernel that keeps packed documents apart at the least cost. FlexAttention is not for attention with dropout (it has
    none), in chunks neither for compiled blocks (its slices hang on the mask) nor for T5 (whose masks are biases)."""
    if recipe.model.attention != "auto":
        return recipe.model.attention
    family = CLASSES[recipe.objective][1]
    if recipe.objective in ("classify", "embed"):
        return "sdpa"  # its rows are padded documents, not packed ones
    if device.type == "cuda":
        return "flex_attention" if family == "decoder" and not _drops_attention(config) else "sdpa"
    return "sdpa" if family == "encoder-decoder" or recipe.train.compile else in_chunks.NAME


def build(recipe: Recipe, config: PreTrainedConfig, *, weights: bool, attention: str = "sdpa") -> PreTrainedModel:
    """The recipe's model on the CPU, float32.

    Args:
        attention: as transformers' attn_implementation, or what `attention` chose.
        weights: False leaves the parameters unwritten (no memory is touched), for ranks that are sent theirs.
    """
    torch.manual_seed(recipe.seed)
    made: Any = CLASSES[recipe.objective][0]
    kwargs: dict[str, Any] = {
        "attn_implementation": "sdpa" if attention == in_chunks.NAME else attention,
        "dtype": torch.float32,
        "trust_remote_code": recipe.model.trust_remote_code,
    }
    model: PreTrainedModel
    if weights and recipe.model.path is not None:
        folder = storage.local(model_path(recipe.model.path))
        with _quiet():  # a base has no head of these classes
            model = made.from_pretrained(
                folder, config=config, local_files_only=True, ignore_mismatched_sizes=recipe.objective == "classify", **kwargs
            )
    else:
        with nullcontext() if weights else no_init_weights():
            model = made.from_config(config, **kwargs)
        model.tie_weights()
    if model.can_generate():
        model.generation_config = _generation(recipe, config)
    if attention == in_chunks.NAME and model._can_set_attn_implementation():  # else its code calls sdpa itself
        model.set_attn_implementation(attention)
    return model


def _generation(recipe: Recipe, config: PreTrainedConfig) -> GenerationConfig:
    """The base's own, whose end tokens may be several, on every rank."""
    if recipe.model.path is not None:
        with contextlib.suppress(OSError):  # not every model has one
            folder = storage.local(model_path(recipe.model.path))
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def end_tokens(config: PreTrainedConfig | GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a text: the ids that the config names, and the tokenizer's."""
    told = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return sorted({int(i) for i in (*told, tokenizer.eos_token_id) if i is not None})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def with_adapter(model: PreTrainedModel, recipe: Recipe) -> Any:
    """Puts LoRA layers into the model itself and freezes the rest; returns peft's wrapper, which saves and merges."""
    from peft import LoraConfig, get_peft_model

    adapter = recipe.adapter
    assert adapter is not None
    torch.manual_seed(recipe.seed)  # the adapter's start does not hang on how the base came to be
    whole = _head(model) if recipe.objective == "classify" else {}
    settings = LoraConfig(
        modules_to_save=list(whole) or None, exclude_modules=[linear for inner in whole.values() for linear in inner] or None,
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules, task_type=TASKS.get(recipe.objective, "CAUSAL_LM"), use_dora=adapter.dora,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 for a field by its old name
        try:
            return get_peft_model(model, settings)
        except (ValueError, TypeError, re.error) as e:
            raise InputError(f"adapter.target_modules: {_line(e)}") from None


def _head(model: PreTrainedModel) -> dict[str, list[str]]:
    """The modules of a classifier that its base may not have brought, so that they are trained in full; and the linear layers
    in each."""
    children = {n for n, m in model.named_children() if n != model.base_model_prefix and any(True for _ in m.parameters())}
    names = [n for n, _ in model.named_modules() if n in children or n.endswith(".pooler")]
    return {
        name: [f"{name}.{n}".rstrip(".") for n, m in model.get_submodule(name).named_modules() if isinstance(m, nn.Linear)]
        for name in names
    }


def flops_per_token(model: PreTrainedModel, recipe: Recipe) -> float:
    """Of forward and backward, a token of text: 6 a matrix parameter and 12 * layers * hidden * sequence for attention (arXiv
    2204.02311, appendix B), the causal half not taken off. Of an encoder-decoder each side counts by what it reads."""
    config, length = model.config, recipe.data.sequence_length
    embeddings = {id(p) for p in embedding_parameters(model)}

    def side(module: nn.Module, layers: int, share: float) -> float:
        matrices = sum(p.numel() for p in module.parameters() if p.ndim >= 2 and id(p) not in embeddings)
        return share * (6.0 * matrices + 12.0 * layers * config.hidden_size * length * share)

    head: Any = model.get_output_embeddings()
    tied = head.weight.numel() if head is not None and id(head.weight) in embeddings else 0  # a matrix above, a look-up below
    if not config.is_encoder_decoder:
        return side(model, config.num_hidden_layers, 1.0) + 6.0 * tied
    rate, spans = recipe.corruption.rate, recipe.corruption.rate / recipe.corruption.mean_span
    if recipe.objective == "seq2seq":
        rate, spans = 0.5, 0.0  # as if sources and targets were of a length
    asked = rate + spans
    out = 6.0 * head.weight.numel() * asked
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    encoder, decoder = model.get_submodule("encoder"), model.get_submodule("decoder")
    return out + side(encoder, config.num_hidden_layers, 1 - rate + spans) + side(decoder, layers, asked)
