"""The data streams of a run: one of training rows, one of held-out rows."""

from __future__ import annotations

from dataclasses import replace

from sevenfold import storage
from sevenfold.data.order import LISTED, DataOrder
from sevenfold.data.sources.documents import Selection
from sevenfold.data.stream import Stream
from sevenfold.data.token_cache import TokenCache
from sevenfold.errors import InputError
from sevenfold.prepare.data import Inputs, load_inputs
from sevenfold.prepare.encoder import load_encoder
from sevenfold.recipe import Recipe
from sevenfold.run_folder import RunFolder


def open_streams(
    folder: RunFolder, recipe: Recipe, test: bool = False
) -> tuple[Stream, Stream | None]:
    """Opens the streams of a run that has started, so that what it read can be read again.

    They tokenize in this process, and do not use the token cache.

    Args:
        folder: The run's folder.
        recipe: The run's recipe.
        test: Returns the stream of data.test, if the recipe has it, as the second stream.

    Returns:
        The training stream and the held-out stream.

    Raises:
        InputError: The run has not started to train.
    """
    if not storage.exists(folder.manifest):
        raise InputError(
            f"{folder.root}: expected a run that has started to train, found no {folder.manifest}"
        )
    recipe = recipe.override({"data.executor": "inline", "data.cache": None})
    inputs = load_inputs(folder)
    if test and inputs.test:
        inputs = replace(inputs, validation=inputs.test)
    return build_streams(recipe, inputs, folder.tokenizer)


def build_streams(recipe: Recipe, inputs: Inputs, tokenizer: str) -> tuple[Stream, Stream | None]:
    """Builds the training stream and the held-out stream.

    The held-out stream is always read inline and in one lane, so that it does not depend on the
    number of workers or lanes.

    Args:
        recipe: The recipe.
        inputs: The input files.
        tokenizer: The folder of the prepared tokenizer.

    Returns:
        The training stream, and the held-out stream or None if the recipe holds out nothing.
    """
    data = recipe.data
    encoder = load_encoder(recipe, tokenizer)
    lanes = recipe.earlier_lanes if inputs.order == LISTED else recipe.lanes
    if lanes < recipe.readers:
        raise InputError(
            f"{recipe.name}: this run was started with {lanes} lanes: expected at most as many "
            f"workers, found {recipe.readers}: set cluster.num_workers to {lanes} or fewer"
        )
    order = DataOrder.from_manifest(inputs.train, data, recipe.seed, lanes, inputs.order)
    selection = Selection.from_data(data, encoder.fields)
    cache = None
    if data.cache:
        cache = TokenCache.open(storage.resolve_input(data.cache), inputs.train, selection, encoder)
    train = Stream(
        order,
        selection,
        encoder,
        data.sequence_length,
        executor=data.executor,
        packing=data.packing,
        skip=tuple(data.skip),
        cache=cache,
        labels=tuple(recipe.cluster.data_labels.items()),
    )
    if inputs.validation:
        held_out_order = DataOrder(inputs.validation, seed=0, lanes=1, version=inputs.order)
        held_out_selection = replace(selection, held_out=0)
    elif data.held_out:
        held_out_order = DataOrder(inputs.train, seed=0, lanes=1, version=inputs.order)
        held_out_selection = Selection.from_data(data, encoder.fields, "held_out")
    else:
        return train, None
    held_out = Stream(
        held_out_order, held_out_selection, encoder, data.sequence_length, executor="inline"
    )
    return train, held_out
