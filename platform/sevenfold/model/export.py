"""A checkpoint made into a Hugging Face directory, in one process: no process group, no GPU."""

from __future__ import annotations

import os
import tempfile
import warnings

from transformers.utils.logging import disable_progress_bar

from sevenfold import storage
from sevenfold.data.tokens import load_tokenizer
from sevenfold.engine import checkpoint as ckpt
from sevenfold.model import build
from sevenfold.recipe import Recipe
from sevenfold.storage import RunFolder


def export(recipe: Recipe, checkpoint: str, tokenizer: str, to: RunFolder) -> None:
    """Writes `model/` (safetensors, config, tokenizer), an adapter merged into its base, and then `adapter/` too.

    Raises:
        RunError: the checkpoint is damaged.
    """
    found = ckpt.read(checkpoint)
    ckpt.verify(found)
    words = load_tokenizer(tokenizer)
    model = build.build(recipe, build.config_of(recipe, len(words), words), weights=recipe.model.path is not None)
    adapted = build.with_adapter(model, recipe.adapter, recipe.seed) if recipe.adapter is not None else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        ckpt.load(found, model)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as aside:
        if adapted is not None:
            adapted.save_pretrained(os.path.join(aside, "adapter"))
            storage.upload(os.path.join(aside, "adapter"), to.adapter)
            model = adapted.merge_and_unload()
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(model, "generation_config", None) is not None:  # encoders have none
                setattr(model.generation_config, field, getattr(words, field))
            setattr(model.config, field, getattr(words, field))
        model.save_pretrained(os.path.join(aside, "model"))
        words.save_pretrained(os.path.join(aside, "model"))
        storage.upload(os.path.join(aside, "model"), to.model)
