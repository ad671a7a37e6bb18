"""Exports a checkpoint as a Hugging Face directory, in one process, without GPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.engine.checkpoint import CheckpointWeights
from sevenfold.engine.checkpoint.manifest import Checkpoint
from sevenfold.errors import RunError
from sevenfold.export.card import card
from sevenfold.model import build
from sevenfold.model.directory import merged, write_directory
from sevenfold.prepare.encoder import load_encoder, set_first_token
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

SHARD = 10**9  # bytes of a weights file, and so of the memory that is needed
# The weights of an earlier export. They are removed, since the next export may write another number
# of files and so not replace all of them.
REPLACED = re.compile(r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

# the largest difference of the outputs before and after an adapter is merged, relative to the
# largest output, that is not reported
MERGED = 1e-4


def export(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokenizer: str,
    manifest: Manifest,
    metrics: Mapping[str, Any],
    to: str | None,
    adapter: str | None = None,
    shard: int = SHARD,
    new: bool = False,
) -> None:
    """Writes a directory of float32 safetensors, configs, tokenizer, model card and checksums.

    It is written completely or not at all. At a URL, everything is first written to the temporary
    folder.

    One weights file and one tensor are in memory at a time, however large the model is. If the
    recipe has an adapter, the whole model is in memory, since the adapter is merged into it.

    Args:
        recipe: The run's recipe.
        checkpoint: A verified checkpoint of the recipe.
        tokenizer: The tokenizer's folder.
        manifest: The training data, for the card.
        metrics: The metrics that were logged at the checkpoint's step, for the card.
        to: The model's folder or URL. An earlier export there is replaced; files that no export
            wrote stay. None: only the adapter is written.
        adapter: The folder or URL of the adapter alone, in peft's format. None: it is not written.
        shard: Bytes of a weights file; a tensor that is larger gets its own file.
        new: Whether the folders must be new or empty.

    Raises:
        InputError: The tokenizer or the base model cannot be loaded, or with `new` a folder is not
            empty.
        RunError: The checkpoint cannot be read, or the directory cannot be written.
    """
    model: Any
    loaded_tokenizer = load_tokenizer(tokenizer)
    config = build.config_of(recipe, len(loaded_tokenizer), loaded_tokenizer)
    disable_progress_bar()
    if recipe.adapter is None:
        model = _streamed_model(recipe, config, checkpoint)
    else:
        adapted = _adapted_model(recipe, config, checkpoint)
        if adapter is not None:
            with _folder(adapter, new) as folder:
                adapted.save_pretrained(folder)
        if to is None:
            return
        model, difference = merged(adapted)
        if not difference <= MERGED:  # also for NaN
            # that does not end the export: the run is finished, and its adapter is saved
            say(
                "warning: the merged model's output differs from that with the adapter by "
                f"{difference:.1e} of the largest output, expected at most {MERGED:.0e}: compare "
                "both before you use the merged model; the adapter is saved beside it"
            )
    if recipe.objective == "seq2seq":
        set_first_token(model, load_encoder(recipe, tokenizer))
    assert to is not None
    with _folder(to, new) as folder:
        write_directory(model, loaded_tokenizer, folder, shard)
        if recipe.objective == "embed":
            _describe_pooling(folder, model.config.hidden_size, recipe.data.sequence_length)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
            f.write(card(recipe, checkpoint, manifest, metrics))


def _streamed_model(recipe: Recipe, config: Any, checkpoint: Checkpoint) -> Any:
    """Returns a model without weights in memory, which save_pretrained reads from the checkpoint.

    To save_pretrained it is a model whose weights are offloaded to disk: it then requests the
    weights of one file at a time.
    """
    with torch.device("meta"):
        model: Any = build.build(recipe, config, weights=False)
    model.to("meta")  # some models create parameters elsewhere, which would be saved as they are
    model.hf_device_map = {"": "disk"}
    model._hf_hook = SimpleNamespace(weights_map=CheckpointWeights(checkpoint, model.state_dict()))
    return model


def _adapted_model(recipe: Recipe, config: Any, checkpoint: Checkpoint) -> Any:
    """Returns peft's wrapper of the base model, with the checkpoint's adapter."""
    model: Any = build.build(recipe, config, weights=True)
    adapted = build.with_adapter(model, recipe)
    weights = CheckpointWeights(checkpoint, model.state_dict())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name])
    return adapted


def _describe_pooling(folder: str, width: int, length: int) -> None:
    """Writes the configs with which sentence-transformers averages and normalizes the states."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    for path in ("1_Pooling", "2_Normalize"):
        os.makedirs(os.path.join(folder, path))
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_mean_tokens": True,
        },
    }
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=1)


@contextlib.contextmanager
def _folder(path: str, new: bool) -> Iterator[str]:
    """Provides a temporary folder that becomes `path`, as `storage.new_folder` does.

    The checksums of its files are added at the end.

    Raises:
        RunError: The files cannot be written.
    """
    try:
        with storage.new_folder(path, None if new else REPLACED) as folder:
            yield folder
            storage.write_checksums(folder)
    except (OSError, SafetensorError) as e:
        raise RunError(
            f"{path}: could not be written ({e}): free some space, or choose another folder"
        ) from None
