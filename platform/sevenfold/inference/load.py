"""Loads finished models for inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sevenfold.data.encode import TextEncoder
from sevenfold.data.pair_frames import source_frame
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.errors import InputError, RunError
from sevenfold.model.build import Family, family, local_model, model_path
from sevenfold.model.config import check_values

_CLASSES: dict[Family, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}
_UNLIMITED = 10**9  # tokenizers without a limit have a model_max_length above this


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, with frozen weights, on the GPU if there is one.

    Attributes:
        path: Where the model was found, for messages.
        model: The transformers model.
        tokenizer: Its tokenizer.
        family: Whether it is a decoder, an encoder or an encoder-decoder.
        encoder: Frames documents as in training: `head` text `tail`.
        positions: The maximum number of tokens of an input; None if there is no limit, as for T5,
            whose positions are relative.
    """

    path: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    family: Family
    encoder: TextEncoder
    positions: int | None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def framed(self, text: str, *, tail: bool) -> list[int]:
        """Returns the ids of a text after the encoder's `head`, and before its `tail` if asked.

        An encoder-decoder's source is framed as its tokenizer does.
        """
        if self.family == "encoder-decoder":
            return source_frame(self.tokenizer).around(self.encoder.ids([text])[0])
        head, end = self.encoder.head, self.encoder.tail if tail else None
        return [
            *([] if head is None else [head]),
            *self.encoder.ids([text])[0],
            *([] if end is None else [end]),
        ]


def load(path: str, *, head: bool = True, attention: str | None = None) -> Loaded:
    """Loads the model of a run or of a Hugging Face directory.

    The weights are float32 on a CPU, and in the stored dtype on a GPU.

    Args:
        path: A run's folder or a Hugging Face directory.
        head: Whether the model has its output layer. False: it returns hidden states.
        attention: transformers' attn_implementation. None: transformers' own choice.

    Raises:
        InputError: There is no model, it is not a language model, it needs custom code, or weights
            are missing.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    location = model_path(path)
    folder = local_model(path)
    has_gpu = torch.cuda.is_available()
    kwargs: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **kwargs)
        check_values(config, f"{location}/config.json")
        model_family = family(config)
        model_class = _CLASSES[model_family] if head else AutoModel
        model, info = model_class.from_pretrained(
            folder,
            dtype="auto" if has_gpu else torch.float32,
            output_loading_info=True,
            **({"attn_implementation": attention} if attention else {}),
            **kwargs,
        )
    except (InputError, RunError):
        raise
    except Exception as e:  # a model's own code raises anything for values it does not expect
        reason = " ".join(str(e).split())[:300]
        if "ignore_mismatched_sizes" in reason:
            reason = "the weights have other shapes than config.json says"
        raise InputError(
            f"{location}: expected a language model that transformers can load: {reason}"
        ) from None
    # A pooler is not needed: neither hidden states nor predictions of tokens use it.
    if missing := sorted(k for k in info["missing_keys"] if "pooler" not in k):
        expected = "the weights of a language model" if head else "all weights"
        raise InputError(
            f"{location}: expected {expected}, found none for {missing[0]}: "
            "the model was trained for another task"
        )
    tokenizer = load_tokenizer(folder)
    model.eval().requires_grad_(False).to("cuda" if has_gpu else "cpu")
    return Loaded(
        location,
        model,
        tokenizer,
        model_family,
        TextEncoder(tokenizer, 1),
        _max_tokens(config, tokenizer),
    )


def _max_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the maximum number of tokens of an input; None if there is no limit.

    It is the smaller of the model's and the tokenizer's limit, since RoBERTa's model has two
    position embeddings that no token may use.
    """
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    valid = [int(n) for n in limits if n is not None and 0 < n < _UNLIMITED]
    return min(valid) if valid else None
