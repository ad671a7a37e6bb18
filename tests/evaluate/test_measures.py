"""Metrics have the values that others published or that can be computed by hand."""

import math

import numpy as np
import pytest

from sevenfold.evaluate import metrics

HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [  # the example of sacrebleu's README
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


@pytest.mark.parametrize(
    ("tokenize", "expected"), [("13a", 48.530827), ("none", 49.1919566), ("intl", 43.91623493)]
)
def test_bleu_of_sacrebleus_readme(tokenize: str, expected: float) -> None:
    """The values are those of sacrebleu's test_bleu.py."""
    scores = metrics.bleu(HYPOTHESES, REFERENCES, tokenize)
    assert scores["bleu"] == pytest.approx(expected, abs=1e-6)
    assert scores["bleu_signature"].startswith(
        f"nrefs:2|case:mixed|eff:no|tok:{tokenize}|smooth:exp|version:"
    )
    assert scores["chrf_signature"].startswith(
        "nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:"
    )


@pytest.mark.parametrize(
    ("hypotheses", "references", "expected"),
    [  # from its README, and from its test_chrf.py without smoothing, the default
        (HYPOTHESES, REFERENCES, 59.73),
        (["a", "b"], ["a", "c"], 50.0),
        (["aa"], ["ab"], 25.0),
        (["a b c"], ["abc"], 100.0),
        ([""], ["reference"], 0.0),
    ],
)
def test_chrf_of_sacrebleus_tests(
    hypotheses: list[str], references: metrics.References, expected: float
) -> None:
    assert metrics.bleu(hypotheses, references)["chrf"] == pytest.approx(expected, abs=5e-3)


def test_bleu_of_empty_texts_and_of_bad_calls() -> None:
    for texts in ([], ["", ""]):
        scores = metrics.bleu(texts, texts)
        assert (scores["bleu"], scores["chrf"]) == (0.0, 0.0)
        assert "tok:13a" in str(scores["bleu_signature"])
    with pytest.raises(ValueError, match="as many references as predictions, found 1 and 2"):
        metrics.bleu(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"13a.*found 'german'"):
        metrics.bleu(["a"], ["a"], "german")


def test_bleu_with_different_numbers_of_references() -> None:
    assert metrics.bleu(["the cat sat down here"], [["no", "the cat sat down here"]])[
        "bleu"
    ] == pytest.approx(100)
    mixed = metrics.bleu(
        ["the cat sat down here"] * 2, ["the cat sat down here", ["no", "the cat sat down here"]]
    )
    assert mixed["bleu"] == pytest.approx(100)
    assert str(mixed["bleu_signature"]).startswith("nrefs:var")


@pytest.mark.parametrize(
    ("target", "prediction", "expected"),
    [  # F1 values of rouge_scorer_test.py
        ("testing one two", "testing", {"rouge1": 1 / 2}),
        ("testing one two", "testing one", {"rouge1": 4 / 5, "rouge2": 2 / 3, "rougeL": 4 / 5}),
        ("testing one two", "testing two", {"rougeL": 4 / 5}),
        ("first text", "text first", {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.5}),
        ("testing one two", "", {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}),
    ],
)
def test_rouge_of_the_tests_of_rouge_score(
    target: str, prediction: str, expected: dict[str, float]
) -> None:
    scores = metrics.rouge([prediction], [target])
    assert {key: scores[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel  tower", 1, 1),  # articles, case, punctuation, white space
        ("a well-known Man", "wellknown man", 1, 1),  # SQuAD removes the hyphen and joins the words
        ("in the year 1990", "1990", 0, 2 / 4),  # 1 shared word, of 3 and of 1
        ("cat cat dog", "cat dog dog", 0, 2 / 3),  # a word counts as often as both texts have it
        ("the", "", 1, 1),
        ("no", "", 0, 0),  # an unanswerable question of SQuAD 2
        ("theatre", "the theatre", 1, 1),
        ("Ana", "na", 0, 0),  # articles are only removed as whole words
        ("¿Qué?", "qué", 1, 1),
        ("«Москва».", "москва", 1, 1),  # punctuation of other scripts
        ("e\u0301te\u0301", "été", 1, 1),  # composed and decomposed accents
        ("北京。", "北 京", 1, 1),
        ("北京市", "北京", 0, 2 * 2 / 5),  # characters, in scripts without spaces
        ("हिन्दी", "हिन्दू", 0, 0),  # one word each, although vowel signs are not letters
    ],
)
def test_answers_are_compared_as_squad_does(
    prediction: str, reference: str, exact: float, f1: float
) -> None:
    assert metrics.exact_match([prediction], [reference]) == exact
    assert metrics.token_f1([prediction], [reference]) == pytest.approx(f1)


def test_answers_are_averaged_over_questions() -> None:
    # the best of several references counts
    assert metrics.exact_match(["x", "b"], [["a", "x"], "c"]) == 0.5
    assert metrics.token_f1(["x y", "b"], [["a", "x"], "c"]) == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.exact_match([], []) == metrics.token_f1([], []) == 0.0
    for measure in (metrics.exact_match, metrics.token_f1):
        with pytest.raises(ValueError, match="zip"):
            measure(["a"], [])


def test_classification_equals_a_computation_by_hand() -> None:
    true = ["a", "a", "a", "b", "b", "c"]
    # a has a recall of 2/3 and a precision of 2/3, b of 1/2 and 1/2; c is never predicted
    predictions = ["a", "a", "b", "b", "junk", "a"]
    scores = metrics.classification(predictions, true, ["a", "b", "c", "d"])
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["f1_micro"] == pytest.approx(2 * 3 / (5 + 6))  # 5 predictions name a class
    # d occurs nowhere
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3) and scores["classes"] == 3
    assert scores["per_class"]["a"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )
    assert scores["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert list(scores["per_class"]) == ["a", "b", "c"]
    assert metrics.classification([], [], ["a"])["accuracy"] == 0.0
    # a classifier without a mistake, of three classes of which two occur
    assert metrics.classification(["a", "b"], ["a", "b"], ["a", "b", "c"])["f1_macro"] == 1
    assert metrics.classification(["a", "a"], ["a", "a"], ["a"])["f1_macro"] == 1
    # a label that the model does not know is a miss
    unseen = metrics.classification(["a", "a"], ["a", "z"], ["a"])
    assert unseen["accuracy"] == 0.5 and unseen["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)
    with pytest.raises(ValueError, match="zip"):
        metrics.classification(["a"], ["a", "a"], ["a"])


def test_retrieval_equals_a_computation_by_hand() -> None:
    ranked = [["x", "a", "y", "b"], ["p", "q"], ["m"], ["never asked"]]
    relevant = [{"a", "b", "c"}, {"z"}, ["m"], []]
    scores = metrics.retrieval(ranked, relevant, k=3)  # b is ranked below k
    first = (1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / math.log2(4))
    assert scores == pytest.approx(
        {"ndcg@3": (first + 1) / 3, "mrr@3": (1 / 2 + 1) / 3, "recall@3": (1 / 3 + 1) / 3}
    )
    best = metrics.retrieval([["a", "b"]], [{"a", "b", "c"}], k=2)  # no ranking of two is better
    assert best == pytest.approx({"ndcg@2": 1, "mrr@2": 1, "recall@2": 2 / 3})


def test_retrieval_of_odd_input() -> None:
    twice = metrics.retrieval([["a", "a", "b"]], [{"a", "b"}])
    assert twice == pytest.approx({"ndcg@10": 1, "mrr@10": 1, "recall@10": 1})
    assert metrics.retrieval([], []) == {"ndcg@10": 0, "mrr@10": 0, "recall@10": 0}
    with pytest.raises(ValueError, match="zip"):
        metrics.retrieval([["a"]], [])
    with pytest.raises(ValueError, match="k of 1 or more, found 0"):
        metrics.retrieval([["a"]], [["a"]], k=0)


def test_windows_equal_those_of_the_perplexity_guide() -> None:
    assert metrics.windows(10, 4, 2) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert metrics.windows(9, 4, 3) == [(0, 4, 1), (3, 7, 4), (6, 9, 7)]
    assert metrics.windows(3, 8, 4) == [(0, 3, 1)]
    assert metrics.windows(1, 8, 4) == metrics.windows(0, 8, 4) == []


def test_windows_score_each_token_once_with_enough_context() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, context = int(rng.integers(0, 60)), int(rng.integers(2, 20))
        stride = int(rng.integers(1, context))
        scored = []
        for start, stop, first_scored in metrics.windows(length, context, stride):
            assert start < first_scored < stop <= length and stop - start <= context
            scored += range(first_scored, stop)
            assert all(
                token - start >= min(token, context - stride) for token in range(first_scored, stop)
            )
        assert scored == list(range(1, length))
    for stride in (0, 8):
        with pytest.raises(ValueError, match=f"found stride {stride} and context 8"):
            metrics.windows(20, 8, stride)
