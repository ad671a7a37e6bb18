"""Metrics of generated text, classification, retrieval and language modelling.

They are computed by the libraries that papers use (sacrebleu, rouge-score, scikit-learn) where
there is one. The module also has two baselines for language models: a unigram model and xz.
"""

from __future__ import annotations

import functools
import lzma
import math
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import regex

from sevenfold.data.text import UNSPACED, bleu_tokenizer, words

# Per prediction, its reference or its several references.
References = Sequence[str | Sequence[str]]
ARTICLES = {"a", "an", "the"}
_WORDS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^{UNSPACED}\s]+")
_PUNCTUATION = regex.compile(rf"\p{{P}}|[{regex.escape(string.punctuation)}]")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns the mean F1 of ROUGE-1, -2 and -L, 0 to 1 (rouge-score, with stemming).

    The words are those of `text.words`, in any script; rouge-score itself knows only a to z and
    digits. English words are stemmed as there. A text without words scores 0.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, tokenizer=_Stems())
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {k: float(np.mean([s[k].fmeasure for s in scores])) if scores else 0.0 for k in kinds}


class _Stems:
    """The tokenizer that rouge-score is given."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = functools.lru_cache(maxsize=100_000)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """Returns the words; those of more than three letters a to z as their stems."""
        return [self._stem(w) if len(w) > 3 and w.isascii() else w for w in words(text)]


def bleu(
    predictions: Sequence[str], references: References, tokenize: str | None = None
) -> dict[str, float | str]:
    """Returns corpus BLEU and chrF2, 0 to 100, with sacrebleu's signatures (arXiv 1804.08771).

    Args:
        predictions: The generated texts.
        references: The reference of each prediction, or its several references.
        tokenize: sacrebleu's name of BLEU's tokenizer. None: that of the references' script, see
            `text.bleu_tokenizer`.

    Raises:
        ValueError: The numbers of predictions and references differ, or sacrebleu has no such
            tokenizer.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"expected as many references as predictions, "
            f"found {len(references)} and {len(predictions)}"
        )
    scores: dict[str, float | str] = {}
    for name, metric in corpus_metrics(references or [""], tokenize).items():
        # sacrebleu fails on an empty corpus: it is scored as one empty line.
        scores[name.lower()] = float(metric.corpus_score(list(predictions) or [""], None).score)
        scores[f"{name.lower()}_signature"] = str(metric.get_signature())
    return scores


def corpus_metrics(references: References, tokenize: str | None = None) -> dict[str, Any]:
    """Returns sacrebleu's BLEU and chrF objects for these references.

    Raises:
        ValueError: sacrebleu has no such tokenizer, or it needs packages that are not installed.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if tokenize is None:
        tokenize = bleu_tokenizer(text for rs in references for text in as_references(rs))
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(
            f"expected a tokenizer of {', '.join(BLEU.TOKENIZERS)}, found {tokenize!r}"
        )
    # sacrebleu expects the first reference of every sentence, then the second of every one, ...
    columns = list(zip_longest(*map(as_references, references)))
    return {"BLEU": BLEU(tokenize=tokenize, references=columns), "chrF": CHRF(references=columns)}


def as_references(reference: str | Sequence[str]) -> Sequence[str]:
    """Returns a single reference as a list of one, and several references as they are."""
    return [reference] if isinstance(reference, str) else reference


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Returns the share of predictions that equal a reference, 0 to 1 (SQuAD, arXiv 1606.05250).

    Case, punctuation, English articles and white space do not matter: see `answer_words`.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    pairs = zip(predictions, references, strict=True)
    return _mean(
        [
            float(any(answer_words(p) == answer_words(r) for r in as_references(rs)))
            for p, rs in pairs
        ]
    )


def token_f1(predictions: Sequence[str], references: References) -> float:
    """Returns the mean F1 of the words shared with the best reference, 0 to 1 (SQuAD).

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    pairs = zip(predictions, references, strict=True)
    return _mean(
        [
            max((_f1(answer_words(p), answer_words(r)) for r in as_references(rs)), default=0.0)
            for p, rs in pairs
        ]
    )


def answer_words(text: str) -> list[str]:
    """Returns the words that SQuAD compares: lower case, no punctuation, no English articles.

    As in MLQA (arXiv 1910.07475), the punctuation of all scripts is removed, and scripts without
    spaces between words are split into characters. The text is in the normal form NFKC.
    """
    plain = _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).lower())
    return [w for w in _WORDS.findall(plain) if w not in ARTICLES]


