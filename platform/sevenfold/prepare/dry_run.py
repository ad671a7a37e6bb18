"""What a recipe amounts to, without starting a run (--dry-run)."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile

from sevenfold import storage
from sevenfold.data import lanes
from sevenfold.data.order import DataOrder
from sevenfold.errors import InputError
from sevenfold.prepare.data import Inputs, find_inputs, missing_corpus, with_classes
from sevenfold.prepare.job import UNPACKED, required_resources
from sevenfold.prepare.memory import check_memory
from sevenfold.prepare.model import check_model
from sevenfold.prepare.preview import preview
from sevenfold.prepare.splits import with_splits
from sevenfold.prepare.steps import with_steps
from sevenfold.prepare.streams import build_streams
from sevenfold.prepare.tokenizer import prepare_tokenizer
from sevenfold.recipe import Recipe
from sevenfold.report.console import escape


def describe(recipe: Recipe, rows: int = 0) -> str:
    """Returns the resolved recipe as YAML, followed by derived figures as comments.

    All is done that a run does before its workers start, but for Ray: the data is found and
    checked, the tokenizer trained or loaded, examples encoded, the first chunk of data built. The
    files of this are in a temporary folder, and removed.

    Args:
        recipe: The recipe.
        rows: The number of rows to show as the model will see them.

    Raises:
        InputError: As for a run.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), tempfile.TemporaryDirectory() as folder:
        recipe = with_splits(recipe)
        root = missing_corpus(recipe)
        inputs = None if root else find_inputs(recipe)
        checked = check_model(recipe if inputs is None else with_classes(recipe, inputs.train))
        resolved = checked.recipe
        if not os.environ.get("RAY_ADDRESS"):
            check_memory(resolved, checked.parameters)
        if inputs is None:
            data = [f"corpus: {root} does not exist yet; the run builds it first"]
        else:
            inputs, resolved, data = _try_data(resolved, inputs, folder, rows)
    batch, tokens = recipe.train.global_batch, recipe.tokens_per_step
    per_rank = lanes.max_rows_per_rank(batch, recipe.readers, recipe.lanes)
    idle = lanes.advice(batch, recipe.readers, recipe.lanes)
    micro_batches = -(-per_rank // recipe.train.micro_batch)
    resources = required_resources(recipe).items()
    figures = [
        *filter(None, said.getvalue().splitlines()),
        f"parameters: {checked.parameters:,}",
        f"tokens per step: {tokens:,} ({batch} sequences of {recipe.data.sequence_length})",
        f"steps: {resolved.steps:,}, {resolved.steps * tokens:,} tokens in total"
        if resolved.steps
        else f"steps: those of {recipe.data.epochs} epochs; their number is not known yet",
        f"per worker: at most {per_rank} sequences per step, in {micro_batches} micro-batches",
        *([] if idle is None else [idle]),
        *([] if checked.support.packing else [UNPACKED]),
        *data,
        "needs: " + ", ".join(f"{amount:g} {name}" for name, amount in resources if amount),
        f"run folder: {storage.join(storage.resolve_output(recipe.storage), recipe.name)}",
    ]
    return recipe.to_yaml() + "".join(f"# {escape(line)}\n" for line in figures)


def _try_data(
    recipe: Recipe, inputs: Inputs, folder: str, rows: int
) -> tuple[Inputs, Recipe, list[str]]:
    """Prepares the data as a run does, in a temporary folder.

    Args:
        recipe: The recipe with absolute paths.
        inputs: The input files.
        folder: The folder.
        rows: The number of rows to show.

    Returns:
        The inputs with the measured tokens per byte, the recipe with the number of steps, and lines
        that describe the data.
    """
    recipe = recipe.override({"data.executor": "inline", "data.cache": None})
    inputs = prepare_tokenizer(recipe, inputs, folder)
    described = _describe_data(recipe, inputs)
    train, _ = build_streams(recipe, inputs, folder)
    if not len(train.chunk(0).rows):
        raise InputError(f"{recipe.name}: no row can be made of the first chunk of the data")
    if not recipe.steps:
        recipe, _ = with_steps(recipe, train, folder)
    if rows:
        described += preview(train, folder, recipe.objective, rows)
    return inputs, recipe, described


def _describe_data(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Describes the input files and the order in which they will be read."""
    train, validation = inputs.train, inputs.validation
    order = DataOrder.from_manifest(train, recipe.data, recipe.seed, recipe.lanes)
    documents = f"{train.documents:,}" if train.documents else "number not known yet"
    held_out = ""
    if validation:
        held_out = f"; held out: {validation.bytes / 1e6:,.1f} MB"
    elif recipe.data.held_out:
        held_out = f"; held out: {recipe.data.held_out:.2%}"
    lines = [
        f"documents: {documents}; {len(train.shards)} files, {train.bytes / 1e6:,.1f} MB of text"
        + held_out,
        f"chunks: {order.chunks_per_epoch} per epoch, {order.groups_per_chunk} row groups per "
        f"chunk; {order.lanes} lanes",
    ]
    for (start, weights), segment in zip(order.stages, order.segments, strict=False):
        shares = ", ".join(
            f"{source.name} {weight / sum(weights):.1%}"
            for source, weight in zip(recipe.data.sources, weights, strict=True)
        )
        chunk = segment.first // order.groups_per_chunk
        lines.append(f"mixture from token {start:,} (chunk {chunk}): {shares}")
    return lines
