import subprocess
import sys

import numpy as np
import pytest

from sevenfold.evaluate.baselines import BM25, Dictionary, Nearest, TfidfLogistic, lead, majority


@pytest.mark.parametrize(
    ("text", "sentences", "expected"),
    [
        ("Mr. J. Smith left the U.S. in 1990. He went home. Then?", 1, "Mr. J. Smith left the U.S. in 1990."),
        ("One. Two! Three? Four.", 3, "One. Two! Three?"),
        ("It cost 3.5 million, e.g. much. Next.", 1, "It cost 3.5 million, e.g. much."),
        ('She said "no." He said “yes.” End.', 2, 'She said "no." He said “yes.”'),
        ("Wrapped\n  in the middle. Next", 1, "Wrapped in the middle."),
        ("A heading\n\nThe first sentence. More.", 2, "A heading The first sentence."),
        ("今天。「明天！」後天？", 2, "今天。「明天！」"),  # noqa: RUF001
        ("यह एक है। वह दो है।", 1, "यह एक है।"),
        ("Only one", 3, "Only one"),
        ("  ", 3, ""),
    ],
)
def test_lead(text: str, sentences: int, expected: str) -> None:
    assert lead(text, sentences) == expected


def test_model_1_learns_the_words_of_brown_et_al() -> None:
    # no word is ever alone in these, so only the other sentences say which is which
    sources = ["das Haus", "das Buch", "ein Buch", "ein Haus .", "das kleine Haus", "ein kleines Buch ."]
    targets = ["the house", "the book", "a book", "a house .", "the small house", "a small book ."]
    model = Dictionary(sources, targets, rounds=30, minimum=1)
    assert {w: model.table[w] for w in ("das", "ein", "haus", "buch", "kleine", "kleines")} == {
        "das": "the", "ein": "a", "haus": "house", "buch": "book", "kleine": "small", "kleines": "small",
    }  # fmt: skip
    assert model.predict(["Das Buch, ein Zebra.", "das haus", ""]) == ["The book, a Zebra.", "the house", ""]


def test_model_1_finds_a_shuffled_vocabulary_however_words_are_ordered() -> None:
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 201)
    drawn = [rng.choice(200, 8, p=share / share.sum()) for _ in range(2000)]
    sources = [" ".join(f"s{i}" for i in d) for d in drawn]
    targets = [" ".join(f"t{i}" for i in rng.permutation(d)) for d in drawn]
    table = Dictionary(sources, targets).table
    assert np.mean([table[f"s{i}"] == f"t{i}" for i in range(200)]) > 0.98
    assert Dictionary(sources, targets).table == table


def test_rare_words_and_what_is_past_the_limit_are_copied() -> None:
    sources, targets = ["eins zwei"] * 2 + ["eins drei"] + ["vier"] * 2, ["one two"] * 2 + ["one three"] + ["four"] * 2
    assert Dictionary(sources, targets).predict(["drei vier"]) == ["drei four"]
    assert Dictionary(sources, targets, limit=15).predict(["vier"]) == ["vier"]  # 2 x 3 x 2 + 2 x 1 pairs of words before
    assert Dictionary([], []).predict(["Hallo Welt"]) == ["Hallo Welt"]
    long = Dictionary(["eins " * 9000, "eins"], ["one " * 9000, "one"])  # one pair of texts does not use up the limit
    assert long.predict(["eins"]) == ["one"]
    with pytest.raises(ValueError, match="found 1 and 2"):
        Dictionary(["a", "b"], ["a"])


def test_the_dictionary_writes_as_the_targets_do() -> None:
    sources = ["the dog", "the man", "( the dog )", "the man !", "dog )", "man"]
    targets = ["der Hund", "der Mann", "( der Hund )", "der Mann !", "Hund )", "Mann"]
    model = Dictionary(sources, targets, rounds=20, minimum=1)
    assert model.predict(["The dog (the man)!"]) == ["Der Hund (der Mann)!"]


def test_nearest() -> None:
    model = Nearest(["how is the weather", "what is the time", "हिन्दी में"], ["rain", "noon", "hindi"])
    assert model.predict(["The WEATHER today?", "time", "हिन्दी", "nothing known"]) == ["rain", "noon", "hindi", "rain"]
    assert model.predict(["time"] * 600) == ["noon"] * 600
    assert model.predict([]) == []
    with pytest.raises(ValueError, match="found 1 and 2"):
        Nearest(["a b", "c d"], ["a"])


def test_majority() -> None:
    assert majority(["b", "a", "b"], 2) == ["b", "b"]
    assert majority(["b", "a"], 1) == ["a"]
    with pytest.raises(ValueError, match="found none"):
        majority([], 1)


@pytest.mark.parametrize("texts", [40, 1200])  # from 1000 on, what is in one text only is left out
def test_logistic_regression_learns_words_and_their_order(texts: int) -> None:
    rng = np.random.default_rng(0)
    pairs = [("not bad", "good"), ("bad not", "poor"), ("fine", "good"), ("awful", "poor")]
    picked = [pairs[i] for i in rng.integers(0, 4, texts)]
    rows = [f"filler{rng.integers(9)} {words} filler{rng.integers(9)}" for words, _ in picked]
    model = TfidfLogistic(rows, [label for _, label in picked])
    assert model.predict(["Not bad.", "bad, not!", "fine", "awful filler3"]) == ["good", "poor", "good", "poor"]


def test_bm25_finds() -> None:
    texts = ["a cat sat on the mat", "the dog barked at the cat", "stocks fell", "stocks fell", "", "北京是首都", "dog " * 9]
    model = BM25([f"d{i}" for i in range(len(texts))], texts)
    found = model.search(["Cat on a mat", "DOG barked", "stocks", "unheard of words", "", "北京", "stocks"], k=2)
    assert found[0] == ["d0", "d1"]
    assert found[1] == ["d1", "d6"]
    assert found[2] == found[6] == ["d2", "d3"]  # equals in the corpus' order
    assert found[3:5] == [[], []]
    assert found[5] == ["d5"]
    assert set(model.search(["the"], k=99)[0]) == {"d0", "d1"}
    for bad, message in ((["x"], "found 1 and 2"), (["x", "y"], "no word")):
        with pytest.raises(ValueError, match=message):
            BM25(bad, ["", " "])


def test_bm25_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    BM25(["a"], ["some text"]).search(["text"], 1)
    assert capfd.readouterr() == ("", "")


def test_measures_and_baselines_need_no_torch_and_no_ray() -> None:
    code = (
        "import sys, sevenfold.evaluate.metrics, sevenfold.evaluate.baselines, sevenfold.evaluate.compare, "
        "sevenfold.evaluate.harness; print({'torch', 'ray', 'lm_eval', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
