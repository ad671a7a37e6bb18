"""Tiny model configs, special tokens and packed rows for tests of the objectives."""

import itertools

import numpy as np

from sevenfold.data.rows import Rows
from sevenfold.engine.objectives import SpecialTokens

VOCAB, LENGTH = 512, 64


SPECIAL_TOKENS = SpecialTokens(
    VOCAB,
    special=(0, 1, 2, 3, *range(4, 24)),
    mask=3,
    sentinels=tuple(range(4, 24)),
    pad=2,
    end=1,
    start=2,
)


BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}


def packed(documents: list[list[list[int]]]) -> Rows:
    """Packs documents into rows: one inner list per row, padded to LENGTH."""
    tokens = np.zeros((len(documents), LENGTH), np.uint16)
    starts, used = [], []
    for i, row in enumerate(documents):
        row_tokens = [token for document in row for token in document]
        tokens[i, : len(row_tokens)] = row_tokens
        offsets = [0, *itertools.accumulate(map(len, row))]
        starts += offsets if offsets[-1] < LENGTH else offsets[:-1]
        used.append(len(row_tokens))
    return Rows(tokens, np.array(starts, np.int32), np.array(used, np.int32))


def document(seed: int, length: int) -> list[int]:
    """A document of random tokens between the start token 0 and the end token 1."""
    body = np.random.default_rng(seed).integers(30, VOCAB, length - 2).tolist()
    return [0, *body, 1]


ROWS = packed(
    [
        [document(1, 20), document(2, 30)],
        [document(3, 64)],
        [document(4, 5), document(5, 2), document(6, 40)],
    ]
)
