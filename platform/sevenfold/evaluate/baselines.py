"""Baselines without a language model, to compare metrics with. All of them are deterministic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import regex

from sevenfold.data.text import UNSPACED, lead, tokens, words

__all__ = ["BM25", "Dictionary", "Nearest", "TfidfLogistic", "lead", "majority"]

MAX_SENTENCE_TOKENS = 100  # the dictionary learns from these first tokens of a sentence, as GIZA++
RARE_TERMS_FROM = 1000  # with this many texts or more, terms that occur in one text are ignored
_BATCH = 256  # texts whose similarities to all sources are in memory at once
_NULL_WORD = 0  # IBM Model 1's empty source word: it explains target words without a source word
# Spaces before closing punctuation and after opening punctuation, where `tokens` had none.
_EXTRA_SPACE = regex.compile(
    rf"(?<=[{UNSPACED}])\s+(?=[{UNSPACED}])|"
    r"\s+(?=[.,;:!?…\p{Pe}\p{Pf}\u3001\u3002\uff0c\uff01\uff1f])|(?<=[\p{Ps}\p{Pi}¿¡])\s+"
)


class Dictionary:
    """Word-for-word translation by IBM Model 1 (Brown et al., 1993, section 4.2), trained by EM.

    Each source word is replaced by the target word with the greatest p(target | source), spelled
    as in the targets. Words without an entry, such as rare ones, are copied. The word order stays.

    Args:
        sources: Sentences in the source language.
        targets: Their translations, one per source.
        rounds: Iterations of expectation maximization.
        minimum: Occurrences that a word needs to be learnt, on either side.
        limit: Maximum number of pairs of a source and a target word of the same sentence, about
            60 bytes each. Sentences beyond it are left out.

    Attributes:
        table: The target word of each source word; source words are in lower case.

    Raises:
        ValueError: The numbers of sources and targets differ.
    """

    def __init__(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        rounds: int = 5,
        minimum: int = 2,
        limit: int = 12_000_000,
    ):
        if len(sources) != len(targets):
            raise ValueError(
                f"expected as many targets as sources, found {len(targets)} and {len(sources)}"
            )
        source_tokens = [tokens(s.lower())[:MAX_SENTENCE_TOKENS] for s in sources]
        target_tokens = [tokens(t)[:MAX_SENTENCE_TOKENS] for t in targets]
        source_vocab = _vocabulary(source_tokens, minimum, [""])
        target_vocab = _vocabulary(target_tokens, minimum, [])
        source_ids, source_lengths = _encode(source_tokens, source_vocab, [_NULL_WORD])
        target_ids, target_lengths = _encode(target_tokens, target_vocab, [])
        pairs_so_far = np.cumsum(source_lengths * target_lengths)
        sentences = int(np.searchsorted(pairs_so_far, limit, side="right"))
        best = _train_model1(
            source_ids,
            source_lengths[:sentences],
            target_ids,
            target_lengths[:sentences],
            max(1, len(target_vocab)),
            rounds,
        )
        source_words, target_words = list(source_vocab), list(target_vocab)
        self.table = {source_words[i]: target_words[j] for i, j in best.items() if i != _NULL_WORD}

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Returns translations, capitalized where the source text is."""
        return [self._translate(t) for t in texts]

    def _translate(self, text: str) -> str:
        translated = " ".join(self.table.get(w.lower(), w) for w in tokens(text))
        translated = _EXTRA_SPACE.sub("", translated)
        if text.lstrip()[:1].isupper():
            return translated[:1].upper() + translated[1:]
        return translated


def _vocabulary(sentences: list[list[str]], min_count: int, reserved: list[str]) -> dict[str, int]:
    """Numbers the words from 0: the reserved ones, then the others by falling frequency.

    With this order, equal probabilities are resolved in favour of the more frequent word.
    """
    counts = Counter(chain.from_iterable(sentences))
    frequent = [w for w, n in counts.items() if n >= min_count]
    frequent.sort(key=lambda w: (-counts[w], w))
    return {w: i for i, w in enumerate([*reserved, *frequent])}


