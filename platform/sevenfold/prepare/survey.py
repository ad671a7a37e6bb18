"""A survey of fine-tuning examples before training: their lengths, masked and truncated tokens."""

from __future__ import annotations

from dataclasses import replace

from sevenfold.data.sources.documents import Selection
from sevenfold.errors import InputError
from sevenfold.prepare.data import Inputs
from sevenfold.prepare.encoder import build_encoder
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

SURVEY_MB = 64.0  # MB of text per split after which the survey stops


def survey_examples(
    recipe: Recipe, inputs: Inputs, tokenizer: str, backend: str
) -> dict[str, dict[str, int]]:
    """Encodes examples of each split and shows what share of their tokens is trained on.

    Args:
        recipe: The recipe.
        inputs: The input files.
        tokenizer: The tokenizer's folder.
        backend: The tokenizer backend, see `sevenfold.data.encode`.

    Returns:
        For each split, the number of "examples", of their "tokens", of "targets" among the tokens,
        of examples that were "cut" to data.sequence_length, and of bad examples "skipped".

    Raises:
        InputError: An example is bad (see `Selection.read`), or no token is a target.
    """
    encoder = build_encoder(recipe, tokenizer, backend)
    counts = {}
    for split, manifest in inputs.all.items():
        selection = replace(Selection.from_data(recipe.data, encoder.fields), held_out=0.0)
        count = {"examples": 0, "tokens": 0, "targets": 0, "cut": 0, "skipped": 0}
        size = 0
        for group in range(len(manifest)):
            (encoded,) = encoder.encode([selection.read(manifest, group)])
            size += manifest.group(group).bytes
            tokens = len(encoded.ids)
            count["examples"] += len(encoded.origin)
            count["tokens"] += tokens
            count["targets"] += tokens if encoded.targets is None else int(encoded.targets.sum())
            count["cut"] += encoded.cut
            count["skipped"] += encoded.skipped.count
            if size > SURVEY_MB * 1e6:
                break
        if not count["targets"]:
            raise InputError(
                f"{split} data: all labels of the {count['examples']:,} examples are masked: "
                "nothing would be learned"
            )
        _show(split, count)
        counts[split] = count
    return counts


def _show(split: str, count: dict[str, int]) -> None:
    """Shows the counts of a split to the user."""
    mean_tokens = count["tokens"] / count["examples"]
    masked = 1 - count["targets"] / count["tokens"]
    bad = f"; {count['skipped']:,} bad examples skipped" if count["skipped"] else ""
    say(
        f"{split} data: {count['examples']:,} examples of {mean_tokens:.0f} tokens on average, "
        f"{masked:.1%} of them masked; {count['cut']:,} examples are truncated to "
        f"data.sequence_length{bad}"
    )
