r"""Splits text into words, tokens and sentences, in any script.

It uses `regex` and not `re`, whose `\w` splits Hindi and Thai words at their vowel signs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import regex

from sevenfold.recipe.bleu import has_modules

# Scripts that are written without spaces between words.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# Words of Korean, and characters of the scripts without spaces.
_SCRIPTS = {
    "Hangul": regex.compile(r"\p{Hangul}+"),
    "Han": regex.compile(r"\p{Han}"),
    "kana": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "other": regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"),
}
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]"
_WORD = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|{_LETTER}+")
_TOKEN = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|{_LETTER}+(?:['\u2019\-]{_LETTER}+)*|[^\s]")
_CLOSING = r"""['"\p{Pe}\p{Pf}]"""  # quotation marks and brackets that may follow a full stop
_WIDE_STOP = r"[\u3002\uff01\uff1f]"  # sentence ends of Chinese and Japanese; no space follows them
_ABBREVIATIONS = "Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Gen|Sen|Gov|Lt|Col|Capt|vs|cf|e\\.g|i\\.e"
_SENTENCE_END = regex.compile(
    rf"(?<=[\p{{STerm}}…]{_CLOSING}*)(?<!\b(?:{_ABBREVIATIONS}|\p{{Lu}})\.)\s+(?!\p{{Ll}})"
    rf"|(?<={_WIDE_STOP}{_CLOSING}*)(?!{_WIDE_STOP}|{_CLOSING})\s*"
    r"|\s*\n\s*\n\s*"
)


def bleu_tokenizer(references: Iterable[str]) -> str:
    """Returns sacrebleu's name of the BLEU tokenizer for the script of the references.

    It is that of a script with at least a quarter of the words, where each character of a script
    without spaces is a word: `zh` for Chinese, `ja-mecab` for Japanese (kana are a fifth of its
    characters or more), `ko-mecab` for Korean, `char` for other scripts without spaces; and `13a`
    for all others. Without the packages of MeCab (`pip install 'sevenfold[mecab]'`), Japanese and
    Korean are scored by characters.
    """
    count = dict.fromkeys(_SCRIPTS, 0)
    total = 0
    for text in references:
        total += len(words(text))
        for script, pattern in _SCRIPTS.items():
            count[script] += len(pattern.findall(text))
    enough = max(1, total / 4)
    if count["Hangul"] >= enough:
        return "ko-mecab" if has_modules("ko-mecab") else "char"
    chinese_characters = count["Han"] + count["kana"]
    if chinese_characters >= enough:
        if count["kana"] < chinese_characters / 5:
            return "zh"
        return "ja-mecab" if has_modules("ja-mecab") else "char"
    return "char" if count["other"] >= enough else "13a"


def words(text: str) -> list[str]:
    """Returns the runs of letters and digits, in lower case and in the normal form NFKC.

    In scripts without spaces between words each character is a word. NFKC makes full-width and
    half-width letters equal, and ligatures equal to their letters.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def tokens(text: str) -> list[str]:
    """Returns the words, in their own case, and each other character that is not white space.

    Words joined by a hyphen or an apostrophe are one token.
    """
    return _TOKEN.findall(text)


def lead(text: str, sentences: int = 3) -> str:
    """Returns the first sentences of a text, with each run of white space as one space.

    A sentence ends at a full stop, exclamation mark or question mark of any script, where white
    space follows and then no lower-case letter. Full stops after titles, common abbreviations and
    initials do not count; Chinese and Japanese stops need no white space. An empty line also
    ends a sentence.
    """
    text = text.strip()
    ends = [m.start() for m, _ in zip(_SENTENCE_END.finditer(text), range(sentences), strict=False)]
    return " ".join(text[: ends[-1] if len(ends) == sentences else None].split())
