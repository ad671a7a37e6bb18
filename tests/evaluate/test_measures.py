"""Values that others published or that a pencil finds."""

import math

import numpy as np
import pytest

from sevenfold.evaluate import metrics

HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [  # sacrebleu's README
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


@pytest.mark.parametrize(("tokenize", "expected"), [("13a", 48.530827), ("none", 49.1919566), ("intl", 43.91623493)])
def test_bleu_of_sacrebleus_readme(tokenize: str, expected: float) -> None:  # its test_bleu.py
    found = metrics.bleu(HYPOTHESES, REFERENCES, tokenize)
    assert found["bleu"] == pytest.approx(expected, abs=1e-6)
    assert found["bleu_signature"].startswith(f"nrefs:2|case:mixed|eff:no|tok:{tokenize}|smooth:exp|version:")
    assert found["chrf_signature"].startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize(
    ("hypotheses", "references", "expected"),
    [  # its README, and test_chrf.py without smoothing, which is its default
        (HYPOTHESES, REFERENCES, 59.73), (["a", "b"], ["a", "c"], 50.0), (["aa"], ["ab"], 25.0), (["a b c"], ["abc"], 100.0),
        ([""], ["reference"], 0.0),
    ],
)  # fmt: skip
def test_chrf_of_sacrebleus_tests(hypotheses: list[str], references: metrics.References, expected: float) -> None:
    assert metrics.bleu(hypotheses, references)["chrf"] == pytest.approx(expected, abs=5e-3)


def test_bleu_of_no_text_and_of_bad_calls() -> None:
    for nothing in ([], ["", ""]):
        found = metrics.bleu(nothing, nothing)
        assert (found["bleu"], found["chrf"]) == (0.0, 0.0)
        assert "tok:13a" in str(found["bleu_signature"])
    with pytest.raises(ValueError, match="as many references as predictions, found 1 and 2"):
        metrics.bleu(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"13a.*found 'german'"):
        metrics.bleu(["a"], ["a"], "german")


def test_bleu_where_some_have_more_references() -> None:
    assert metrics.bleu(["the cat sat down here"], [["no", "the cat sat down here"]])["bleu"] == pytest.approx(100)
    mixed = metrics.bleu(["the cat sat down here"] * 2, ["the cat sat down here", ["no", "the cat sat down here"]])
    assert mixed["bleu"] == pytest.approx(100)
    assert str(mixed["bleu_signature"]).startswith("nrefs:var")


@pytest.mark.parametrize(
    ("target", "prediction", "expected"),
    [  # F1s of rouge_scorer_test.py
        ("testing one two", "testing", {"rouge1": 1 / 2}),
        ("testing one two", "testing one", {"rouge1": 4 / 5, "rouge2": 2 / 3, "rougeL": 4 / 5}),
        ("testing one two", "testing two", {"rougeL": 4 / 5}),
        ("first text", "text first", {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.5}),
        ("testing one two", "", {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}),
    ],
)
def test_rouge_of_rouge_scores_tests(target: str, prediction: str, expected: dict[str, float]) -> None:
    found = metrics.rouge([prediction], [target])
    assert {k: found[k] for k in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel  tower", 1, 1),  # articles, case, punctuation, white space
        ("a well-known Man", "wellknown man", 1, 1),  # SQuAD drops the hyphen and joins
        ("in the year 1990", "1990", 0, 2 / 4),  # 1 shared of 3 and of 1
        ("cat cat dog", "cat dog dog", 0, 2 / 3),  # a word counts as often as both have it
        ("the", "", 1, 1), ("no", "", 0, 0),  # SQuAD 2's unanswerable
        ("theatre", "the theatre", 1, 1), ("Ana", "na", 0, 0),  # articles are whole words
        ("¿Qué?", "qué", 1, 1), ("«Москва».", "москва", 1, 1),  # signs of other scripts
        ("e\u0301te\u0301", "été", 1, 1),  # accents apart or not
        ("北京。", "北 京", 1, 1), ("北京市", "北京", 0, 2 * 2 / 5),  # characters where there are no spaces
        ("हिन्दी", "हिन्दू", 0, 0),  # one word each, though vowel signs are no letters
    ],
)  # fmt: skip
def test_answers_are_compared_as_squad_does(prediction: str, reference: str, exact: float, f1: float) -> None:
    assert metrics.exact_match([prediction], [reference]) == exact
    assert metrics.token_f1([prediction], [reference]) == pytest.approx(f1)


