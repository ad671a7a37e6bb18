"""Fine-tuning: an exported run or any Hugging Face directory in, another out."""

from __future__ import annotations

from sevenfold.errors import InputError
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.runs import train
from sevenfold.storage import RunFolder


def run(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """A `search` section is left to jobs/sweep.py. Raises InputError where the recipe is for another job."""
    if recipe.objective in PRETRAINING:
        raise InputError(f"{recipe.name}: objective {recipe.objective} is pretraining: run it by jobs/pretrain.py")
    return train.run(recipe, verbose)
