"""A survey of fine-tuning examples before training: their lengths, masked and truncated tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from sevenfold.data.encode import TextEncoder
from sevenfold.data.manifest import Manifest
from sevenfold.data.sources.documents import Selection
from sevenfold.errors import InputError
from sevenfold.prepare.data import Inputs
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

SURVEY_MB = 64.0  # MB of text per split after which the survey stops


def survey_examples(
    recipe: Recipe, inputs: Inputs, encoder: TextEncoder
) -> dict[str, dict[str, int]]:
    """Encodes examples of each split and shows what share of their tokens is trained on.

    Args:
        recipe: The recipe.
        inputs: The input files.
        encoder: The encoder of the recipe's objective.

    Returns:
        For each split, the number of "examples", of their "tokens", of "targets" among the tokens,
        of examples that were "cut" to data.sequence_length, and of bad examples "skipped".

    Raises:
        InputError: An example is bad (see `Selection.read`), or no token is a target.
    """
    counts = {}
    for split, (manifest, selection) in _parts(recipe, inputs, encoder).items():
        count = {"examples": 0, "tokens": 0, "targets": 0, "cut": 0, "skipped": 0}
        size = 0
        unknown_keys: Counter[str] = Counter()
        for group in range(len(manifest)):
            documents = selection.read(manifest, group)
            unknown_keys += documents.unknown_keys
            (encoded,) = encoder.encode([documents])
            size += manifest.group(group).bytes
            tokens = len(encoded.ids)
            count["examples"] += len(encoded.origin)
            count["tokens"] += tokens
            count["targets"] += tokens if encoded.targets is None else int(encoded.targets.sum())
            count["cut"] += encoded.cut
            count["skipped"] += encoded.skipped.count
            if size > SURVEY_MB * 1e6:
                break
        if not count["examples"]:
            continue  # `check_documents` reports a split without documents
        if not count["targets"]:
            raise InputError(
                f"{split} data: all labels of the {count['examples']:,} examples are masked: "
                "nothing would be learned"
            )
        _show(split, count)
        if unknown_keys:
            named = ", ".join(f"{key} ({n:,} messages)" for key, n in sorted(unknown_keys.items()))
            say(
                f"{split} data: messages have keys that are not read: {named} "
                "(data.ignore_columns hides this line)"
            )
        counts[split] = count
    return counts


def _parts(
    recipe: Recipe, inputs: Inputs, encoder: TextEncoder
) -> dict[str, tuple[Manifest, Selection]]:
    """Returns what each split reads, by its name; documents that are held out are a split."""
    train = Selection.from_data(recipe.data, encoder.fields)
    parts = {"train": (inputs.train, train)}
    if recipe.data.held_out:
        parts["held-out"] = (inputs.train, replace(train, split="held_out"))
    for split, manifest in inputs.all.items():
        if split != "train":
            parts[split] = (manifest, replace(train, held_out=0.0))
    return parts


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