def _f1(predicted: list[str], reference: list[str]) -> float:
    """Returns the F1 of the shared words; as in SQuAD 2, an empty answer matches only another."""
    if not predicted or not reference:
        return float(predicted == reference)
    shared = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * shared / (len(predicted) + len(reference))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def classification(
    predicted: Sequence[str], true: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
    """Returns accuracy, micro and macro F1, and each class's precision, recall and F1, 0 to 1.

    The F1s are scikit-learn's. The macro F1 is the mean over the classes that occur as a true or a
    predicted label. A prediction that is not a class counts as a miss of the true class; a class
    that was never predicted has precision 0.

    Args:
        predicted: The predicted label of each text.
        true: The label of each text; it need not be a class that the model knows.
        classes: The classes that the model can predict.

    Returns:
        The metrics; `classes` is the number of classes of the macro F1.

    Raises:
        ValueError: The numbers of labels differ.
    """
    from sklearn.metrics import precision_recall_fscore_support

    hits = [float(p == t) for p, t in zip(predicted, true, strict=True)]
    known = list(dict.fromkeys([*classes, *sorted(set(true))]))
    occurring = set(true) | set(predicted)
    labels = [c for c in known if c in occurring]
    if not labels:
        return {"accuracy": 0.0, "f1_micro": 0.0, "f1_macro": 0.0, "classes": 0, "per_class": {}}
    pairs, options = (list(true), list(predicted)), {"labels": labels, "zero_division": 0}
    columns = precision_recall_fscore_support(*pairs, **options)
    return {
        "accuracy": _mean(hits),
        "f1_micro": float(precision_recall_fscore_support(*pairs, **options, average="micro")[2]),
        "f1_macro": float(precision_recall_fscore_support(*pairs, **options, average="macro")[2]),
        "classes": len(labels),
        "per_class": {
            c: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for c, p, r, f, n in zip(labels, *columns, strict=True)
        },
    }


def rank(scores: np.ndarray, relevant: Collection[int], k: int) -> list[int]:
    """Returns the indices of the k best documents of a query, best first.

    Documents whose scores are equal to 5 decimals are tied, since the same text has slightly other
    vectors beside longer texts. Of tied documents those that are not relevant come first, so that a
    system which cannot tell documents apart gains nothing by their order. A score that is not a
    number is the lowest.

    Args:
        scores: The score of each document, float [documents].
        relevant: The indices of the relevant documents.
        k: The number of documents to return.
    """
    rounded = np.round(np.where(np.isnan(scores), -np.inf, scores), 5)
    is_relevant = np.zeros(len(scores), bool)
    is_relevant[list(relevant)] = True
    order = np.lexsort((is_relevant, -rounded))
    return [int(i) for i in order[:k]]


def retrieval(
    ranked: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int = 10
) -> dict[str, float]:
    """Returns nDCG, MRR and recall at k, 0 to 1, as computed by trec_eval and BEIR.

    They are means over the queries that have a relevant id (BEIR: arXiv 2104.08663). An id that is
    ranked twice counts at its first rank.

    nDCG: a relevant id at rank i gains 1 / log2(i + 1); the sum is divided by that of the best
    order (Järvelin and Kekäläinen, 2002, with the discount of Burges et al., 2005).
    MRR: 1 / rank of the first relevant id, 0 if that is below rank k (Voorhees, 1999).
    Recall: the share of the relevant ids that are among the first k.

    Args:
        ranked: The ids found for each query, best first.
        relevant: The relevant ids of each query.
        k: The number of ranks that count.

    Raises:
        ValueError: The numbers of queries differ, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"expected k of 1 or more, found {k}")
    gains = 1 / np.log2(np.arange(k) + 2)
    scores = []
    for found, wanted in zip(ranked, relevant, strict=True):
        relevant_ids = set(wanted)
        if not relevant_ids:
            continue
        top = list(dict.fromkeys(found))[:k]
        ranks = [i for i, x in enumerate(top) if x in relevant_ids]  # from 0
        best = gains[: len(relevant_ids)].sum()
        ndcg = gains[ranks].sum() / best
        reciprocal_rank = 1 / (ranks[0] + 1) if ranks else 0.0
        recall = len(ranks) / len(relevant_ids)
        scores.append((ndcg, reciprocal_rank, recall))
    means = np.mean(scores, axis=0) if scores else np.zeros(3)
    return {
        f"{name}@{k}": float(m) for name, m in zip(("ndcg", "mrr", "recall"), means, strict=True)
    }


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Returns overlapping windows over a text that is longer than the model's context.

    Every token but the first is scored in exactly one window, with at least `context - stride`
    tokens before it where there are as many (huggingface.co/docs/transformers/perplexity).
    The stride must be smaller than the context, since the first token of a window is not predicted
    in it.

    Args:
        length: Tokens of the text.
        context: Tokens that the model reads at once.
        stride: Tokens from the start of a window to the start of the next one.

    Returns:
        (start, stop, first scored token) of each window, all counted within the text.

    Raises:
        ValueError: The stride is not between 1 and context - 1.
    """
    if not 1 <= stride < context:
        raise ValueError(
            f"expected 1 <= stride < context, found stride {stride} and context {context}"
        )
    spans: list[tuple[int, int, int]] = []
    first = 1
    while first < length:
        start = len(spans) * stride
        stop = min(start + context, length)
        spans.append((start, stop, first))
        first = stop
    return spans


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Converts the sum of -log p over a text, in nats, to bits per byte of the text."""
    return nats / math.log(2) / text_bytes


def unigram_bits_per_byte(
    train: np.ndarray, heldout: np.ndarray, heldout_bytes: int, vocab_size: int
) -> float:
    """Returns the bits per byte of a unigram model with add-one smoothing.

    Args:
        train: Token ids to count, of any shape.
        heldout: Token ids to predict, of any shape.
        heldout_bytes: Bytes of the text that the held-out tokens stand for.
        vocab_size: The size of the vocabulary.
    """
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0
    return bits_per_byte(
        float(-np.log(counts / counts.sum())[heldout.ravel()].sum()), heldout_bytes
    )


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Returns the bits per byte of the texts, joined and compressed by `xz -9`."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)
