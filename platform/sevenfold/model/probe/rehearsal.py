"""Takes a training step with a tiny model and exports it, as a run does with the real one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from sevenfold.engine import optim
from sevenfold.engine.objectives import Support, attach_losses
from sevenfold.engine.step import train_step
from sevenfold.errors import first_line
from sevenfold.model import build, parallel
from sevenfold.model.adapter import with_adapter
from sevenfold.model.directory import merged, write_directory
from sevenfold.model.probe.losses import TOLERANCE
from sevenfold.model.probe.tiny import (
    UnsupportedError,
    documents,
    objective_of,
    one_document,
    output_of,
    plain_inputs,
    special_tokens_of,
)
from sevenfold.recipe import Recipe

MERGED = 1e-2  # the largest relative difference by merging an adapter; random ones are large


def take_step(recipe: Recipe, config: PreTrainedConfig, support: Support) -> None:
    """Takes a training step with the tiny model, sharded over one rank as over many.

    Args:
        recipe: The recipe.
        config: The tiny model's config.
        support: What the model supports.

    Raises:
        UnsupportedError: The step fails.
    """
    kernel = build.choose_attention(recipe, torch.device("cpu"), config)
    model = build.build(recipe, config, weights=True, attention=kernel, base=False)
    if recipe.adapter is not None:
        with_adapter(model, recipe)
    special_tokens, words = special_tokens_of(config)
    objective = objective_of(recipe, special_tokens)
    objective.support = support
    attach_losses(model, objective, recipe.train.loss_chunk)
    train = recipe.train.model_copy(update={"compile": False, "dtype": "float32"})
    cpu = torch.device("cpu")
    try:
        with _one_rank():
            parallel.shard(model, cpu, train)
            optimizers = optim.build(model, recipe.optimizer)
            rows = documents(recipe, words, special_tokens.end)
            train_step(model, objective.batches(rows, 0, 1, 1, cpu), optimizers, 1e-4, 1.0)
    except Exception as e:  # models' code can raise anything
        raise UnsupportedError(
            f"a training step of the sharded model fails: {type(e).__name__}: {first_line(e)}"
        ) from None


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Makes this process the only rank of a group for a while, unless it is a rank already."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rehearse_export(recipe: Recipe, model: Any, adapted: Any, tokenizer: Any) -> None:
    """Writes the model as it is exported after training, and loads it again.

    Args:
        recipe: The recipe.
        model: The model.
        adapted: peft's wrapper of it, None without an adapter.
        tokenizer: The tokenizer, None if it does not exist yet.

    Raises:
        UnsupportedError: The written model differs, or something fails.
    """
    model_class = build.MODEL_CLASSES[recipe.objective][0]
    ids = one_document(recipe, model.config)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            if adapted is not None:
                model, difference = merged(adapted)
                if not difference <= MERGED:
                    raise ValueError(f"the merged adapter changes the output by {difference:.2g}")
            write_directory(model.eval(), tokenizer, folder, 10**9)
            if build.runs_own_code(recipe):
                return  # its code is not copied
            loaded = model_class.from_pretrained(folder, dtype=torch.float32).eval()
            outputs = [output_of(m, **plain_inputs(m, ids, ids)) for m in (model, loaded)]
    except Exception as e:  # models' code can raise anything
        raise UnsupportedError(f"its export fails: {type(e).__name__}: {first_line(e)}") from None
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"its export is not the trained model: the outputs differ by {difference:.2g}"
        )
