"""The fast backend gives the ids of the reference for every document, or leaves it to that."""

import json
import random
from typing import Any

import pyarrow as pa
import pytest
import tokenizers
from helpers import tiny_models
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from sevenfold.data.backends import FAST, REFERENCE, choose_backend, tokenize_function

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    """Returns a small byte-level tokenizer with some parts changed.

    Args:
        changes: `normalizer`; `pattern` to split texts by; `added`: tokens that are not special;
            `missing`: bytes without a token of their own.
    """
    backend = tiny_models.tokenizer().backend_tokenizer
    if pattern := changes.get("pattern"):
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if normalizer := changes.get("normalizer"):
        backend.normalizer = normalizer
    tree = json.loads(backend.to_str())
    for byte in changes.get("missing", ()):
        del tree["model"]["vocab"][chr(256 + byte)]  # GPT-2's character for a control byte
    backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
    backend.add_tokens(list(changes.get("added", ())))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|eos|>", clean_up_tokenization_spaces=False
    )


def random_texts(rng: random.Random, extra: list[str], count: int) -> list[str]:
    """Returns texts of random characters from all of Unicode, spellings of tokens, and words."""

    def piece() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(["the", " quick", "'S", "'ll", " 12", "\n", "\t ", "  ", "é", "中文"])
        if kind < 0.55 and extra:
            return rng.choice(extra)
        if kind < 0.6:
            return rng.choice(
                ["e\u0301", "\u1100\u1161", "\ufb01", "\uff21", "\u00a0", "\u017f", "\u212a"]
            )
        point = rng.randrange(rng.choice([0x80, 0x800, 0x3400, 0x20000, 0x110000]))
        return "?" if 0xD800 <= point < 0xE000 else chr(point)

    return ["".join(piece() for _ in range(rng.randint(0, 12))) for _ in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": QWEN_SPLIT, "normalizer": normalizers.NFC()},
        *({"normalizer": form()} for form in (normalizers.NFD, normalizers.NFKC, normalizers.NFKD)),
        {"missing": (1, 4, 31)},
        {"added": [AddedToken("<tool>"), AddedToken("zebra"), AddedToken("  ")]},
        {"added": [AddedToken("quick", single_word=True), AddedToken("a", lstrip=True)]},
        {"added": [AddedToken("fox", rstrip=True), AddedToken("jug", normalized=True)]},
        {
            "pattern": QWEN_SPLIT,
            "normalizer": normalizers.NFC(),
            "missing": (2,),
            "added": [AddedToken("box", single_word=True, lstrip=True, rstrip=True)],
        },
    ],
    ids=str,
)
def test_ids_equal_those_of_the_reference(changes: dict[str, Any]) -> None:
    tokenizer = byte_level(**changes)
    backend, why = choose_backend(tokenizer, ["some text", "<|eos|>"])
    assert backend.name == FAST, why
    spelled = [token.content for token in changes.get("added", ())] + ["<|eos|>"]
    spelled += [chr(byte) for byte in changes.get("missing", ())]
    texts = random_texts(random.Random(0), spelled, 3000)
    # documents of several lines, of which some are encoded by the reference
    texts += ["\n".join(texts[i : i + 6]) for i in range(0, 3000, 6)]
    reaches = any(t.lstrip or t.single_word for t in changes.get("added", ()))
    assert backend.by_line == (bool(backend.by_reference) and not reaches)
    strings = pa.array(texts, pa.large_string())
    serialized = tokenizer.backend_tokenizer.to_str()
    expected = tokenize_function(serialized, REFERENCE)(strings)
    actual = tokenize_function(serialized, backend)(strings)
    different = actual.differences(expected)
    assert not different, [texts[i] for i in different[:5]]
    # not because all of them went to the reference
    if backend.by_reference:
        plain = pa.array(["the quick brown fox, 12", "中文 é"], pa.large_string())
        matches = pa.compute.match_substring_regex(plain, backend.by_reference).to_pylist()
        assert matches.count(True) <= 1
