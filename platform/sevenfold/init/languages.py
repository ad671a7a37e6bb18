"""Guesses the languages of columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

MIN_LETTERS = 20  # in a shorter text, a guess is wrong too often
MAX_TEXTS = 200  # of a column, for which the language is guessed
MAX_CHARACTERS = 1_000  # of a text that are looked at
_SHARE = 0.1  # languages of fewer texts are not shown: most of them are wrong guesses


def languages(values: Iterable[Any]) -> str:
    """Returns the languages of a column's texts, such as "en" or "de 60%, en 38%".

    Args:
        values: The values of the column; of a conversation, the texts in it.

    Returns:
        Codes of ISO 639-1, the most common first; "" if no text is long enough.
    """
    from py3langid import classify

    found: Counter[str] = Counter()
    for value in values:
        text = " ".join(_texts(value))[:MAX_CHARACTERS]
        if sum(map(str.isalpha, text)) < MIN_LETTERS and not _is_dense(text):
            continue
        found[classify(text)[0]] += 1
        if found.total() == MAX_TEXTS:
            break
    common = [(name, n / found.total()) for name, n in found.most_common(3)]
    shown = [(name, share) for name, share in common if share >= _SHARE]
    if len(shown) == 1:
        return shown[0][0]
    return ", ".join(f"{name} {share:.0%}" for name, share in shown)


def _is_dense(text: str) -> bool:
    """Returns whether a short text is in a script of which one character is a syllable or word."""
    return sum("\u3040" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7a3" for c in text) >= 6


def _texts(value: Any) -> Iterable[str]:
    """Yields the texts of a value; of messages, not the names of their roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("role", "from"):
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
