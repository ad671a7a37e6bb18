"""Writes a model as a Hugging Face directory."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

from sevenfold.engine.decode import end_tokens
from sevenfold.errors import first_line
from sevenfold.model.config import family
from sevenfold.report.console import say


def write_directory(model: Any, tokenizer: Any, folder: str, shard: int) -> None:
    """Writes weights, configs and tokenizer; files of the same names are replaced.

    Args:
        model: The model.
        tokenizer: Its tokenizer. None: only the model is written.
        folder: An existing local folder.
        shard: The largest size of a file of weights in bytes; a larger tensor gets a file of its
            own.
    """
    if model.can_generate():
        _mend_generation_config(model)
    if tokenizer is not None:
        _set_special_tokens(model, tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Attempting to save a model with offloaded modules"
        )
        model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def merged(adapted: Any) -> tuple[Any, float]:
    """Merges an adapter into its model.

    Args:
        adapted: peft's wrapper of the model.

    Returns:
        The model without peft's layers; and by how much its output differs from that with the
        adapter, relative to the largest output. Sums in another order differ by about 1e-6.
    """
    adapted.eval()
    config = adapted.config
    ids = torch.arange(16)[None] % config.vocab_size
    if type(getattr(config, "eos_token_id", None)) is int:
        ids[0, -1] = config.eos_token_id  # where BART's classifier reads
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if getattr(config, "pad_token_id", None) is not None:
        # one of the ids may be the pad token; it must not be masked
        inputs["attention_mask"] = torch.ones_like(ids)
    expected = adapted(**inputs)[0]
    model = adapted.merge_and_unload()
    difference = float((model(**inputs)[0] - expected).abs().max() / expected.abs().max())
    return model, difference


def _mend_generation_config(model: Any) -> None:
    """Changes settings of a base model's generation config that transformers would not save.

    Vicuna's and Llama 2's have a temperature although do_sample is not set.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return
    except ValueError as e:
        reason = first_line(e)
    if config.temperature == 0:  # greedy
        config.do_sample, config.temperature = False, None
    else:
        config.do_sample = True
    try:
        config.validate(strict=True)
        say(f"generation_config.json of the base model: do_sample={config.do_sample} ({reason})")
    except ValueError as e:
        model.generation_config = GenerationConfig.from_model_config(model.config)
        say(f"generation_config.json of the base model is left out: {first_line(e)}")


def _set_special_tokens(model: Any, tokenizer: Any) -> None:
    """Sets the tokenizer's BOS, PAD and EOS in the model's configs.

    A model keeps a PAD of its own: RoBERTa, XGLM and others compute positions from it. A decoder
    that classifies gets the tokenizer's, which it looks for to find the last token of a text.
    """
    seeks_pad = family(model.config) == "decoder" and not model.can_generate()
    configs = [model.config]
    if model.can_generate():
        configs.append(model.generation_config)
    for config in configs:
        for field in ("bos_token_id", "pad_token_id"):
            is_kept = field == "pad_token_id" and not seeks_pad
            if is_kept and getattr(config, field, None) is not None:
                continue
            if getattr(tokenizer, field) is not None:
                setattr(config, field, getattr(tokenizer, field))
        ends = end_tokens(config, tokenizer)
        try:
            config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
        except StrictDataclassError:  # some models' configs take one only; generation's takes all
            config.eos_token_id = tokenizer.eos_token_id
