"""Tiny models, special tokens and packed rows for tests of the objectives."""

import itertools
from typing import Any

import numpy as np

from sevenfold.data.rows import Rows
from sevenfold.engine.objectives import OBJECTIVES, SpecialTokens, attach_losses
from sevenfold.model import build
from sevenfold.recipe import Recipe

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


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
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


Example = tuple[list[int], list[bool]]


def rows_of(rows: list[list[Example]]) -> Rows:
    """Packs examples (ids, targets) into rows, padded."""
    tokens, targets = np.zeros((len(rows), LENGTH), np.uint16), np.zeros((len(rows), LENGTH), bool)
    starts, used = [], []
    for i, row in enumerate(rows):
        start = 0
        for ids, is_target in row:
            stop = start + len(ids)
            tokens[i, start:stop], targets[i, start:stop] = ids, is_target
            starts.append(start)
            start = stop
        used.append(start)
        starts += [start] if start < LENGTH else []
    return Rows(tokens, np.array(starts, np.int32), np.array(used, np.int32), targets)


def example(seed: int, prompt_length: int, completion_length: int) -> Example:
    """A prompt and a completion of these lengths."""
    ids = document(seed, prompt_length) + document(seed + 100, completion_length)
    return ids, [False] * prompt_length + [True] * completion_length


def model_of(
    tree: dict[str, Any], objective: str, config: dict[str, Any], **changes: Any
) -> tuple[Any, Any, Recipe]:
    """Builds a model with the losses of this objective."""
    kind = objective if objective != "dpo" else "sft"  # unlike DPO, SFT needs no model.path
    recipe = Recipe.model_validate(
        tree | {"objective": kind, "model": {"config": config}} | changes
    )
    model = build.build(recipe, build.config_of(recipe, VOCAB), weights=True).eval()
    built_objective = OBJECTIVES[objective](SPECIAL_TOKENS, 0, 0.15, 3.0)
    attach_losses(model, built_objective)
    return model, built_objective, recipe


EXAMPLES = [example(1, 12, 9), example(2, 5, 20), example(3, 30, 8)]
