"""Random masking and span removal for the masked and denoise objectives.

Random numbers come from a numpy generator, so that the result does not depend on device or rank.
"""

from __future__ import annotations

import numpy as np


def mask_tokens(
    rng: np.random.Generator,
    ids: np.ndarray,
    maskable: np.ndarray,
    rate: float,
    mask: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Applies BERT's masking (arXiv 1810.04805, section 3.1).

    Of the selected tokens 80% are replaced by the mask token and 10% by a random token; 10% stay.
    If none is selected, which happens in short texts, the one with the lowest draw is, so that
    there is always something to predict.

    Args:
        rng: The source of random numbers.
        ids: int64 [tokens].
        maskable: bool [tokens], False for special tokens and padding.
        rate: The fraction of the maskable tokens that is selected.
        mask: The id of the mask token.
        vocab_size: Random tokens are drawn from 0 to vocab_size - 1.

    Returns:
        The input ids, and which tokens were selected, to be predicted: int64 and bool [tokens].
    """
    selection, kind = rng.random(len(ids)), rng.random(len(ids))
    selected = maskable & (selection < rate)
    if maskable.any() and not selected.any():
        selected[np.argmin(np.where(maskable, selection, 2.0))] = True
    input_ids = np.where(selected & (kind < 0.8), mask, ids)
    random = selected & (kind >= 0.8) & (kind < 0.9)
    return np.where(random, rng.integers(0, vocab_size, len(ids)), input_ids), selected


def select_spans(
    rng: np.random.Generator, length: int, rate: float, mean_span: float, max_spans: int
) -> np.ndarray:
    """Selects the tokens to remove, in spans: T5's random_spans_noise_mask (arXiv 1910.10683).

    The first token is never removed, and nothing is removed of fewer than two tokens.

    Args:
        rng: The source of random numbers.
        length: The number of tokens.
        rate: The fraction of the tokens to remove.
        mean_span: The mean length of a span, in tokens.
        max_spans: The maximum number of spans, since each needs a sentinel of its own.

    Returns:
        True where a token is removed: bool [length].
    """
    if length < 2:
        return np.zeros(length, bool)
    removed = min(max(round(length * rate), 1), length - 1)
    count = min(max(round(removed / mean_span), 1), removed, length - removed, max_spans)
    kept_lengths = _random_partition(rng, length - removed, count)
    removed_lengths = _random_partition(rng, removed, count)
    lengths = np.stack([kept_lengths, removed_lengths], axis=1).reshape(-1)  # alternating
    return np.repeat(np.tile([False, True], count), lengths)


def _random_partition(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Draws `count` integers above 0 that add up to `total`: int64 [count]."""
    if count > 1:
        cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    else:
        cuts = np.zeros(0, np.int64)
    return np.diff(np.concatenate([[0], cuts, [total]]))


def replace_spans(
    ids: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, end: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces each noise span of a document by a sentinel.

    Args:
        ids: The document: int64 [tokens].
        noise: True for the tokens to remove: bool [tokens].
        sentinels: The sentinel tokens, at least as many as there are spans.
        end: The token that ends the target; None: the target has no end token.

    Returns:
        The document with one sentinel in place of each span; and the target: each sentinel followed
        by the tokens of its span, then `end`. int64 each.
    """
    is_first = noise & ~np.concatenate([[False], noise[:-1]])  # the first token of each span
    sentinel = sentinels[np.maximum(is_first.cumsum() - 1, 0)]  # that of the span at or before it
    source = np.where(is_first, sentinel, ids)[~noise | is_first]
    repeats = noise.astype(np.int64) + is_first  # twice: the first copy becomes the sentinel
    target = np.repeat(ids, repeats)
    offsets = np.cumsum(repeats) - repeats
    target[offsets[is_first]] = sentinel[is_first]
    return source, target if end is None else np.append(target, end)