def _encode(
    sentences: list[list[str]], vocab: dict[str, int], prefix: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes sentences, without the words that are not in the vocabulary.

    Returns:
        The ids of all sentences end to end, int64 [total], and the number of ids of each sentence,
        the prefix included, int64 [sentences].
    """
    encoded = [prefix + [vocab[w] for w in sentence if w in vocab] for sentence in sentences]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum()))
    return flat, lengths


def _train_model1(
    source_ids: np.ndarray,
    source_lengths: np.ndarray,
    target_ids: np.ndarray,
    target_lengths: np.ndarray,
    target_vocab_size: int,
    rounds: int,
) -> dict[int, int]:
    """Returns the most probable target word of each source word.

    Args:
        source_ids: Word ids of all source sentences end to end.
        source_lengths: Words of each source sentence that is read.
        target_ids: As `source_ids`, of the target sentences.
        target_lengths: As `source_lengths`, of the target sentences.
        target_vocab_size: The number of target words.
        rounds: Iterations of expectation maximization.
    """
    source_lengths = source_lengths.astype(np.int32)
    target_lengths = target_lengths.astype(np.int32)
    # An occurrence is a source word and a target word of the same pair of sentences. The arrays
    # below have an entry per occurrence, therefore they are int32 and deleted early.
    occurrences = source_lengths * target_lengths  # per pair of sentences
    first_occurrence, first_source, first_target = (
        (np.cumsum(n) - n).astype(np.int32) for n in (occurrences, source_lengths, target_lengths)
    )
    within = np.arange(occurrences.sum(), dtype=np.int32)
    within -= np.repeat(first_occurrence, occurrences)
    target_position, source_position = np.divmod(within, np.repeat(source_lengths, occurrences))
    source_position += np.repeat(first_source, occurrences)
    target_position += np.repeat(first_target, occurrences)
    keys = source_ids[source_position] * target_vocab_size + target_ids[target_position]
    del within, source_position
    pairs, pair_of = np.unique(keys, return_inverse=True)  # distinct pairs; each occurrence's pair
    del keys
    pair_of = pair_of.astype(np.int32)
    source, target = np.divmod(pairs, target_vocab_size)
    p = np.ones(len(pairs))  # p(target | source); the first round makes it uniform
    for _ in range(rounds):
        # Expectation: each target word's count of 1 is shared among the source words beside it.
        share = p[pair_of]
        share /= np.bincount(target_position, share)[target_position]
        # Maximization: the probabilities of a source word's pairs sum to 1.
        counts = np.bincount(pair_of, share, len(pairs))
        p = counts / np.bincount(source, counts)[source]
    order = np.lexsort((target, -p, source))
    _, best = np.unique(source[order], return_index=True)
    return {int(source[i]): int(target[i]) for i in order[best]}


class Nearest:
    """Predicts the target of the nearest training source, by TF-IDF of words (scikit-learn).

    Args:
        sources: Training texts.
        targets: Their targets, one per source.

    Raises:
        ValueError: The numbers of sources and targets differ, or no source has a word.
    """

    def __init__(self, sources: Sequence[str], targets: Sequence[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        if len(sources) != len(targets):
            raise ValueError(
                f"expected as many targets as sources, found {len(targets)} and {len(sources)}"
            )
        self._targets = list(targets)
        self._vectorizer = TfidfVectorizer(analyzer=words)
        self._sources = self._vectorizer.fit_transform(sources).T.tocsr()  # [words, sources]

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Returns the target of the source that is nearest to each text.

        If several sources are equally near, the first one is used; so it is for a text that shares
        no word with any source.
        """
        predictions: list[str] = []
        for i in range(0, len(texts), _BATCH):
            vectors = self._vectorizer.transform(texts[i : i + _BATCH])
            similarities = (vectors @ self._sources).toarray()
            predictions += [self._targets[j] for j in similarities.argmax(axis=1)]
        return predictions


def majority(train_labels: Sequence[str], n: int) -> list[str]:
    """Returns the most frequent label n times; of equally frequent ones, the alphabetically first.

    Raises:
        ValueError: There are no labels.
    """
    if not train_labels:
        raise ValueError("expected training labels, found none")
    counts = Counter(train_labels)
    return [min(counts, key=lambda label: (-counts[label], label))] * n


class TfidfLogistic:
    """Logistic regression on TF-IDF of words and pairs of words (scikit-learn).

    Args:
        texts: Training texts.
        labels: Their classes, one per text.

    Raises:
        ValueError: The numbers of texts and labels differ, no text has a word, or there is only
            one class.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self._model = make_pipeline(
            TfidfVectorizer(
                tokenizer=words,
                token_pattern=None,
                lowercase=False,
                ngram_range=(1, 2),
                sublinear_tf=True,
                min_df=2 if len(texts) >= RARE_TERMS_FROM else 1,
                max_features=200_000,
            ),
            # C=1, the default, underfits rows that are scaled to length 1; newton-cg takes a
            # quarter of the time of lbfgs here.
            LogisticRegression(C=10, solver="newton-cg", max_iter=1000),
        )
        self._model.fit(texts, labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Returns the predicted class of each text."""
        return [str(label) for label in self._model.predict(texts)]


class BM25:
    """Search by BM25 (Robertson et al., 1995), in any language, without stemming.

    It is bm25s' variant "lucene" with k1 = 1.5 and b = 0.75.

    Args:
        corpus: The texts to search.

    Raises:
        ValueError: No text has a word.
    """

    def __init__(self, corpus: Sequence[str]):
        import bm25s

        corpus_words = [words(t) for t in corpus]
        if not any(corpus_words):
            raise ValueError("expected texts to search, found no words in them")
        self._size = len(corpus)
        self._index = bm25s.BM25()
        self._index.index(corpus_words, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Returns the score of each text, float [texts]; 0 if it shares no word with the query."""
        query_words = words(query)
        if not query_words:
            return np.zeros(self._size)
        return np.asarray(self._index.get_scores(query_words))
