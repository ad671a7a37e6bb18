"""What a recipe amounts to, without starting a run (--dry-run)."""

from __future__ import annotations

from sevenfold import storage
from sevenfold.data import lanes
from sevenfold.data.order import DataOrder
from sevenfold.prepare.data import Inputs, find_inputs, missing_corpus, with_classes
from sevenfold.prepare.job import UNPACKED, required_resources
from sevenfold.prepare.model import check_model
from sevenfold.prepare.splits import with_splits
from sevenfold.recipe import Recipe
from sevenfold.report.console import escape


def describe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML, followed by derived figures as comments.

    Raises:
        InputError: As for a run.
    """
    recipe = with_splits(recipe)
    root = missing_corpus(recipe)
    inputs = None if root else find_inputs(recipe)
    checked = check_model(recipe if inputs is None else with_classes(recipe, inputs.train))
    if inputs is None:
        data = [f"corpus: {root} does not exist yet; the run builds it first"]
    else:
        data = _describe_data(recipe, inputs)
    batch, tokens = recipe.train.global_batch, recipe.tokens_per_step
    rows = lanes.max_rows_per_rank(batch, recipe.readers, recipe.lanes)
    idle = lanes.advice(batch, recipe.readers, recipe.lanes)
    micro_batches = -(-rows // recipe.train.micro_batch)
    resources = required_resources(recipe).items()
    figures = [
        f"parameters: {checked.parameters:,}",
        f"tokens per step: {tokens:,} ({batch} sequences of {recipe.data.sequence_length})",
        f"steps: {recipe.steps:,}, {recipe.steps * tokens:,} tokens in total"
        if recipe.steps
        else f"steps: those of {recipe.data.epochs} epochs; their number is not known yet",
        f"per worker: at most {rows} sequences per step, in {micro_batches} micro-batches",
        *([] if idle is None else [idle]),
        *([] if checked.support.packing else [UNPACKED]),
        *data,
        "needs: " + ", ".join(f"{amount:g} {name}" for name, amount in resources if amount),
        f"run folder: {storage.join(storage.resolve_output(recipe.storage), recipe.name)}",
    ]
    return recipe.to_yaml() + "".join(f"# {escape(line)}\n" for line in figures)


def _describe_data(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Describes the input files and the order in which they will be read.

    There is no tokenizer yet: numbers of tokens are estimated as one per 4 bytes of text.
    """
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
