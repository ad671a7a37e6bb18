"""What masked and denoising objectives take out of a text. Drawn by numpy from a key, whatever rank does it."""

from __future__ import annotations

import numpy as np


def masked(
    rng: np.random.Generator, ids: np.ndarray, hideable: np.ndarray, rate: float, mask: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking (arXiv 1810.04805, section 3.1): of the chosen tokens 80% become `mask`, 10% any token, 10% stay.

    Args:
        ids: int64 [tokens]; hideable: bool [tokens], False for special tokens and padding.

    Returns:
        (what is read, which tokens are asked for): int64 and bool [tokens].
    """
    draw, kind = rng.random(len(ids)), rng.random(len(ids))
    asked = hideable & (draw < rate)
    read = np.where(asked & (kind < 0.8), mask, ids)
    other = asked & (kind >= 0.8) & (kind < 0.9)
    return np.where(other, rng.integers(0, vocab_size, len(ids)), read), asked


def spans(rng: np.random.Generator, length: int, rate: float, mean_span: float, most: int) -> np.ndarray:
    """Which tokens are noise, in spans (random_spans_noise_mask of T5, arXiv 1910.10683): bool [length]; it begins with a
    token that is none. At most `most` spans. Nothing of fewer than two tokens."""
    if length < 2:
        return np.zeros(length, bool)
    noise = min(max(round(length * rate), 1), length - 1)
    count = min(max(round(noise / mean_span), 1), noise, length - noise, most)
    kept, taken = _parts(rng, length - noise, count), _parts(rng, noise, count)
    return np.repeat(np.tile([False, True], count), np.stack([kept, taken], axis=1).reshape(-1))


def _parts(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """`count` whole numbers above 0 that add up to `total`: int64 [count]."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.zeros(0, np.int64)
    return np.diff(np.concatenate([[0], cuts, [total]]))


def denoise(ids: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Takes the noise out of a document: each span leaves a sentinel behind, and the target says, after each sentinel,
    what was there, then `end`. Returns (what is read, the target): int64 each."""
    first = noise & ~np.concatenate([[False], noise[:-1]])
    number = sentinels[np.maximum(first.cumsum() - 1, 0)]
    read = np.where(first, number, ids)[~noise | first]
    repeats = noise.astype(np.int64) + first  # a span's first token comes after its sentinel
    target = np.repeat(ids, repeats)
    at = np.cumsum(repeats) - repeats
    target[at[first]] = number[first]
    return read, target if end is None else np.append(target, end)
