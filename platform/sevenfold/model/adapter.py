"""LoRA adapters."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sevenfold.errors import InputError, first_line
from sevenfold.model import hub
from sevenfold.recipe import Recipe

# peft's task type of each objective; CAUSAL_LM for all others
TASKS = {
    "masked": "FEATURE_EXTRACTION",
    "denoise": "SEQ_2_SEQ_LM",
    "classify": "SEQ_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "embed": "FEATURE_EXTRACTION",
}


def with_adapter(model: PreTrainedModel, recipe: Recipe) -> Any:
    """Adds LoRA layers to a model, in place, and freezes its other parameters.

    The head of a classifier is not frozen, and gets no LoRA layers.

    Returns:
        peft's wrapper of the model, which can save and merge the adapter.

    Raises:
        InputError: peft does not accept adapter.target_modules.
    """
    from peft import LoraConfig, get_peft_model

    adapter = recipe.adapter
    assert adapter is not None
    # the adapter's initial weights must not depend on how the base model was created
    torch.manual_seed(recipe.seed)
    head = _head_modules(model) if recipe.objective == "classify" else {}
    settings = LoraConfig(
        modules_to_save=list(head) or None,
        exclude_modules=[linear for linears in head.values() for linear in linears] or None,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type=TASKS.get(recipe.objective, "CAUSAL_LM"),
        use_dora=adapter.dora,
    )
    if recipe.model.path is not None and hub.is_hub(recipe.model.path):
        model.name_or_path, settings.revision = hub.parse(recipe.model.path)
    with warnings.catch_warnings():
        # peft 0.21 reads a field of transformers 5.23 by its deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return get_peft_model(model, settings)
        except (ValueError, TypeError, re.error) as e:
            raise InputError(f"adapter.target_modules: {first_line(e)}") from None


def _head_modules(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns the modules of a classifier's head, each with the names of its linear layers.

    A pretrained base may come without them, so that they are newly initialized and have to be
    trained in full. A pooler is one of them.
    """
    children = {
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    }
    names = [n for n, _ in model.named_modules() if n in children or n.endswith(".pooler")]
    return {
        name: [
            f"{name}.{inner_name}".rstrip(".")  # the name is empty for the module itself
            for inner_name, inner in model.get_submodule(name).named_modules()
            if isinstance(inner, nn.Linear)
        ]
        for name in names
    }
