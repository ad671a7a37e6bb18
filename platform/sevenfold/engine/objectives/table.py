"""Maps the names of objectives in recipes to their classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sevenfold.engine.objectives.base import Objective, Support
from sevenfold.engine.objectives.causal import Causal
from sevenfold.engine.objectives.classify import Classify
from sevenfold.engine.objectives.contrastive import Contrastive
from sevenfold.engine.objectives.denoise import Denoise
from sevenfold.engine.objectives.masked import Masked
from sevenfold.engine.objectives.preference import Preference
from sevenfold.engine.objectives.seq2seq import Seq2Seq
from sevenfold.engine.objectives.special_tokens import SpecialTokens
from sevenfold.recipe import Recipe

OBJECTIVES: dict[str, type[Objective]] = {
    "causal": Causal,
    "masked": Masked,
    "denoise": Denoise,
    "sft": Causal,
    "dpo": Preference,
    "classify": Classify,
    "seq2seq": Seq2Seq,
    "embed": Contrastive,
}


def build_objective(recipe: Recipe, tokenizer: Any, config: Any, support: Support) -> Objective:
    """Builds the objective of a recipe.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer of the data.
        config: The model's config. Its decoder start token and padding token take precedence over
            the tokenizer's.
        support: What the model supports.

    Raises:
        InputError: The tokenizer lacks a token that the objective needs.
    """
    special_tokens = SpecialTokens.from_tokenizer(
        tokenizer, recipe.objective, getattr(config, "decoder_start_token_id", None)
    )
    if getattr(config, "pad_token_id", None) is not None:
        special_tokens = replace(special_tokens, pad=config.pad_token_id)
    objective = OBJECTIVES[recipe.objective](
        special_tokens, recipe.seed, recipe.corruption.rate, recipe.corruption.mean_span
    )
    objective.support = support
    if isinstance(objective, Preference):
        objective.beta = recipe.preference.beta
    if isinstance(objective, Contrastive):
        objective.temperature = recipe.contrastive.temperature
    return objective
