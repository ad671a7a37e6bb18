"""Words and ends of sentences in any script. `regex` and not `re`, whose \\w breaks Hindi and Thai at their vowel signs."""

from __future__ import annotations

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # written without spaces between words
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]"
_WORD = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|{_LETTER}+")
_TOKEN = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|{_LETTER}+(?:['\u2019\-]{_LETTER}+)*|[^\s]")
_CLOSER = r"""['"\p{Pe}\p{Pf}]"""
_WIDE = r"[\u3002\uff01\uff1f]"  # the stops of Chinese and Japanese, which no space follows
_TITLES = "Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Gen|Sen|Gov|Lt|Col|Capt|vs|cf|e\\.g|i\\.e"
SENTENCE_END = regex.compile(
    rf"(?<=[\p{{STerm}}…]{_CLOSER}*)(?<!\b(?:{_TITLES}|\p{{Lu}})\.)\s+(?!\p{{Ll}})"
    rf"|(?<={_WIDE}{_CLOSER}*)(?!{_WIDE}|{_CLOSER})\s*"
    r"|\s*\n\s*\n\s*"
)


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; one character at a time in scripts without spaces."""
    return _WORD.findall(text.lower())


def tokens(text: str) -> list[str]:
    """Words as they are written, with what a hyphen or an apostrophe joins, and each other sign on its own."""
    return _TOKEN.findall(text)


def lead(text: str, sentences: int = 3) -> str:
    """The first sentences of a text, white space squeezed.

    A sentence ends at a full stop, exclamation or question mark of any script before white space and no small letter, but for
    titles and initials; and at an empty line.
    """
    text = text.strip()
    ends = [m.start() for m, _ in zip(SENTENCE_END.finditer(text), range(sentences), strict=False)]
    return " ".join(text[: ends[-1] if len(ends) == sentences else None].split())
