"""Each measure equals a library's or a computation in plain Python, over scripts and ties."""
# ruff: noqa: RUF001

import math
import random
from collections import Counter

import numpy as np
import pytest

from sevenfold.data.text import bleu_tokenizer, words
from sevenfold.evaluate import metrics
from sevenfold.evaluate.baselines import BM25

# A sentence in each script, with digits and punctuation; and the tokenizer that BLEU gets for it.
SENTENCES = {
    "Latin": ("The economy grew by 5% in 2023, naïvely speaking.", "13a"),
    "Cyrillic": ("Сегодня хорошая погода, 5 градусов.", "13a"),
    "Greek": ("Ο καιρός είναι καλός σήμερα.", "13a"),
    "Arabic": ("الطقس جميل اليوم في القاهرة.", "13a"),
    "Hebrew": ("מזג האוויר יפה היום.", "13a"),
    "Hindi": ("पूर्व प्रधानमन्त्री ने 2023 में कहा।", "13a"),
    "Chinese": ("2023年今天天气很好，GDP 上升 5%。", "zh"),
    "Japanese": ("今日はいい天気ですね。", "ja-mecab"),
    "Korean": ("오늘 날씨가 아주 좋다.", "ko-mecab"),
    "Thai": ("วันนี้อากาศดีมาก", "char"),
    "Khmer": ("ថ្ងៃនេះអាកាសធាតុល្អណាស់", "char"),
}


@pytest.mark.parametrize("script", SENTENCES)
def test_a_text_against_itself_is_perfect(script: str) -> None:
    text, tokenizer = SENTENCES[script]
    assert bleu_tokenizer([text]) == tokenizer
    for value in metrics.rouge([text], [text]).values():
        assert value == pytest.approx(1)
    scores = metrics.bleu([text] * 3, [text] * 3)
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert f"|tok:{tokenizer}" in str(scores["bleu_signature"])
    assert metrics.exact_match([text], [text]) == metrics.token_f1([text], [text]) == 1
    other = next(t for name, (t, _) in SENTENCES.items() if name not in (script, "Latin", "Hindi"))
    assert metrics.rouge([other], [text])["rougeL"] < 0.4


def test_digits_alone_make_no_text_equal() -> None:
    scores = metrics.rouge(["2023年 GDP 下降 5%"], ["2023年 GDP 上升 5%"])
    # 6 words, 4 of which both have: 2023, the character for year, gdp, 5
    assert scores["rouge1"] == pytest.approx(4 / 6) and scores["rouge2"] < 0.5


def test_the_tokenizer_of_mixed_texts() -> None:
    chinese = "安装 Python 3.11 之后，请运行 pip install torch。"
    assert bleu_tokenizer([chinese] * 5 + ["All rights reserved."]) == "zh"
    assert bleu_tokenizer(["The word 天 means sky or day in the language."] * 3) == "13a"
    assert bleu_tokenizer([]) == bleu_tokenizer([""]) == "13a"


def test_full_width_letters_equal_others() -> None:
    wide, narrow = "ＡＢＣ １２３ ｶﾀｶﾅ", "abc 123 カタカナ"
    assert words(wide) == words(narrow)
    assert metrics.exact_match([wide], [narrow]) == 1
    assert BM25([narrow, "something else"]).scores(wide)[0] > 0


def texts(rng: random.Random, script: str) -> str:
    """Returns a few words of a script's sentence in any order, or nothing."""
    parts = [*words(SENTENCES[script][0]), "the", "weather", "running", "runs"]
    return " ".join(rng.choices(parts, k=rng.randrange(0, 9)))


def f1(overlap: float, first: int, second: int) -> float:
    return 2 * overlap / (first + second) if overlap else 0.0


@pytest.mark.parametrize("script", SENTENCES)
def test_rouge_equals_plain_python(script: str) -> None:
    """The twin counts n-grams and finds the longest common subsequence; stems are nltk's."""
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem

    def stems(text: str) -> list[str]:
        return [stem(w) if len(w) > 3 and w.isascii() else w for w in words(text)]

    def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    def common(a: list[str], b: list[str]) -> int:
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
                )
        return table[-1][-1]

    rng = random.Random(script)
    for _ in range(60):
        prediction, reference = texts(rng, script), texts(rng, script)
        p, r = stems(prediction), stems(reference)
        expected = {"rougeL": f1(common(p, r), len(p), len(r))}
        for n in (1, 2):
            a, b = ngrams(p, n), ngrams(r, n)
            expected[f"rouge{n}"] = f1(sum((a & b).values()), sum(a.values()), sum(b.values()))
        assert metrics.rouge([prediction], [reference]) == pytest.approx(expected)


