"""The baselines that trained models are compared with."""

import subprocess
import sys

import numpy as np
import pytest

from sevenfold.evaluate.baselines import BM25, Dictionary, Nearest, TfidfLogistic, lead, majority


@pytest.mark.parametrize(
    ("text", "sentences", "expected"),
    [
        (
            "Mr. J. Smith left the U.S. in 1990. He went home. Then?",
            1,
            "Mr. J. Smith left the U.S. in 1990.",
        ),
        ("One. Two! Three? Four.", 3, "One. Two! Three?"),
        ("It cost 3.5 million, e.g. much. Next.", 1, "It cost 3.5 million, e.g. much."),
        ('She said "no." He said “yes.” End.', 2, 'She said "no." He said “yes.”'),
        ("Wrapped\n  in the middle. Next", 1, "Wrapped in the middle."),
        ("A heading\n\nThe first sentence. More.", 2, "A heading The first sentence."),
        ("今天。「明天！」後天？", 2, "今天。「明天！」"),  # noqa: RUF001 (full-width signs on purpose)
        ("यह एक है। वह दो है।", 1, "यह एक है।"),
        ("Only one", 3, "Only one"),
        ("  ", 3, ""),
    ],
)
def test_lead_takes_the_first_sentences(text: str, sentences: int, expected: str) -> None:
    assert lead(text, sentences) == expected


def test_ibm_model_1_learns_a_dictionary() -> None:
    # no word stands alone here: only the other sentences show which word means which
    sources = [
        "das Haus",
        "das Buch",
        "ein Buch",
        "ein Haus .",
        "das kleine Haus",
        "ein kleines Buch .",
    ]
    targets = ["the house", "the book", "a book", "a house .", "the small house", "a small book ."]
    model = Dictionary(sources, targets, rounds=30, minimum=1)
    assert {
        word: model.table[word] for word in ("das", "ein", "haus", "buch", "kleine", "kleines")
    } == {
        "das": "the",
        "ein": "a",
        "haus": "house",
        "buch": "book",
        "kleine": "small",
        "kleines": "small",
    }
    assert model.predict(["Das Buch, ein Zebra.", "das haus", ""]) == [
        "The book, a Zebra.",
        "the house",
        "",
    ]


def test_ibm_model_1_learns_words_in_any_order() -> None:
    rng = np.random.default_rng(0)
    frequency = 1 / np.arange(1, 201)
    sentences = [rng.choice(200, 8, p=frequency / frequency.sum()) for _ in range(2000)]
    sources = [" ".join(f"s{i}" for i in sentence) for sentence in sentences]
    targets = [" ".join(f"t{i}" for i in rng.permutation(sentence)) for sentence in sentences]
    table = Dictionary(sources, targets).table
    assert np.mean([table[f"s{i}"] == f"t{i}" for i in range(200)]) > 0.98
    assert Dictionary(sources, targets).table == table


def test_rare_words_and_words_past_the_limit_are_copied() -> None:
    sources = ["eins zwei"] * 2 + ["eins drei"] + ["vier"] * 2
    targets = ["one two"] * 2 + ["one three"] + ["four"] * 2
    assert Dictionary(sources, targets).predict(["drei vier"]) == ["drei four"]
    # the texts before it have 2 x 3 x 2 + 2 x 1 pairs of words
    assert Dictionary(sources, targets, limit=15).predict(["vier"]) == ["vier"]
    assert Dictionary([], []).predict(["Hallo Welt"]) == ["Hallo Welt"]
    # a single pair of texts cannot use up the limit
    long = Dictionary(["eins " * 9000, "eins"], ["one " * 9000, "one"])
    assert long.predict(["eins"]) == ["one"]
    with pytest.raises(ValueError, match="found 1 and 2"):
        Dictionary(["a", "b"], ["a"])


def test_the_dictionary_uses_the_case_and_spacing_of_the_targets() -> None:
    sources = ["the dog", "the man", "( the dog )", "the man !", "dog )", "man"]
    targets = ["der Hund", "der Mann", "( der Hund )", "der Mann !", "Hund )", "Mann"]
    model = Dictionary(sources, targets, rounds=20, minimum=1)
    assert model.predict(["The dog (the man)!"]) == ["Der Hund (der Mann)!"]


def test_nearest_predicts_the_target_of_the_most_similar_source() -> None:
    model = Nearest(
        ["how is the weather", "what is the time", "हिन्दी में"], ["rain", "noon", "hindi"]
    )
    assert model.predict(["The WEATHER today?", "time", "हिन्दी", "nothing known"]) == [
        "rain",
        "noon",
        "hindi",
        "rain",
    ]
    assert model.predict(["time"] * 600) == ["noon"] * 600
    assert model.predict([]) == []
    with pytest.raises(ValueError, match="found 1 and 2"):
        Nearest(["a b", "c d"], ["a"])


def test_majority_predicts_the_most_frequent_label() -> None:
    assert majority(["b", "a", "b"], 2) == ["b", "b"]
    assert majority(["b", "a"], 1) == ["a"]
    with pytest.raises(ValueError, match="found none"):
        majority([], 1)


# from 1000 texts on, words that occur in a single text only are dropped
@pytest.mark.parametrize("texts", [40, 1200])
def test_logistic_regression_learns_words_and_their_order(texts: int) -> None:
    rng = np.random.default_rng(0)
    pairs = [("not bad", "good"), ("bad not", "poor"), ("fine", "good"), ("awful", "poor")]
    drawn = [pairs[i] for i in rng.integers(0, 4, texts)]
    rows = [f"filler{rng.integers(9)} {words} filler{rng.integers(9)}" for words, _ in drawn]
    model = TfidfLogistic(rows, [label for _, label in drawn])
    assert model.predict(["Not bad.", "bad, not!", "fine", "awful filler3"]) == [
        "good",
        "poor",
        "good",
        "poor",
    ]


def test_bm25_ranks_matching_texts_first() -> None:
    texts = [
        "a cat sat on the mat",
        "the dog barked at the cat",
        "stocks fell",
        "stocks fell",
        "",
        "北京是首都",
        "dog " * 9,
    ]
    model = BM25(texts)

    def best(query: str) -> list[int]:
        scores = model.scores(query)
        return [i for i in np.argsort(-scores, kind="stable").tolist() if scores[i] > 0]

    assert best("Cat on a mat") == [0, 1]
    assert best("DOG barked")[:2] == [1, 6]
    assert best("stocks") == [2, 3] and len(set(model.scores("stocks")[2:4])) == 1
    assert best("unheard of words") == best("") == []
    assert best("北京") == [5]
    assert set(best("the")) == {0, 1}
    with pytest.raises(ValueError, match="no word"):
        BM25(["", " "])


def test_bm25_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    BM25(["some text"]).scores("text")
    assert capfd.readouterr() == ("", "")


def test_measures_and_baselines_need_no_torch_and_no_ray() -> None:
    code = (
        "import sys, sevenfold.evaluate.metrics, sevenfold.evaluate.baselines, "
        "sevenfold.evaluate.compare, sevenfold.evaluate.harness; "
        "print({'torch', 'ray', 'lm_eval', 'sklearn'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "set()"
