"""A finished model to be used: weights, tokenizer, and what they say about themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
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

from sevenfold import storage
from sevenfold.data.encode import TextEncoder
from sevenfold.data.tokens import load_tokenizer
from sevenfold.errors import InputError
from sevenfold.model.build import Family, family, model_path

_CLASSES: dict[Family, Any] = {
    "decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, "encoder-decoder": AutoModelForSeq2SeqLM,
}  # fmt: skip
_UNSET = 10**9  # tokenizers without a limit tell an astronomic one


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, with frozen weights, on the GPU where there is one.

    Attributes:
        path: as it was found, for messages.
        encoder: how documents are framed: `head` text `tail`.
        positions: the most tokens that it reads at once; None where nothing limits them (T5's are relative).
    """

    path: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    family: Family
    encoder: TextEncoder
    positions: int | None

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def start(self) -> int:
        """With which the decoder of an encoder-decoder begins."""
        told = (self.model.generation_config, self.model.config)
        found = [getattr(t, "decoder_start_token_id", None) for t in told] + [self.tokenizer.pad_token_id, 0]
        return int(next(i for i in found if i is not None))

    def framed(self, text: str, *, tail: bool) -> list[int]:
        """Ids of the encoder's head, the text and, where asked, the encoder's tail."""
        head, end = self.encoder.head, self.encoder.tail if tail else None
        return [*([] if head is None else [head]), *self.encoder.ids([text])[0], *([] if end is None else [end])]


def load(path: str, *, head: bool = True, attention: str | None = None) -> Loaded:
    """The model of a run of ours, or of any Hugging Face directory: float32 on a CPU, as it was stored on a GPU.

    Args:
        head: False leaves out the output layer: hidden states are asked for.
        attention: transformers' attn_implementation; default: its own choice.

    Raises:
        InputError: no model there, one of another kind or of code of its own, weights that are missing.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    at = model_path(path)
    folder = storage.local(at)
    cuda = torch.cuda.is_available()
    kwargs: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **kwargs)
        kind = family(config)
        model, info = (_CLASSES[kind] if head else AutoModel).from_pretrained(
            folder, dtype="auto" if cuda else torch.float32, output_loading_info=True,
            **({"attn_implementation": attention} if attention else {}), **kwargs,
        )  # fmt: skip
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"{at}: expected a language model in transformers' form: {' '.join(str(e).split())[:300]}") from None
    if missing := sorted(k for k in info["missing_keys"] if "pooler" not in k):
        what = "the weights of a language model" if head else "all weights"
        raise InputError(f"{at}: expected {what}, found none for {missing[0]}: it was trained for something else")
    tokenizer = load_tokenizer(at)
    model.eval().requires_grad_(False).to("cuda" if cuda else "cpu")
    return Loaded(at, model, tokenizer, kind, TextEncoder(tokenizer, 1), positions(config, tokenizer))


def positions(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The smaller of what model and tokenizer say: RoBERTa has two position embeddings that no token may use."""
    told = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [int(t) for t in told if t is not None and 0 < t < _UNSET]
    return min(known) if known else None
