"""The two tokenizer backends: `gigatoken`, which is fast, and `tokenizers`, the reference.

The fast one does not encode every text as the reference does: its tables of Unicode have another
version, and vocabularies may lack single bytes. So it is chosen by the document: what contains
none of the characters and added tokens in question goes the fast way, the rest by the reference.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex
import tokenizers

from sevenfold.data.sources.documents import buffers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAST = "gigatoken"
# Characters are compared in blocks of this size. Beyond _UNIFORM, one in 16 is compared.
_BLOCK = 64
_UNIFORM = [(0x3400, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900), (0x17000, 0x18D00)]
_UNIFORM += [(0x20000, sys.maxunicode + 1)]
_SURROGATES = range(0xD800, 0xE000)
# Where a line begins with a letter, after a line that ends with no white space.
_BETWEEN_LINES = regex.compile(r"(?<=\S\n)(?=\p{L})", regex.V1)
# Letters, digits, marks and symbols of many kinds, which may end a line.
_KINDS = [*"aZéßЯ中の한กअع0²_.,!'\")-/$。€🙂▁<", "\u0301", "\u200d", "\uff17", "\uff0c"]
# Normal forms that gigatoken may not support; Arrow has them too.
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


class Backend(NamedTuple):
    """What encodes texts.

    Attributes:
        name: FAST or "tokenizers".
        by_reference: With FAST, a regular expression (RE2) for the documents that the reference
            encodes nevertheless; "" for none.
        by_line: Whether such documents may be split between lines, so that the reference encodes
            only the parts in question. A book with one such character would take as long as a
            hundred others.
    """

    name: str
    by_reference: str = ""
    by_line: bool = False


REFERENCE = Backend("tokenizers")


class TokenLists(NamedTuple):
    """The token ids of several texts, concatenated: text i has ids[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray  # int64 [texts + 1]
    ids: np.ndarray  # uint32 [total]

    def of_text(self, index: int) -> list[int]:
        """Returns the ids of one text."""
        ids: list[int] = self.ids[self.offsets[index] : self.offsets[index + 1]].tolist()
        return ids

    def differences(self, other: TokenLists) -> list[int]:
        """Returns the indices of the texts whose ids differ."""
        if np.array_equal(self.offsets, other.offsets) and np.array_equal(self.ids, other.ids):
            return []
        return [i for i in range(len(self.offsets) - 1) if self.of_text(i) != other.of_text(i)]


def choose_backend(
    tokenizer: PreTrainedTokenizerBase, sample: Sequence[str]
) -> tuple[Backend, str]:
    """Chooses the backend: the fast one for all documents on which it equals the reference.

    Both encode the characters of all of Unicode and the added tokens, between letters and doubled.
    Where they differ, documents with this character or token are encoded by the reference. Then
    both encode the sample.

    Args:
        tokenizer: The tokenizer.
        sample: Texts of the data that will be encoded.

    Returns:
        The backend, and a sentence for the user that gives the reason.
    """
    serialized = tokenizer.backend_tokenizer.to_str()
    try:
        version = importlib.metadata.version(FAST)
        pattern = _pattern_of_differences(serialized)
        backend = Backend(FAST, pattern, bool(pattern) and _lines_are_independent(serialized))
        strings = pa.array([*sample, *_around(tokenizer.all_special_tokens)], pa.large_string())
        tokens = tokenize_function(serialized, backend)(strings)
    except BaseException as e:  # a panic in gigatoken's Rust code is not an Exception
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        return (
            REFERENCE,
            f"{FAST} does not support this tokenizer ({type(e).__name__}: {str(e)[:80]}): "
            "encoding with tokenizers, which is slower",
        )
    expected = tokenize_function(serialized, REFERENCE)(strings)
    if different := tokens.differences(expected):
        return (
            REFERENCE,
            f"{FAST} {version} and tokenizers give different ids for "
            f"{strings[different[0]].as_py()[:40]!r}: encoding with tokenizers, which is slower",
        )
    rest = "" if not pattern else "; documents with characters that it splits otherwise by them"
    return (
        backend,
        f"encoding with {FAST} {version}: the same ids as tokenizers on {len(tokens.ids):,} tokens"
        f"{rest}",
    )


def _pattern_of_differences(serialized: str) -> str:
    """Returns a pattern (RE2) for what the fast backend encodes otherwise; "" for nothing."""
    fast, reference = _fast(serialized), tokenize_function(serialized, REFERENCE)

    def differing(texts: Sequence[str]) -> list[int]:
        strings = pa.array(texts, pa.large_string())
        return fast(strings).differences(reference(strings))

    blocks = [block for block in _blocks() if block]
    texts = [" ".join(_around(block)) for block in blocks]
    ranges: list[tuple[int, int]] = []
    for index in differing(texts):
        block = blocks[index]
        characters = differing([" ".join(_around([c])) for c in block])
        if len(block) == _BLOCK and characters:
            ranges += [(ord(block[i]), ord(block[i])) for i in characters]
        else:  # only some characters of the block were compared, or only all together differ
            first = ord(block[0]) // _BLOCK * _BLOCK
            ranges.append((first, first + _BLOCK - 1))
    tree = json.loads(serialized)
    if tree["normalizer"] is not None:
        ranges += _order_dependent()
    added = [token for token in tree["added_tokens"] if not token["special"]]
    tokens = [token["content"] for token in added]
    unequal = {tokens[i] for i in differing([" ".join(_around([token])) for token in tokens])}
    unequal |= {t["content"] for t in added if t["single_word"] or t["lstrip"] or t["rstrip"]}
    parts = ["".join(f"\\x{{{ord(c):X}}}" for c in token) for token in sorted(unequal)]
    if ranges:
        parts.append("[" + "".join(f"\\x{{{a:X}}}-\\x{{{b:X}}}" for a, b in ranges) + "]")
    return "|".join(parts)


def _lines_are_independent(serialized: str) -> bool:
    """Returns whether a text's ids are those of its parts, where _BETWEEN_LINES splits it.

    No word of a tokenizer that splits texts by a pattern such as GPT-2's or GPT-4's reaches from a
    line end to a letter, and what follows a single line end does not change how that is split. Here
    the reference encodes characters of all kinds on both sides.
    """
    for token in json.loads(serialized)["added_tokens"]:
        if "\n" in token["content"] or token["lstrip"] or token["single_word"]:
            return False  # it may take a line end, or look at it
    before = [f"{x}{c}\n" for c in _KINDS for x in ("", "a", " ", "7.", "'")]
    after = [f"{c}{x}" for c in _KINDS if c.isalpha() for x in ("", "b", "'s", " c", "\n", "1")]
    pairs = [(a, b) for a in before for b in after]
    wholes = pa.array([a + b for a, b in pairs], pa.large_string())
    parts = pa.array([part for pair in pairs for part in pair], pa.large_string())
    reference = _reference(serialized)
    whole, separate = reference(wholes), reference(parts)
    joined = TokenLists(separate.offsets[::2], separate.ids)
    return not whole.differences(joined)


def _order_dependent() -> list[tuple[int, int]]:
    """Returns the characters whose normal form depends on those around them, as ranges.

    They are combining marks, what composes with the character before, and what Python's version of
    Unicode has not assigned.
    """
    points = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # parts of Korean syllables
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        if unicodedata.combining(character) or unicodedata.category(character) == "Cn":
            points.add(point)
        decomposition = unicodedata.decomposition(character).split()
        if len(decomposition) == 2 and not decomposition[0].startswith("<"):
            points.add(int(decomposition[1], 16))
    ordered = sorted(points)
    starts = [p for p in ordered if p - 1 not in points]
    stops = [p for p in ordered if p + 1 not in points]
    return list(zip(starts, stops, strict=True))


def _around(texts: Sequence[str]) -> list[str]:
    """Returns each of these characters or tokens beside those that patterns treat specially."""
    return [f"a{t}b{t}{t}1'{t}'s {t}'Ul {t}\n \n{t}" for t in texts]


def _blocks() -> list[str]:
    """Returns the characters of Unicode in blocks; of uniform areas one in 16."""
    return [
        "".join(
            chr(point)
            for point in range(
                first,
                first + _BLOCK,
                16 if any(start <= first < stop for start, stop in _UNIFORM) else 1,
            )
            if point not in _SURROGATES
        )
        for first in range(0, sys.maxunicode + 1, _BLOCK)
        # planes without any assigned character, and private use, are looked at in part
        if first < 0x34000 or first % 0x1000 == 0
    ]


@functools.lru_cache(maxsize=4)
def tokenize_function(serialized: str, backend: Backend) -> Callable[[pa.Array], TokenLists]:
    """Returns the function that encodes an array of large strings with a backend.

    It is built once per process: parsing a vocabulary of 128k takes half a second.

    Args:
        serialized: The tokenizer's JSON.
        backend: The backend.
    """
    if backend.name != FAST:
        return _reference(serialized)
    fast = _fast(serialized)

    def route(strings: pa.Array, encode_slow: Callable[[pa.Array], TokenLists]) -> TokenLists:
        is_slow = pc.match_substring_regex(strings, backend.by_reference)
        if not pc.any(is_slow).as_py():
            return fast(strings)
        return _merge(
            np.asarray(is_slow.to_numpy(zero_copy_only=False), bool),
            fast(strings.filter(pc.invert(is_slow))),
            encode_slow(strings.filter(is_slow)),
        )

    def by_reference(strings: pa.Array) -> TokenLists:
        # built only where it is needed: most data tasks meet no such document
        return _reference(serialized)(strings)

    def by_line(strings: pa.Array) -> TokenLists:
        parts = [_BETWEEN_LINES.split(text) for text in strings.to_pylist()]
        flat = pa.array([part for text in parts for part in text], pa.large_string())
        tokens = route(flat, by_reference)
        ends = np.cumsum([0, *map(len, parts)])
        return TokenLists(tokens.offsets[ends], tokens.ids)

    def tokenize(strings: pa.Array) -> TokenLists:
        if not backend.by_reference or not len(strings):
            return fast(strings)
        return route(strings, by_line if backend.by_line else by_reference)

    return tokenize


def _merge(is_second: np.ndarray, first: TokenLists, second: TokenLists) -> TokenLists:
    """Returns the ids of all texts in order, some of them from `first`, the rest from `second`."""
    lengths = np.zeros(len(is_second), np.int64)
    lengths[~is_second], lengths[is_second] = np.diff(first.offsets), np.diff(second.offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.empty(int(offsets[-1]), np.uint32)
    of_second = np.repeat(is_second, lengths)
    ids[~of_second], ids[of_second] = first.ids, second.ids
    return TokenLists(offsets, ids)


@functools.lru_cache(maxsize=4)
def _reference(serialized: str) -> Callable[[pa.Array], TokenLists]:
    backend = tokenizers.Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True  # their spelling in a text is encoded as text
    backend.no_truncation()
    backend.no_padding()

    def tokenize(strings: pa.Array) -> TokenLists:
        encodings = backend.encode_batch_fast(strings.to_pylist(), add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        flat = (token for ids in lists for token in ids)
        return TokenLists(offsets, np.fromiter(flat, np.uint32, int(offsets[-1])))

    return tokenize


@functools.lru_cache(maxsize=4)
def _fast(serialized: str) -> Callable[[pa.Array], TokenLists]:
    """Returns the function of gigatoken; texts that it cannot encode go to the reference."""
    import awkward
    import gigatoken
    from awkward.contents import ListOffsetArray, NumpyArray

    tree = json.loads(serialized)
    # without the special tokens, their spelling in a text is encoded as text
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["special"]]
    tree["post_processor"] = None  # no BOS and EOS
    form = (tree["normalizer"] or {}).get("type")
    if form in _FORMS and not _supports(tree):
        tree["normalizer"] = None
    else:
        form = None
    known = _add_missing_bytes(tree)
    backend = gigatoken.Tokenizer.from_json(json.dumps(tree))

    def encode(strings: pa.Array) -> TokenLists:
        # gigatoken takes and returns awkward arrays; the bytes of the strings are not copied
        offsets, data = buffers(strings)
        characters = NumpyArray(np.frombuffer(data, np.uint8), parameters={"__array__": "char"})
        lists = ListOffsetArray(
            awkward.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        tokens: Any = awkward.to_layout(
            awkward.to_packed(backend.encode_batch(awkward.Array(lists), parallel=False))
        )
        return TokenLists(
            np.asarray(tokens.offsets.data, np.int64), np.asarray(tokens.content.data)
        )

    def tokenize(strings: pa.Array) -> TokenLists:
        if not len(strings):
            return TokenLists(np.zeros(1, np.int64), np.zeros(0, np.uint32))
        tokens = encode(strings if form is None else _normalize(strings, form))
        if known is None or not (unknown := tokens.ids >= known).any():
            return tokens
        # the reference knows what to do about bytes that the vocabulary lacks
        has_unknown = np.add.reduceat(np.append(unknown, False), tokens.offsets[:-1]) > 0
        has_unknown &= np.diff(tokens.offsets) > 0
        kept = np.repeat(~has_unknown, np.diff(tokens.offsets))
        lengths = np.diff(tokens.offsets)[~has_unknown]
        rest = TokenLists(np.concatenate([[0], np.cumsum(lengths)]), tokens.ids[kept])
        return _merge(has_unknown, rest, _reference(serialized)(strings.filter(has_unknown)))

    return tokenize


def _supports(tree: dict[str, Any]) -> bool:
    """Returns whether gigatoken supports the normalizer of a tokenizer."""
    import gigatoken

    small = {**tree, "model": {**tree["model"], "merges": []}}
    try:
        gigatoken.Tokenizer.from_json(json.dumps(small))
    except RuntimeError as e:
        return "normalizer" not in str(e)
    return True


def _normalize(strings: pa.Array, form: str) -> pa.Array:
    """Returns the strings in a normal form of Unicode; ASCII is in all of them already."""
    is_ascii = pc.string_is_ascii(strings)
    if pc.all(is_ascii).as_py():
        return strings
    return pc.if_else(is_ascii, strings, pc.utf8_normalize(strings, form=form))


def _add_missing_bytes(tree: dict[str, Any]) -> int | None:
    """Adds the single bytes that the vocabulary of a byte-level tokenizer lacks.

    gigatoken needs all of them. Documents in which they occur are encoded by the reference.

    Returns:
        The first id that was added; None if none was.
    """
    vocabulary = tree["model"].get("vocab")
    if "ByteLevel" not in json.dumps([tree["pre_tokenizer"], tree["normalizer"]]):
        return None
    # the 256 characters that stand for bytes in byte-level vocabularies (GPT-2)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    missing = [c for c in alphabet if c not in vocabulary]
    if not missing:
        return None
    used = [*vocabulary.values(), *(t["id"] for t in tree["added_tokens"])]
    first = max(used) + 1
    tree["model"]["vocab"] = vocabulary | {c: first + i for i, c in enumerate(missing)}
    return first
