"""Measures, by the field's own libraries, and the baselines that a figure is read beside."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence

import numpy as np


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L (rouge-score, with stemming), 0 to 1. Raises ValueError where lengths differ."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {k: float(np.mean([s[k].fmeasure for s in scores])) if scores else 0.0 for k in kinds}


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


def lead(prompt: str) -> str:
    """The summary that needs no model: the prompt's first sentence."""
    line = prompt.strip().splitlines()[0] if prompt.strip() else ""
    return line.split(". ")[0]
