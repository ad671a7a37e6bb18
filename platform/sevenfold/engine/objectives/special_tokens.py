"""The token ids of a tokenizer that objectives need."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from sevenfold.data.encode import eos_id
from sevenfold.data.tokenizer import SENTINELS
from sevenfold.errors import InputError


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids of a tokenizer that objectives need.

    Attributes:
        vocab_size: The number of tokens.
        special: The tokens that are never masked or removed.
        mask: The mask token.
        sentinels: The tokens that stand for removed spans, in their order.
        pad: The padding token.
        end: The token that ends a text.
        start: The token that a decoder starts with.
    """

    vocab_size: int
    special: tuple[int, ...] = ()
    mask: int | None = None
    sentinels: tuple[int, ...] = ()
    pad: int = 0
    end: int | None = None
    start: int = 0

    @staticmethod
    def from_tokenizer(tokenizer: Any, objective: str, start: int | None = None) -> SpecialTokens:
        """Reads the ids from a tokenizer.

        Args:
            tokenizer: The tokenizer.
            objective: The name of the objective that needs them.
            start: The token that a decoder starts with. Default: the padding token.

        Raises:
            InputError: The tokenizer lacks a token that the objective needs.
        """
        vocabulary = tokenizer.get_vocab()
        ids = map(vocabulary.get, SENTINELS)
        sentinels = tuple(itertools.takewhile(lambda i: i is not None, ids))
        if objective == "masked" and tokenizer.mask_token_id is None:
            raise InputError(
                "objective masked: expected a tokenizer with a mask token, found none: "
                "set its mask_token, or train a new tokenizer"
            )
        if objective == "denoise" and not sentinels:
            raise InputError(
                "objective denoise: expected a tokenizer with sentinel tokens "
                f"({SENTINELS[0]}, ...), found none: add them, or train a new tokenizer"
            )
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return SpecialTokens(
            vocab_size=len(tokenizer),
            special=tuple(sorted({*tokenizer.all_special_ids, *sentinels})),
            mask=tokenizer.mask_token_id,
            sentinels=sentinels,
            pad=pad,
            end=eos_id(tokenizer),
            start=pad if start is None else start,
        )
