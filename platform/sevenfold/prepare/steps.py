"""The number of steps after which a run has read its data."""

from __future__ import annotations

from sevenfold import storage
from sevenfold.data.order import skipped
from sevenfold.data.stream import Stream
from sevenfold.prepare.encoder import encoder_file
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

# MB of text up to which rows are counted before the run starts; all of it is encoded for that
COUNTED_MB = 64.0


def with_steps(recipe: Recipe, stream: Stream, tokenizer: str) -> tuple[Recipe, bool]:
    """Returns the recipe with the number of steps of its epochs.

    Of small data the rows are counted, once per run. That of large data is estimated, and corrected
    while the run trains (`engine.step_plan`).

    Args:
        recipe: The recipe, with `data.epochs` and without steps.
        stream: The training data.
        tokenizer: The folder of the run's tokenizer, which keeps the count.

    Returns:
        The recipe, and whether the number of steps is an estimate.
    """
    epochs = f"{recipe.data.epochs} epoch{'s' if recipe.data.epochs != 1 else ''}"
    description = storage.read_json(encoder_file(tokenizer), storage.json_object)
    if "data_steps" not in description:
        counts = stream.order.manifest.bytes <= COUNTED_MB * 1e6
        rows_per_lane = recipe.train.global_batch // stream.order.lanes
        description["data_steps"] = stream.count_steps(rows_per_lane) if counts else None
        storage.write_json(encoder_file(tokenizer), description)
    data_steps: int | None = description["data_steps"]
    if data_steps is None:
        steps = stream.order.estimated_steps(recipe.tokens_per_step)
        say(f"{epochs}: about {steps:,} steps; the number is corrected while the run trains")
    else:
        left_out = sum(skipped(stream.skip, step) for step in range(data_steps))
        steps = max(1, data_steps - left_out)
        say(f"{epochs}: {steps:,} steps")
    return recipe.override({"train.steps": steps}), data_steps is None
