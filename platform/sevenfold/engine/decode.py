"""Text generation: continues prompts.

Validation, evaluation, chat and the command line all use it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from sevenfold.data.chat_template import reply_end_tokens
from sevenfold.errors import InputError

TEMPERATURE = 0.8  # the default of interactive use


class Completion(NamedTuple):
    """What a model generated for one prompt.

    Attributes:
        text: The new text, without special tokens.
        ended: Whether an end token came before the limit of new tokens.
    """

    text: str
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: The maximum number of new tokens.
        temperature: 0 is greedy decoding. None: 0.8, or 0 with beam search.
        top_p: Samples from the most probable tokens whose probabilities add up to this.
        top_k: Samples from this number of most probable tokens; 0: from all.
        beams: The number of beams; 1: no beam search.
        seed: The seed of the sampling; the same seed gives the same text on the same machine.

    Raises:
        InputError: A value is out of its range.
    """

    max_new_tokens: int = 200
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 50
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges; errors name the options of the command line."""
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            (
                "temperature",
                self.temperature is None or 0 <= self.temperature < math.inf,
                "0 or more",
            ),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("beams", self.beams >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, below 2^63"),
        ):
            if not valid:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option}: expected {expected}, found {getattr(self, name)}")

    @property
    def effective_temperature(self) -> float:
        """The temperature that is used."""
        if self.temperature is not None:
            return self.temperature
        return TEMPERATURE if self.beams == 1 else 0.0


def end_tokens(
    config: PreTrainedConfig | GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Returns the ids that end a text.

    They are those that the config names, the tokenizer's own, and those with which its chat
    template ends a reply, such as <|im_end|>.
    """
    named = getattr(config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    ends = (*ids, tokenizer.eos_token_id, *reply_end_tokens(tokenizer))
    return sorted({int(i) for i in ends if i is not None})


def decoder_start(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that the decoder of an encoder-decoder starts with."""
    configs = (model.generation_config, model.config)
    ids = [getattr(config, "decoder_start_token_id", None) for config in configs]
    return int(next(i for i in (*ids, tokenizer.pad_token_id, 0) if i is not None))


def generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, plain: bool = False
) -> GenerationConfig:
    """Builds the settings of a generation.

    Args:
        model: The model, whose own end tokens are kept.
        tokenizer: Its tokenizer, whose end token ends a text too.
        sampling: How tokens are chosen.
        plain: Leaves out the model's other generation settings, such as a repetition penalty, so
            that metrics are computed from the model's unchanged probabilities. Otherwise they are
            kept.
    """
    do_sample = sampling.effective_temperature > 0
    model_settings = model.generation_config or model.config
    end_ids = end_tokens(model_settings, tokenizer)
    pad_id = tokenizer.pad_token_id
    if pad_id is None and end_ids:
        pad_id = end_ids[0]
    if plain:
        config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            forced_bos_token_id=getattr(model_settings, "forced_bos_token_id", None),
        )
    else:
        config = copy.deepcopy(model_settings)
    config.update(
        max_new_tokens=sampling.max_new_tokens,
        max_length=None,
        min_length=0,
        do_sample=do_sample,
        num_beams=sampling.beams,
        num_return_sequences=1,
        temperature=sampling.effective_temperature if do_sample else None,
        top_p=sampling.top_p if do_sample else None,
        top_k=sampling.top_k if do_sample else None,
        eos_token_id=end_ids or None,
        pad_token_id=pad_id,
    )
    if model.config.is_encoder_decoder:
        config.decoder_start_token_id = decoder_start(model, tokenizer)
    return config


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    batch_size: int = 32,
    synced_gpus: bool = False,
    on_text: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Continues each prompt until an end token or the limit of new tokens.

    Random draws continue from torch's state; seed it with `torch.manual_seed`.

    Args:
        model: A decoder, or an encoder-decoder, whose encoder reads the prompts.
        tokenizer: Its tokenizer.
        prompts: Token ids, one list per prompt.
        config: The settings, from `generation_config`.
        batch_size: Prompts per forward pass.
        synced_gpus: Required for a sharded model, where every rank must call this with the same
            number of prompts: no rank stops before the others.
        on_text: Receives the text of a single prompt piece by piece, never half a character. With
            beam search it receives the whole text at the end.
        stopped: Ends the generation as soon as it returns True.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    completions: list[Completion] = []
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i : i + batch_size]
        ids, mask, start = _padded(batch, config, model.config.is_encoder_decoder)
        streamer = (
            _TextStreamer(tokenizer, on_text)
            if on_text is not None and config.num_beams == 1
            else None
        )
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
        )[:, start:].cpu()
        ended = torch.isin(output, torch.tensor(config.eos_token_id or [])).any(1).tolist()
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        if on_text is not None and streamer is None:
            for text in texts:
                on_text(text)
        completions += map(Completion, texts, ended)
    model.train(training)
    return completions


def _padded(
    prompts: Sequence[list[int]], config: GenerationConfig, is_encoder_decoder: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pads prompts to one width: on the right for an encoder, on the left for a decoder.

    A decoder appends the new tokens on the right of the prompt.

    Returns:
        Ids and attention mask, int64 [prompts, width], and the index of the first new token in the
        output.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = 0 if is_encoder_decoder else width - len(prompt)
        columns = slice(start, start + len(prompt))
        ids[row, columns] = torch.tensor(prompt)
        mask[row, columns] = 1
    return ids, mask, 1 if is_encoder_decoder else width


class _TextStreamer(BaseStreamer):
    """Passes on text as it is generated.

    It decodes all tokens again each time: transformers' TextStreamer holds back words and loses
    spaces after a line break.

    Args:
        tokenizer: Decodes the tokens.
        on_text: Receives each new piece of text.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self.text = ""
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None  # None until `put` has received the prompt

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt in the first call, then each new token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._decode()
        if not text.endswith("\ufffd"):  # an incomplete UTF-8 character
            self._emit(text)

    def end(self) -> None:
        """Passes on the rest of the text."""
        self._emit(self._decode())

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids or [], skip_special_tokens=True)
        return text

    def _emit(self, text: str) -> None:
        piece = text[len(self.text) :]
        if piece:
            self.text += piece
            self._on_text(piece)


class _Stop(StoppingCriteria):
    """Ends all sequences as soon as a function returns True."""

    def __init__(self, stopped: Callable[[], bool]):
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full(
            (input_ids.shape[0],), self._stopped(), device=input_ids.device, dtype=torch.bool
        )
