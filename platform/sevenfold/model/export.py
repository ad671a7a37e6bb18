"""A checkpoint made into a Hugging Face directory, in one process: no process group, no GPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.data.tokens import load_tokenizer
from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine.checkpoint import Checkpoint
from sevenfold.errors import RunError
from sevenfold.model import build
from sevenfold.model.card import card
from sevenfold.recipe import Recipe

SHARD = 10**9  # bytes of a file of weights, and so of memory
# files of an earlier export that the next one may not write again: the weights, in another number of files
REPLACED = re.compile(r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
MERGED = 1e-4  # most that an output may differ once an adapter is merged, float32


def export(
    recipe: Recipe, checkpoint: Checkpoint, tokenizer: str, manifest: Manifest, metrics: Mapping[str, Any], to: str | None,
    adapter: str | None = None, shard: int = SHARD, new: bool = False,
) -> None:  # fmt: skip
    """Writes a directory of float32 safetensors, configs, tokenizer and model card; whole, or not at all.

    Memory holds one file of weights, and a tensor beside it, however large the model. Not so where the recipe has an adapter:
    it is merged into its base, which then stands there whole. At a URL, all is first written to the temporary folder.

    Args:
        checkpoint: a verified one of this recipe.
        tokenizer: its folder.
        manifest, metrics: what was trained on, and what was measured at the checkpoint's step, for the card.
        to: folder or URL. An earlier export there is replaced; files that no export wrote stay. None: only the adapter is
            written.
        adapter: as `to`, for the adapter by itself, in peft's form.
        shard: bytes of a file of weights; a tensor that is larger has one of its own.
        new: nothing may be replaced: the folders must be new or empty ones.

    Raises:
        InputError: tokenizer or base model cannot be loaded, or with `new` there is something in a folder.
        RunError: the checkpoint cannot be read, the directory cannot be written, or the merged model is not the adapted one.
    """
    model: Any
    words = load_tokenizer(tokenizer)
    config = build.config_of(recipe, len(words), words)
    disable_progress_bar()
    if recipe.adapter is None:
        with torch.device("meta"):
            model = build.build(recipe, config, weights=False)
        # to save_pretrained its weights lie elsewhere: it asks for those of one file at a time
        model.hf_device_map = {"": "disk"}
        model._hf_hook = SimpleNamespace(weights_map=ckpt.Weights(checkpoint, model.state_dict()))
    else:
        model = build.build(recipe, config, weights=True)
        adapted = build.with_adapter(model, recipe)
        weights = ckpt.Weights(checkpoint, model.state_dict())
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(weights[name])
        if adapter is not None:
            with _folder(adapter, new) as aside:
                adapted.save_pretrained(aside)
        if to is None:
            return
        model = _merged(adapted)
    for told in (model.config, model.generation_config) if model.can_generate() else (model.config,):
        for field in ("bos_token_id", "pad_token_id"):
            if getattr(words, field) is not None:
                setattr(told, field, getattr(words, field))
        ends = build.end_tokens(told, words)
        told.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    assert to is not None
    with _folder(to, new) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(aside, max_shard_size=shard)
        words.save_pretrained(aside)
        if recipe.objective == "embed":
            _describe_pooling(aside, model.config.hidden_size, recipe.data.sequence_length)
        with open(os.path.join(aside, "README.md"), "w", encoding="utf-8") as f:
            f.write(card(recipe, checkpoint, manifest, metrics))


@torch.no_grad()
def _merged(adapted: Any) -> Any:
    """The model with its adapter merged into it. Raises RunError where its output then differs by more than MERGED."""
    adapted.eval()
    ids = torch.arange(64)[None] % adapted.config.vocab_size
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if adapted.config.is_encoder_decoder else {})}
    if getattr(adapted.config, "pad_token_id", None) is not None:
        given["attention_mask"] = torch.ones_like(ids)  # whatever the pad token's number is
    before = adapted(**given)[0]
    model = adapted.merge_and_unload()
    found = float((model(**given)[0] - before).abs().max())
    if not found <= MERGED:
        raise RunError(f"the merged model's output differs from the adapter's by {found:.1e}, more than {MERGED:.0e}")
    return model


def _describe_pooling(folder: str, width: int, length: int) -> None:
    """What sentence-transformers reads: that states are averaged, then scaled to length 1."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    for path in ("1_Pooling", "2_Normalize"):
        os.makedirs(os.path.join(folder, path))
    told = {
        "modules.json": modules, "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
    }  # fmt: skip
    for name, tree in told.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(tree, f, indent=1)


@contextlib.contextmanager
def _folder(path: str, new: bool) -> Iterator[str]:
    """As storage.new_folder. Raises RunError where what is written does not fit."""
    try:
        with storage.new_folder(path, None if new else REPLACED) as aside:
            yield aside
    except (OSError, SafetensorError) as e:
        raise RunError(f"{path}: could not be written ({e}): make room, or choose another folder") from None
