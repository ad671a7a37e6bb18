"""The recipe: every setting of a run, typed. What a field means and its unit stand beside it.

A recipe is YAML, changed on the command line by `key.path=value`; an unknown key names the nearest known one.
"""

from sevenfold.recipe.data import Data, Filter, Source, Stage, Tokenizer
from sevenfold.recipe.search import Search, Space
from sevenfold.recipe.training import (
    Adapter,
    Checkpoint,
    Cluster,
    Contrastive,
    Corruption,
    Guard,
    Model,
    Optimizer,
    Parallel,
    Preference,
    Schedule,
    Train,
    Validation,
)
from sevenfold.recipe.whole import PRETRAINING, Recipe, loads, parse

__all__ = [
    "PRETRAINING",
    "Adapter",
    "Checkpoint",
    "Cluster",
    "Contrastive",
    "Corruption",
    "Data",
    "Filter",
    "Guard",
    "Model",
    "Optimizer",
    "Parallel",
    "Preference",
    "Recipe",
    "Schedule",
    "Search",
    "Source",
    "Space",
    "Stage",
    "Tokenizer",
    "Train",
    "Validation",
    "loads",
    "parse",
]
