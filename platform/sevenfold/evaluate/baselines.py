"""What a figure is read beside: the methods that need no language model. The same input gives the same output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import regex

from sevenfold.evaluate.text import lead, tokens, words

__all__ = ["BM25", "Dictionary", "Nearest", "TfidfLogistic", "lead", "majority"]

RARE = 1000  # texts from which on those words and pairs of words that are in one text only say nothing
LONGEST = 100  # words of a sentence that the dictionary learns from, as GIZA++ had it
_BATCH = 256  # texts whose similarities to all sources are held at once
_NOTHING = 0  # the source word that explains target words without one
_NEEDLESS = regex.compile(r"\s+(?=[.,;:!?…\p{Pe}\p{Pf}\u3001\u3002\uff0c\uff01\uff1f])|(?<=[\p{Ps}\p{Pi}¿¡])\s+")


class Dictionary:
    """Word-for-word translation by IBM Model 1 (Brown et al., 1993, section 4.2), trained by expectation maximization.

    Each source word becomes the target word of the greatest p(target | source), as the targets write it; words seen too
    seldom are copied. The word order stays.
    """

    def __init__(
        self, sources: Sequence[str], targets: Sequence[str], rounds: int = 5, minimum: int = 2, limit: int = 12_000_000
    ):
        """
        Args:
            rounds: of expectation maximization.
            minimum: of occurrences that a word needs, on either side.
            limit: of pairs of a source and a target word, some 60 bytes each; sentences after that are left out.

        Raises:
            ValueError: lengths differ.
        """
        if len(sources) != len(targets):
            raise ValueError(f"expected as many targets as sources, found {len(targets)} and {len(sources)}")
        left = [tokens(s.lower())[:LONGEST] for s in sources]
        right = [tokens(t)[:LONGEST] for t in targets]
        from_words, to_words = _vocabulary(left, minimum, [""]), _vocabulary(right, minimum, [])
        s, s_size = _encoded(left, from_words, [_NOTHING])
        t, t_size = _encoded(right, to_words, [])
        kept = int(np.searchsorted(np.cumsum(s_size * t_size), limit, side="right"))
        best = _model1(s, s_size[:kept], t, t_size[:kept], max(1, len(to_words)), rounds)
        names = list(from_words), list(to_words)
        self.table = {names[0][i]: names[1][j] for i, j in best.items() if i != _NOTHING}

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Translations; the first letter is a capital where the source's is."""
        return [self._translated(t) for t in texts]

    def _translated(self, text: str) -> str:
        made = _NEEDLESS.sub("", " ".join(self.table.get(w.lower(), w) for w in tokens(text)))
        return made[:1].upper() + made[1:] if text.lstrip()[:1].isupper() else made


def _vocabulary(sentences: list[list[str]], minimum: int, first: list[str]) -> dict[str, int]:
    """Ids from 0, the most frequent words first, so that equal probabilities fall to the more frequent word."""
    counts = Counter(chain.from_iterable(sentences))
    order = sorted((w for w, n in counts.items() if n >= minimum), key=lambda w: (-counts[w], w))
    return {w: i for i, w in enumerate([*first, *order])}


