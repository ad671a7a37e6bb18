"""Pretraining: text in, a Hugging Face directory out."""

from __future__ import annotations

from sevenfold.errors import InputError
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.runs import train
from sevenfold.storage import RunFolder


def run(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """Raises InputError where the recipe is for another job; else as train.run."""
    if recipe.objective not in PRETRAINING:
        raise InputError(f"{recipe.name}: objective {recipe.objective} is fine-tuning: run it by jobs/finetune.py")
    return train.run(recipe, verbose)
