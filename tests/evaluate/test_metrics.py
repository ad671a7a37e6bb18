"""ROUGE, bits per byte, and the reference rates of simple compressors."""

import math

import numpy as np
import pytest

from sevenfold.evaluate import metrics


def test_rouge_is_averaged_over_texts() -> None:
    scores = metrics.rouge(["the cat sat", "nothing alike"], ["the cat sat", "quite other words"])
    assert scores == pytest.approx({"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5})
    with pytest.raises(ValueError, match="zip"):
        metrics.rouge(["a"], [])


def test_bits_per_byte_from_nats() -> None:
    assert metrics.bits_per_byte(math.log(2) * 30, 10) == pytest.approx(3)


def test_a_unigram_of_equal_frequencies_costs_log2_of_the_vocabulary() -> None:
    train = np.tile(np.arange(256), 1000)
    assert metrics.unigram_bits_per_byte(train, np.arange(256), 256, 256) == pytest.approx(
        8, abs=1e-3
    )
    assert metrics.unigram_bits_per_byte(np.zeros(10_000, int), np.zeros(10, int), 10, 4) < 0.01


def test_bits_per_byte_of_xz() -> None:
    rng = np.random.default_rng(0)
    noise = "".join(chr(c) for c in rng.integers(0, 128, 20_000))
    assert 6.9 < metrics.xz_bits_per_byte([noise]) < 8
    assert metrics.xz_bits_per_byte(["again and again " * 1000] * 3) < 0.1