def _encoded(sentences: list[list[str]], ids: dict[str, int], first: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the known words end to end, and how many there are of each sentence."""
    coded = [first + [ids[w] for w in sentence if w in ids] for sentence in sentences]
    sizes = np.array([len(c) for c in coded], dtype=np.int64)
    return np.fromiter(chain.from_iterable(coded), dtype=np.int64, count=int(sizes.sum())), sizes


def _model1(s: np.ndarray, s_size: np.ndarray, t: np.ndarray, t_size: np.ndarray, t_words: int, rounds: int) -> dict[int, int]:
    """The likeliest target word of each source word.

    Args:
        s, t: word ids of all sentences end to end.
        s_size, t_size: words of each sentence that is read.
    """
    s_size, t_size = s_size.astype(np.int32), t_size.astype(np.int32)
    met = s_size * t_size  # pairs of words that stand in one pair of sentences
    begin = [(np.cumsum(n) - n).astype(np.int32) for n in (met, s_size, t_size)]
    within = np.arange(met.sum(), dtype=np.int32) - np.repeat(begin[0], met)
    place, row = np.divmod(within, np.repeat(s_size, met))
    row += np.repeat(begin[1], met)
    place += np.repeat(begin[2], met)  # of the target word
    keys = s[row] * t_words + t[place]
    del within, row
    pairs, which = np.unique(keys, return_inverse=True)
    del keys
    which = which.astype(np.int32)
    source, target = np.divmod(pairs, t_words)
    p = np.ones(len(pairs))
    for _ in range(rounds):
        share = p[which]
        share /= np.bincount(place, share)[place]
        counts = np.bincount(which, share, len(pairs))
        p = counts / np.bincount(source, counts)[source]
    order = np.lexsort((target, -p, source))
    _, firsts = np.unique(source[order], return_index=True)
    return {int(source[i]): int(target[i]) for i in order[firsts]}


class Nearest:
    """The target of the training source that is nearest to a text, by TF-IDF of words (scikit-learn)."""

    def __init__(self, sources: Sequence[str], targets: Sequence[str]):
        """Raises ValueError where lengths differ or no source has a word."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        if len(sources) != len(targets):
            raise ValueError(f"expected as many targets as sources, found {len(targets)} and {len(sources)}")
        self.targets = list(targets)
        self.vectorizer = TfidfVectorizer(analyzer=words)
        self.known = self.vectorizer.fit_transform(sources).T.tocsr()

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Of equally near sources the first one's target; so of a text that shares no word with any."""
        found: list[str] = []
        for i in range(0, len(texts), _BATCH):
            near = (self.vectorizer.transform(texts[i : i + _BATCH]) @ self.known).toarray()
            found += [self.targets[j] for j in near.argmax(axis=1)]
        return found


def majority(train_labels: Sequence[str], n: int) -> list[str]:
    """n times the most frequent label, the first in order of equals. Raises ValueError for no labels."""
    if not train_labels:
        raise ValueError("expected labels to count, found none")
    counts = Counter(train_labels)
    return [min(counts, key=lambda c: (-counts[c], c))] * n


class TfidfLogistic:
    """Logistic regression on TF-IDF of words and pairs of words (scikit-learn)."""

    def __init__(self, texts: Sequence[str], labels: Sequence[str]):
        """Raises ValueError where lengths differ, no text has a word, or all labels are one."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.model = make_pipeline(
            TfidfVectorizer(
                tokenizer=words, token_pattern=None, lowercase=False, ngram_range=(1, 2), sublinear_tf=True,
                min_df=2 if len(texts) >= RARE else 1, max_features=200_000,
            ),
            # C=1, the default, underfits rows of length one; newton-cg takes a quarter of lbfgs' time here
            LogisticRegression(C=10, solver="newton-cg", max_iter=1000),
        )  # fmt: skip
        self.model.fit(texts, labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        return [str(c) for c in self.model.predict(texts)]


class BM25:
    """Search by BM25 (Robertson et al., 1995; bm25s' Lucene variant, k1 = 1.5, b = 0.75), any language, no stemming."""

    def __init__(self, corpus_ids: Sequence[str], corpus_texts: Sequence[str]):
        """Raises ValueError where lengths differ or no text has a word."""
        import bm25s

        if len(corpus_ids) != len(corpus_texts):
            raise ValueError(f"expected as many ids as texts, found {len(corpus_ids)} and {len(corpus_texts)}")
        split = [words(t) for t in corpus_texts]
        if not any(split):
            raise ValueError("expected texts to search, found no word")
        self.ids = list(corpus_ids)
        self.index = bm25s.BM25()
        self.index.index(split, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[list[str]]:
        """Ids of each query's k best texts, best first, of equals the earlier; fewer where fewer share a word with it."""
        found = []
        for query in queries:
            asked = words(query)
            scores = self.index.get_scores(asked) if asked else np.zeros(len(self.ids))
            hits = np.flatnonzero(scores > 0)
            found.append([self.ids[i] for i in hits[np.argsort(-scores[hits], kind="stable")][:k]])
        return found