def test_rouge_of_english_equals_the_librarys() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rng = random.Random(0)
    alphabet = "aAbcdeingsr'-_.,;:!?/\\()[]{}@#%&*+=<>|~^$ \t\n0123456789"
    for _ in range(300):
        a, b = ("".join(rng.choices(alphabet, k=rng.randrange(0, 60))) for _ in range(2))
        expected = {name: s.fmeasure for name, s in scorer.score(b, a).items()}
        assert metrics.rouge([a], [b]) == pytest.approx(expected), (a, b)


@pytest.mark.parametrize("script", SENTENCES)
def test_token_f1_equals_plain_python(script: str) -> None:
    rng = random.Random(script)
    for _ in range(60):
        prediction, reference = texts(rng, script), texts(rng, script)
        p, r = metrics.answer_words(prediction), metrics.answer_words(reference)
        expected = f1(sum(min(p.count(w), r.count(w)) for w in set(p)), len(p), len(r))
        expected = float(p == r) if not p or not r else expected
        assert metrics.token_f1([prediction], [reference]) == pytest.approx(expected)
        assert metrics.exact_match([prediction], [reference]) == float(p == r)


def test_classification_equals_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    rng = random.Random(1)
    for _ in range(60):
        n, classes = rng.randrange(1, 30), [f"c{i}" for i in range(rng.randrange(1, 6))]
        true = rng.choices(classes[: rng.randrange(1, len(classes) + 1)], k=n)
        predicted = rng.choices(classes, k=n)
        scores = metrics.classification(predicted, true, classes)
        # without `labels` scikit-learn takes those that occur
        assert scores["f1_macro"] == pytest.approx(
            f1_score(true, predicted, average="macro", zero_division=0)
        )
        assert scores["f1_micro"] == pytest.approx(f1_score(true, predicted, average="micro"))
        assert scores["accuracy"] == pytest.approx(accuracy_score(true, predicted))
        assert sum(c["support"] for c in scores["per_class"].values()) == n


def test_search_equals_plain_python_with_ties_against_the_system() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        n, k = int(rng.integers(1, 30)), int(rng.integers(1, 12))
        scores = rng.choice([0.0, 0.25, 0.5, np.nan], n).astype(np.float32)
        relevant = set(rng.choice(n, int(rng.integers(0, n + 1)), replace=False).tolist())
        value = {i: -math.inf if math.isnan(s) else float(s) for i, s in enumerate(scores)}
        expected = sorted(range(n), key=lambda i: (-value[i], i in relevant, i))[:k]
        ranked = metrics.rank(scores, relevant, k)
        assert ranked == expected
        # no order of the tied documents gives less
        result = metrics.retrieval([ranked], [relevant], k)
        for _ in range(5):
            shuffled = rng.permutation(n).tolist()
            other = sorted(shuffled, key=lambda i: -value[i])[:k]
            for name, measured in metrics.retrieval([other], [relevant], k).items():
                assert result[name] <= measured + 1e-12


def test_an_encoder_that_tells_nothing_apart_finds_nothing() -> None:
    rng = np.random.default_rng(3)
    vectors = np.full((300, 8), 1 / math.sqrt(8)) + rng.normal(0, 1e-7, (300, 8))
    queries = np.full((10, 8), 1 / math.sqrt(8))
    for documents in (vectors, vectors * np.nan):
        ranked = [metrics.rank(documents @ q, {i}, 10) for i, q in enumerate(queries)]
        scores = metrics.retrieval(ranked, [{i} for i in range(10)])
        assert scores == {"ndcg@10": 0, "mrr@10": 0, "recall@10": 0}


def test_retrieval_equals_plain_python() -> None:
    rng = random.Random(4)
    for _ in range(200):
        n, k = rng.randrange(1, 20), rng.randrange(1, 12)
        ranked = rng.sample(range(20), n)
        relevant = set(rng.sample(range(20), rng.randrange(1, 8)))
        gains = [1 / math.log2(i + 2) if d in relevant else 0.0 for i, d in enumerate(ranked[:k])]
        best = sum(1 / math.log2(i + 2) for i in range(min(k, len(relevant))))
        first = next((i + 1 for i, d in enumerate(ranked[:k]) if d in relevant), math.inf)
        assert metrics.retrieval([ranked], [relevant], k) == pytest.approx(
            {
                f"ndcg@{k}": sum(gains) / best,
                f"mrr@{k}": 1 / first,
                f"recall@{k}": len(relevant & set(ranked[:k])) / len(relevant),
            }
        )
