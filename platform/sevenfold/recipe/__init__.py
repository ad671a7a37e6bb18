"""The recipe: all settings of a run, in typed sections.

Each field's description says what it means. A recipe is a YAML file; `key.path=value` on the
command line changes single values. All mistakes of a recipe are reported at once, each with its
place and what to write instead.
"""

from sevenfold.recipe.data import Data, Filter, Source, Stage, Tokenizer
from sevenfold.recipe.reading import from_tree, loads, parse, stored_hash
from sevenfold.recipe.recipe import PRETRAINING, Recipe
from sevenfold.recipe.sweep import Space, Sweep
from sevenfold.recipe.training import (
    Adapter,
    Checkpoint,
    Contrastive,
    Corruption,
    Guard,
    Model,
    Optimizer,
    Preference,
    Schedule,
    Train,
    Validation,
)
from sevenfold.recipe.workers import Cluster, Parallel

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
    "Source",
    "Space",
    "Stage",
    "Sweep",
    "Tokenizer",
    "Train",
    "Validation",
    "from_tree",
    "loads",
    "parse",
    "stored_hash",
]
