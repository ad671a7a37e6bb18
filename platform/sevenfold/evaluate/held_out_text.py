"""Held-out text, cut as language models are measured on it and continue it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from sevenfold.data.rows import Rows
from sevenfold.data.stream import Stream
from sevenfold.errors import InputError
from sevenfold.evaluate import metrics

SAMPLE_CHARACTERS = 300  # characters of a document that a continuation starts from


def beginning(text: str, tokenizer: Any) -> str:
    """Returns the beginning of a text, cut between two tokens; not all of the text."""
    start = text.lstrip()[:SAMPLE_CHARACTERS]
    encoding = tokenizer.backend_tokenizer.encode(start, add_special_tokens=False)
    last_token = encoding.offsets[-1][0] if encoding.offsets else 0
    return start[: last_token or len(start)]


def overlapping_rows(held: Stream) -> Rows:
    """Cuts each document into rows of its own, which overlap.

    Every token but the document's first is a target in exactly one row, with at least a quarter of
    a row before it if the document has that many tokens before it.
    """
    length, head, tail = held.sequence_length, held.encoder.head, held.encoder.tail
    dtype = held.encoder.dtype
    prefix = [] if head is None else [head]
    suffix = [] if tail is None else [tail]
    tokens, targets, used = [], [], []
    for group in range(len(held.order.manifest)):
        (encoded,) = held.encoded([group])
        for first, last in itertools.pairwise(encoded.offsets.tolist()):
            ids = np.concatenate([prefix, encoded.ids[first:last], suffix]).astype(dtype)
            for start, stop, first_target in metrics.windows(len(ids), length, 3 * length // 4):
                row = np.zeros(length, dtype)
                row[: stop - start] = ids[start:stop]
                is_target = np.zeros(length, bool)
                is_target[first_target - start : stop - start] = True
                tokens.append(row)
                targets.append(is_target)
                used.append(stop - start)
    if not tokens:
        raise InputError(
            "the held-out documents have fewer than two tokens each: there is nothing to predict"
        )
    # The padding of a row counts as a document of its own, so it has a start.
    starts = [s for n in used for s in ((0, n) if n < length else (0,))]
    return Rows(
        np.stack(tokens), np.array(starts, np.int32), np.array(used, np.int32), np.stack(targets)
    )
