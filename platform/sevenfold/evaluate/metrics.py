"""Measures, by the field's own libraries, and the baselines that a figure is read beside."""

from __future__ import annotations

import lzma
import math
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import regex

from sevenfold.evaluate.text import UNSPACED

References = Sequence[str | Sequence[str]]  # of each prediction its reference, or its several
ARTICLES = {"a", "an", "the"}
_PARTS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^{UNSPACED}\s]+")
_SIGNS = regex.compile(rf"\p{{P}}|[{regex.escape(string.punctuation)}]")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L (rouge-score, with stemming), 0 to 1. Raises ValueError where lengths differ."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {k: float(np.mean([s[k].fmeasure for s in scores])) if scores else 0.0 for k in kinds}


def bleu(predictions: Sequence[str], references: References, tokenize: str = "13a") -> dict[str, float | str]:
    """BLEU and chrF2 of the whole corpus, 0 to 100, by sacrebleu (arXiv 1804.08771), with what it calls them in full.

    Args:
        tokenize: sacrebleu's name of BLEU's tokenizer: 13a; zh, ja-mecab, ko-mecab or char where words have no spaces.

    Raises:
        ValueError: lengths differ, or sacrebleu has no such tokenizer.
    """
    if len(predictions) != len(references):
        raise ValueError(f"expected as many references as predictions, found {len(references)} and {len(predictions)}")
    found: dict[str, float | str] = {}
    for name, metric in corpus_metrics(references or [""], tokenize).items():
        # sacrebleu knows no empty corpus: an empty line stands for it
        found[name.lower()] = float(metric.corpus_score(list(predictions) or [""], None).score)
        found[f"{name.lower()}_signature"] = str(metric.get_signature())
    return found


def corpus_metrics(references: References, tokenize: str = "13a") -> dict[str, Any]:
    """sacrebleu's BLEU and chrF, which hold the references. Raises ValueError where it has no such tokenizer."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"expected a tokenizer of {', '.join(BLEU.TOKENIZERS)}, found {tokenize!r}")
    columns = list(zip_longest(*map(several, references)))
    return {"BLEU": BLEU(tokenize=tokenize, references=columns), "chrF": CHRF(references=columns)}


def several(reference: str | Sequence[str]) -> Sequence[str]:
    """A reference as the list that it may be."""
    return [reference] if isinstance(reference, str) else reference


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share that is a reference but for case, punctuation, articles and white space, 0 to 1 (SQuAD, arXiv 1606.05250).

    Raises ValueError where lengths differ.
    """
    pairs = zip(predictions, references, strict=True)
    return _mean([float(any(answer_words(p) == answer_words(r) for r in several(rs))) for p, rs in pairs])


def token_f1(predictions: Sequence[str], references: References) -> float:
    """Mean F1 of the words shared with the best reference, 0 to 1 (SQuAD, arXiv 1606.05250). ValueError as above."""
    pairs = zip(predictions, references, strict=True)
    return _mean([max((_shared(answer_words(p), answer_words(r)) for r in several(rs)), default=0.0) for p, rs in pairs])


def answer_words(text: str) -> list[str]:
    """What SQuAD compares: lower case, without punctuation and English articles, split at white space.

    As in MLQA (arXiv 1910.07475), punctuation is that of any script, and scripts without spaces are split into characters.
    """
    plain = _SIGNS.sub("", unicodedata.normalize("NFC", text).lower())
    return [w for w in _PARTS.findall(plain) if w not in ARTICLES]


def _shared(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    both = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * both / (len(predicted) + len(reference))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def classification(predicted: Sequence[str], true: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, F1 over all classes (micro), mean F1 of the classes (macro) and each class's own, 0 to 1, by scikit-learn.

    A prediction that is no class counts as a miss of the true one; a class that nobody predicted has precision 0.

    Raises:
        ValueError: lengths differ, or a true label is no class.
    """
    from sklearn.metrics import precision_recall_fscore_support

    if strange := set(true) - set(classes):
        raise ValueError(f"expected true labels of {list(classes)}, found {sorted(strange)}")
    hits = [float(p == t) for p, t in zip(predicted, true, strict=True)]
    if not hits:
        zero = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
        return {"accuracy": 0.0, "f1_micro": 0.0, "f1_macro": 0.0, "per_class": {c: dict(zero) for c in classes}}
    both, common = (list(true), list(predicted)), {"labels": list(classes), "zero_division": 0}
    columns = precision_recall_fscore_support(*both, **common)
    return {
        "accuracy": _mean(hits),
        "f1_micro": float(precision_recall_fscore_support(*both, **common, average="micro")[2]),
        "f1_macro": float(precision_recall_fscore_support(*both, **common, average="macro")[2]),
        "per_class": {
            c: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for c, p, r, f, n in zip(classes, *columns, strict=True)
        },
    }


def retrieval(ranked: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], k: int = 10) -> dict[str, float]:
    """Means over the queries that have something relevant, as trec_eval and BEIR (arXiv 2104.08663) take them, 0 to 1.

    nDCG: each relevant id at rank i is worth 1 / log2(i + 1), over the worth of the best order (Järvelin and Kekäläinen,
    2002, with the discount of Burges et al., 2005). MRR: 1 / rank of the first relevant one, 0 if below k (Voorhees, 1999).
    Recall: share of the relevant ids found. An id that is ranked twice counts at its first place.

    Args:
        ranked: of each query the ids found, best first.
        relevant: of each query the ids to find.

    Raises:
        ValueError: lengths differ, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"expected k of 1 or more, found {k}")
    worth = 1 / np.log2(np.arange(k) + 2)
    rows = []
    for found, wanted in zip(ranked, relevant, strict=True):
        if not (asked := set(wanted)):
            continue
        ranks = [i for i, x in enumerate(list(dict.fromkeys(found))[:k]) if x in asked]
        best = worth[: len(asked)].sum()
        rows.append((worth[ranks].sum() / best, 1 / (ranks[0] + 1) if ranks else 0.0, len(ranks) / len(asked)))
    means = np.mean(rows, axis=0) if rows else np.zeros(3)
    return {f"{name}@{k}": float(m) for name, m in zip(("ndcg", "mrr", "recall"), means, strict=True)}


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows over a long text, each (begin, end, first token whose -log p counts), end past the last.

    Each token but the first counts once, with at least `context - stride` tokens before it where there are as many
    (huggingface.co/docs/transformers/perplexity). Since the token that opens a window is not predicted in it, the stride
    has to be smaller than the context.

    Args:
        length: tokens of the text.
        context: tokens that the model sees at once.
        stride: tokens from one window's begin to the next.

    Raises:
        ValueError: not 1 <= stride < context.
    """
    if not 1 <= stride < context:
        raise ValueError(f"expected 1 <= stride < context, found stride {stride} and context {context}")
    made: list[tuple[int, int, int]] = []
    first = 1
    while first < length:
        begin = len(made) * stride
        end = min(begin + context, length)
        made.append((begin, end, first))
        first = end
    return made


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Sum of -log p over the bytes of the text it is of, in bits."""
    return nats / math.log(2) / text_bytes


def unigram_bits_per_byte(train: np.ndarray, heldout: np.ndarray, heldout_bytes: int, vocab_size: int) -> float:
    """Of the held-out tokens by their frequencies in training, add-one smoothed.

    Args:
        train, heldout: token ids, any shape.
        heldout_bytes: bytes of text that the held-out tokens stand for.
    """
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0
    return bits_per_byte(float(-np.log(counts / counts.sum())[heldout.ravel()].sum()), heldout_bytes)


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Of `xz -9` on the texts end to end."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)
