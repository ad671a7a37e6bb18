"""Encodes texts in which special tokens are written out, and text that only looks like them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

from sevenfold.data.chat_layout import Span

_PRIVATE_USE = 0xF0000  # the first of 65,534 characters that no text contains


class SpecialTokenEncoder:
    """Encodes texts whose special tokens are written out, as chat templates write them.

    Args:
        serialized: The tokenizer's JSON.

    Attributes:
        special: Matches the special tokens.
        end: Matches the tokens that can end a text: all added ones that are not just spaces, of
            which tokenizers like that of GPT-NeoX have many.
    """

    def __init__(self, serialized: str):
        self._serialized = serialized
        added = json.loads(serialized)["added_tokens"]
        self._names = [token["content"] for token in added if token["special"]]
        self.special = any_of(self._names)
        self.end = any_of([t["content"] for t in added if t["content"].strip()])

    def id_of(self, token: str) -> int:
        """Returns the id of a token."""
        return int(_tokenizer(self._serialized).token_to_id(token))

    def encode(self, text: str, contents: Sequence[Span]) -> Any:
        """Encodes a rendered text; special tokens' spellings within `contents` stay text."""
        if not any(self.special.search(text, *span) for span in contents):
            return _tokenizer(self._serialized).encode(text, add_special_tokens=False)
        # A tokenizer that knows the special tokens by other names, of the same length. Only the
        # template's tokens are renamed in the text.
        names = {token: chr(_PRIVATE_USE + i) * len(token) for i, token in enumerate(self._names)}
        renamed, position = [], 0
        for gap in [*contents, Span(len(text), len(text))]:
            fixed = text[position : gap.start]
            renamed.append(self.special.sub(lambda m: names[m[0]], fixed))
            renamed.append(text[gap.start : gap.stop])
            position = gap.stop
        backend = _renamed_tokenizer(self._serialized, tuple(names.items()))
        return backend.encode("".join(renamed), add_special_tokens=False)


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern for any of these texts, the longest first; without texts for nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if texts else r"(?!)")


@functools.lru_cache(maxsize=4)
def _tokenizer(serialized: str) -> Any:
    """Returns a tokenizer that encodes the spelling of a special token as that token."""
    tree = json.loads(serialized)
    tree["post_processor"] = None  # it adds BOS, and may cut spaces from the offsets
    tree["truncation"] = tree["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


@functools.lru_cache(maxsize=4)
def _renamed_tokenizer(serialized: str, names: tuple[tuple[str, str], ...]) -> Any:
    """Returns the tokenizer with other names for its special tokens, which keep their ids."""
    tree, alias = json.loads(_tokenizer(serialized).to_str()), dict(names)
    for token in tree["added_tokens"]:
        token["content"] = alias.get(token["content"], token["content"])
    vocabulary = tree["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tree["model"]["vocab"] = {alias.get(k, k): v for k, v in vocabulary.items()}
    else:  # Unigram: pairs of token and score
        tree["model"]["vocab"] = [[alias.get(token, token), x] for token, x in vocabulary]
    unknown = tree["model"].get("unk_token")
    if unknown in alias:
        tree["model"]["unk_token"] = alias[unknown]
    return tokenizers.Tokenizer.from_str(json.dumps(tree))
