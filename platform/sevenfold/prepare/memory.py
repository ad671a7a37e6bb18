"""Whether the memory of this machine holds the model that a run trains."""

from __future__ import annotations

import psutil

from sevenfold.errors import InputError
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

# Bytes per parameter in float32: the weight; and of a trained one also its gradient and AdamW's two
# moments (Muon has one moment for most).
_WEIGHT, _TRAINED = 4, 16
_TIGHT = 0.7  # a share of the machine's memory above which other things will hardly fit


def check_memory(recipe: Recipe, parameters: int) -> None:
    """Compares what weights, gradients and optimizer take with the memory of this machine.

    Only for a run whose workers compute on this machine's CPUs: `sevenfold plan` knows about GPUs
    and clusters.

    Args:
        recipe: The recipe.
        parameters: The number of the model's parameters, without those of an adapter.

    Raises:
        InputError: They cannot fit.
    """
    if recipe.cluster.gpus_per_worker:
        return
    has_adapter = recipe.adapter is not None
    needed = parameters * (_WEIGHT if has_adapter else _TRAINED)
    if recipe.objective == "dpo" and not has_adapter:
        needed += parameters * _WEIGHT  # the reference model
    memory = psutil.virtual_memory().total
    parts = "weights" if has_adapter else "weights, gradients and optimizer"
    text = (
        f"{parameters / 1e9:.1f}B parameters take {needed / 1e9:,.0f} GB for {parts}, and this "
        f"machine has {memory / 1e9:,.0f} GB"
    )
    if needed > memory:
        adapter = "" if has_adapter or not recipe.model.path else ", or train an adapter"
        raise InputError(
            f"{recipe.name}: {text}: choose a smaller model{adapter}, or train on a cluster "
            "(RAY_ADDRESS; `sevenfold plan` says on which)"
        )
    if needed > _TIGHT * memory:
        say(f"{text}: little is left for activations and data")
