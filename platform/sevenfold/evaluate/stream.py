"""Text that is shown as it is made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sevenfold.errors import InputError
from sevenfold.model.build import end_tokens
from sevenfold.model.load import Loaded

TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises InputError where a value is out of its range.

    Attributes:
        temperature: 0 takes the likeliest token. Default: 0.8; 0 where there are beams.
        top_p, top_k: draws from the likeliest tokens of so much probability together, of so many (0: all).
        beams: of beam search; more than one shows nothing before the end.
        seed: the same one gives the same text on the same machine.
    """

    max_new_tokens: int = 200
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 50
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature is None or 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("beams", self.beams >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, below 2^63"),
        ):
            if not good:
                raise InputError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(self, name)}")

    @property
    def warmth(self) -> float:
        return self.temperature if self.temperature is not None else TEMPERATURE if self.beams == 1 else 0.0


def room(loaded: Loaded, asked: int, new: int) -> int:
    """How many tokens can follow: at most `new`, and what the model's positions leave after `asked` of them.

    Raises InputError where they leave none.
    """
    if loaded.positions is None:
        return new
    if loaded.family == "encoder-decoder":
        limit, left = loaded.positions, min(new, loaded.positions - 1)  # each side has its own positions
    else:
        limit, left = loaded.positions - 1, min(new, loaded.positions - asked)
    if asked > limit:
        raise InputError(
            f"the prompt: expected at most {limit:,} tokens (the model has {loaded.positions:,} positions), found {asked:,}: "
            "shorten it"
        )
    return left


@torch.no_grad()
def produce(
    loaded: Loaded, ids: list[int], sampling: Sampling, show: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> str:
    """Continues a prompt, or answers an encoder-decoder's source, until an end token, max_new_tokens, the last position, or
    until `stopped()` is true after a token.

    Args:
        show: is given the text piece by piece, never half a character.

    Returns:
        The text, which is the pieces joined. Draws go on from torch's state: see Sampling.seed and `torch.manual_seed`.
    """
    model: Any = loaded.model
    streamer = _Shown(loaded.tokenizer, show)
    asked = torch.tensor([ids], device=loaded.device)
    made = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked),
        generation_config=settings(loaded, sampling, room(loaded, len(ids), sampling.max_new_tokens)),
        streamer=streamer if sampling.beams == 1 else None, stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
    )  # fmt: skip
    if sampling.beams > 1:
        streamer.put(asked.cpu())
        streamer.put(made[0, 1 if loaded.family == "encoder-decoder" else len(ids) :].cpu())
        streamer.end()
    return streamer.text


def settings(loaded: Loaded, sampling: Sampling, new: int) -> GenerationConfig:
    """The model's own, with all its end tokens and the tokenizer's, but for how tokens are chosen."""
    config = copy.deepcopy(loaded.model.generation_config)
    draws, words = sampling.warmth > 0, loaded.tokenizer
    ends = end_tokens(config, words)
    config.update(
        max_new_tokens=new, max_length=None, min_length=0, do_sample=draws, num_beams=sampling.beams, num_return_sequences=1,
        temperature=sampling.warmth if draws else None, top_p=sampling.top_p if draws else None,
        top_k=sampling.top_k if draws else None, eos_token_id=ends or None,
        pad_token_id=words.pad_token_id if words.pad_token_id is not None else ends[0] if ends else None,
    )  # fmt: skip
    if loaded.family == "encoder-decoder":
        config.decoder_start_token_id = loaded.start
    return config


class _Shown(BaseStreamer):
    """Decodes from the beginning each time: transformers' TextStreamer holds back words, and loses spaces after a line."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        self.text = ""
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] | None = None  # None until the prompt, which comes first, is past

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        made = self._decoded()
        if not made.endswith("\ufffd"):  # half a character
            self._more(made)

    def end(self) -> None:
        self._more(self._decoded())

    def _decoded(self) -> str:
        made: str = self._tokenizer.decode(self._ids or [], skip_special_tokens=True)
        return made

    def _more(self, made: str) -> None:
        piece = made[len(self.text) :]
        if piece:
            self.text += piece
            self._show(piece)


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device, dtype=torch.bool)
