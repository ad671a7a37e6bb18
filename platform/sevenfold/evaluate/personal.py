"""Personal data in texts, by pattern and check digits: what is found is counted, never shown whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_PATTERNS: dict[str, re.Pattern[str]] = {
    # no quantifier without a bound, and a beginning that is not tried within a word: time stays linear in the text
    "e-mail": re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"),
    "credit card": re.compile(
        r"(?<![\w.-])(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{5})(?![\w-])"
    ),
    "IBAN": re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"),
    "IPv4": re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\d)"),
    "phone": re.compile(r"(?<![\w+])\+[1-9](?:[ ./()-]{0,2}\d){6,14}(?!\d)"),
}
KINDS = tuple(_PATTERNS)


def found(text: str) -> Iterator[tuple[str, str]]:
    """(kind, value) of each e-mail address, credit-card number (13 to 19 digits that begin as banks' do, 2 to 6, and pass the
    Luhn check), IBAN (that passes its checksum), IPv4 address and international phone number (E.164, + first). A number can
    pass a check by chance: one in 10 passes Luhn's, one in 97 an IBAN's."""
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            value: str | None = match[0]
            if kind == "credit card" and not luhn(match[0]):
                value = None
            if kind == "IBAN":
                value = _iban_within(match[0])
            if value is not None:
                yield kind, value


def luhn(number: str) -> bool:
    """Whether 13 to 19 digits, however they are parted, pass the check of ISO/IEC 7812-1, annex B."""
    digits = [int(c) for c in number if c.isdecimal()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def iban(number: str) -> bool:
    """Whether an IBAN, with or without spaces, passes the check of ISO 13616 (ISO/IEC 7064, MOD 97-10)."""
    plain = number.replace(" ", "")
    if not re.fullmatch(r"[A-Z]{2}\d{2}[A-Z0-9]{11,30}", plain, re.ASCII):
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def masked(value: str) -> str:
    """Its first and last character alone."""
    return value[0] + "*" * (len(value) - 2) + value[-1]


def _iban_within(words: str) -> str | None:
    """The longest beginning that is one, cut at a space: what follows may be words in capitals."""
    while not iban(words):
        words, space, _ = words.rpartition(" ")
        if not space:
            return None
    return words
