"""Finds personal data in texts by patterns and check digits. Reports show it only masked."""

from __future__ import annotations

from collections.abc import Iterator

import regex

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
# Characters of words in scripts that separate words by spaces. Others, such as Chinese characters,
# Hangul with its endings, or Thai, touch what comes before and after them.
_W = r"\p{Latin}\p{Cyrillic}\p{Greek}0-9_"
# Every quantifier has an upper bound, and no match is tried from within a word. So the time is
# linear in the length of the text.
_PATTERNS: dict[str, regex.Pattern[str]] = {
    "e-mail": regex.compile(
        rf"(?<![{_W}.%+-])[{_W}.%+-]{{1,64}}@(?:[A-Za-z0-9-]{{1,63}}\.){{1,8}}[A-Za-z]{{2,24}}(?![{_W}-])"
    ),
    "credit card": regex.compile(
        rf"(?<![{_W}.-])(?:[2-6][0-9]{{12,18}}"
        r"|[2-6][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{3})?"
        rf"|3[0-9]{{3}}([ -])[0-9]{{6}}\2[0-9]{{5}})(?![{_W}-])"
    ),
    "IBAN": regex.compile(
        r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
    ),
    "IPv4": regex.compile(rf"(?<![{_W}.])(?:{_OCTET}\.){{3}}{_OCTET}(?![{_W}]|\.[0-9])"),
    "phone": regex.compile(
        rf"(?<![{_W}+])\+[1-9](?:[ ./()-]{{0,2}}[0-9]){{6,14}}(?![0-9])"
        # mobile phones in China
        rf"|(?<![{_W}+.-])1[3-9][0-9](?:[ -]?[0-9]{{4}}){{2}}(?![{_W}]|[.-][0-9])"
    ),
    "Chinese ID": regex.compile(
        rf"(?<![{_W}])[1-9][0-9]{{5}}(?:18|19|20)[0-9]{{2}}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
        rf"[0-9]{{3}}[0-9Xx](?![{_W}])"
    ),
}
KINDS = tuple(_PATTERNS)


def found(text: str) -> Iterator[tuple[str, str]]:
    """Yields (kind, value) of all personal data in a text, kind by kind.

    The kinds are e-mail addresses; credit card numbers (13 to 19 digits that start with 2 to 6, as
    those of banks do, and pass the Luhn check); IBANs with a valid checksum; IPv4 addresses;
    phone numbers (E.164, starting with +, and mobile phones in China); Chinese identity numbers
    with a valid check digit. A number may pass a check by chance: one in 10 passes the Luhn check,
    one in 97 that of IBANs, one in 11 that of identity numbers.
    """
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            value: str | None = match[0]
            if kind == "credit card" and not luhn(match[0]):
                value = None
            if kind == "Chinese ID" and not chinese_id(match[0]):
                value = None
            if kind == "IBAN":
                value = _iban_prefix(match[0])
            if value is not None:
                yield kind, value


def luhn(number: str) -> bool:
    """Whether a number of 13 to 19 digits passes the Luhn check (ISO/IEC 7812-1, annex B).

    All other characters, such as separators, are ignored.
    """
    digits = [int(c) for c in number if c.isdecimal()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def chinese_id(number: str) -> bool:
    """Whether an identity number of 18 digits has a valid check digit (GB 11643-1999)."""
    weights = [2**i % 11 for i in range(17, 0, -1)]
    total = sum(weight * int(digit) for weight, digit in zip(weights, number, strict=False))
    return "10X98765432"[total % 11] == number[-1].upper()


def iban(number: str) -> bool:
    """Whether an IBAN, with or without spaces, has a valid checksum.

    The check is that of ISO 13616 (ISO/IEC 7064, MOD 97-10).
    """
    plain = number.replace(" ", "")
    if not regex.fullmatch(r"[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}", plain):
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def masked(value: str) -> str:
    """Returns a value with an asterisk for each character but the first and the last."""
    return value[0] + "*" * (len(value) - 2) + value[-1]


def _iban_prefix(words: str) -> str | None:
    """Returns the longest beginning, up to a space, that is a valid IBAN.

    What follows it may be words in capital letters.
    """
    while not iban(words):
        words, space, _ = words.rpartition(" ")
        if not space:
            return None
    return words
