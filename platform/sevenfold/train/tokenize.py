"""Computes a recipe's token cache: Ray tasks tokenize its files, one task per file."""

from __future__ import annotations

import time
from collections import Counter

import ray

from sevenfold import storage
from sevenfold.cluster import capacity, connect
from sevenfold.data import token_cache
from sevenfold.data.encode import TextEncoder
from sevenfold.data.manifest import Manifest
from sevenfold.data.sources.documents import Selection
from sevenfold.errors import InputError
from sevenfold.prepare.data import build_missing_corpus, find_inputs, missing_corpus, with_classes
from sevenfold.prepare.encoder import load_encoder
from sevenfold.prepare.model import check_model
from sevenfold.prepare.splits import with_splits
from sevenfold.prepare.tokenizer import prepare_tokenizer
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

PROGRESS_SECONDS = 5  # between two lines about the progress


def run(recipe: Recipe, verbose: bool = False) -> str:
    """Tokenizes a recipe's documents into the folder `data.cache`.

    If it was killed, the same command resumes it.

    Args:
        recipe: The recipe.
        verbose: Shows Ray's logs.

    Returns:
        The folder of the token cache.

    Raises:
        InputError: The recipe has no data.cache, the folder holds another cache, or the sources or
            the tokenizer cannot be used.
    """
    if not recipe.data.cache:
        raise InputError(
            f"{recipe.name}: data.cache is not set: "
            "add data.cache=FOLDER, the folder for the token cache"
        )
    recipe = with_splits(recipe)
    folder = storage.resolve_output(str(recipe.data.cache))
    token_cache.require_usable_folder(folder)
    inputs = None if missing_corpus(recipe) else find_inputs(recipe)
    checked = check_model(recipe if inputs is None else with_classes(recipe, inputs.train))
    resolved = checked.recipe
    connect.connect(verbose)
    capacity.require_resources({"CPU": 1}, f"tokenizing {recipe.name}", recipe.cluster.wait_seconds)
    tokenizer = storage.join(folder, "tokenizer")
    build_missing_corpus(recipe)
    inputs = prepare_tokenizer(resolved, inputs or find_inputs(resolved), tokenizer)
    encoder = load_encoder(resolved, tokenizer)
    selection = Selection.from_data(resolved.data, encoder.fields)
    if token_cache.begin(folder, inputs.train, selection, encoder):
        say(f"{folder}: already finished; nothing to do")
        return folder
    totals = _fill(folder, inputs.train, selection, encoder)
    token_cache.finish(folder, inputs.train, selection, encoder, totals)
    steps = totals["tokens"] / recipe.tokens_per_step
    say(
        f"{folder}: {totals['documents']:,} documents, {totals['tokens']:,} tokens; "
        f"{totals['skipped']:,} bad documents skipped; "
        f"an epoch is about {steps:,.1f} steps of this recipe"
    )
    return folder


def _fill(
    folder: str, manifest: Manifest, selection: Selection, encoder: TextEncoder
) -> dict[str, int]:
    """Tokenizes all files of a manifest, in up to two tasks per CPU of the cluster at a time.

    Returns:
        The total numbers of "documents", "tokens" and "skipped" documents.
    """
    shared = ray.put((folder, manifest, selection, encoder))
    waiting = list(range(len(manifest.shards)))
    totals: Counter[str] = Counter(documents=0, tokens=0, skipped=0)
    running: list[ray.ObjectRef] = []
    done, last_progress = 0, time.monotonic()
    while waiting or running:
        # the second task per CPU is queued, so that no CPU waits for this loop
        while waiting and len(running) < 2 * ray.cluster_resources().get("CPU", 1):
            running.append(_tokenize_shard.remote(shared, waiting.pop(0)))
        ready, running = ray.wait(running)
        totals.update(connect.fetch(ready[0]))
        done += 1
        if time.monotonic() - last_progress > PROGRESS_SECONDS or not (waiting or running):
            say(f"tokenized {done}/{len(manifest.shards)} files, {totals['tokens']:,} tokens")
            last_progress = time.monotonic()
    return dict(totals)


@ray.remote(num_cpus=1)
def _tokenize_shard(
    shared: tuple[str, Manifest, Selection, TextEncoder], number: int
) -> dict[str, int]:
    """Tokenizes a file of the manifest; see token_cache.write_shard."""
    folder, manifest, selection, encoder = shared
    return token_cache.write_shard(folder, number, manifest, selection, encoder)