def test_answers_over_many() -> None:
    assert metrics.exact_match(["x", "b"], [["a", "x"], "c"]) == 0.5  # the best of several references
    assert metrics.token_f1(["x y", "b"], [["a", "x"], "c"]) == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.exact_match([], []) == metrics.token_f1([], []) == 0.0
    for measure in (metrics.exact_match, metrics.token_f1):
        with pytest.raises(ValueError, match="zip"):
            measure(["a"], [])


def test_classification_by_hand() -> None:
    true = ["a", "a", "a", "b", "b", "c"]
    made = ["a", "a", "b", "b", "junk", "a"]  # a: 2 of 3 found, 2 of 3 right; b: 1 of 2, 1 of 2; c: never
    found = metrics.classification(made, true, ["a", "b", "c", "d"])
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1_micro"] == pytest.approx(2 * 3 / (5 + 6))  # 5 predictions are of a class
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4)
    assert found["per_class"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert found["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert found["per_class"]["d"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert metrics.classification([], [], ["a"])["accuracy"] == 0.0
    with pytest.raises(ValueError, match="found \\['z'\\]"):
        metrics.classification(["a"], ["z"], ["a"])
    with pytest.raises(ValueError, match="zip"):
        metrics.classification(["a"], ["a", "a"], ["a"])


def test_retrieval_by_hand() -> None:
    ranked = [["x", "a", "y", "b"], ["p", "q"], ["m"], ["never asked"]]
    relevant = [{"a", "b", "c"}, {"z"}, ["m"], []]
    found = metrics.retrieval(ranked, relevant, k=3)  # b is below the cut
    first = (1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / math.log2(4))
    assert found == pytest.approx({"ndcg@3": (first + 1) / 3, "mrr@3": (1 / 2 + 1) / 3, "recall@3": (1 / 3 + 1) / 3})
    best = metrics.retrieval([["a", "b"]], [{"a", "b", "c"}], k=2)  # no order of two is better
    assert best == pytest.approx({"ndcg@2": 1, "mrr@2": 1, "recall@2": 2 / 3})


def test_retrieval_of_odd_input() -> None:
    twice = metrics.retrieval([["a", "a", "b"]], [{"a", "b"}])
    assert twice == pytest.approx({"ndcg@10": 1, "mrr@10": 1, "recall@10": 1})
    assert metrics.retrieval([], []) == {"ndcg@10": 0, "mrr@10": 0, "recall@10": 0}
    with pytest.raises(ValueError, match="zip"):
        metrics.retrieval([["a"]], [])
    with pytest.raises(ValueError, match="k of 1 or more, found 0"):
        metrics.retrieval([["a"]], [["a"]], k=0)


def test_windows_of_the_perplexity_guide() -> None:
    assert metrics.windows(10, 4, 2) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert metrics.windows(9, 4, 3) == [(0, 4, 1), (3, 7, 4), (6, 9, 7)]
    assert metrics.windows(3, 8, 4) == [(0, 3, 1)]
    assert metrics.windows(1, 8, 4) == metrics.windows(0, 8, 4) == []


def test_windows_count_each_token_once_and_leave_it_its_context() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, context = int(rng.integers(0, 60)), int(rng.integers(2, 20))
        stride = int(rng.integers(1, context))
        scored = []
        for begin, end, first in metrics.windows(length, context, stride):
            assert begin < first < end <= length and end - begin <= context
            scored += range(first, end)
            assert all(t - begin >= min(t, context - stride) for t in range(first, end))
        assert scored == list(range(1, length))
    for stride in (0, 8):
        with pytest.raises(ValueError, match=f"found stride {stride} and context 8"):
            metrics.windows(20, 8, stride)
