"""The token cache of a recipe's sources: Ray Data tasks encode shard after shard."""

from __future__ import annotations

import time
from collections import Counter

import ray

from sevenfold import storage
from sevenfold.data import cache
from sevenfold.data.documents import Selection
from sevenfold.data.encode import TextEncoder
from sevenfold.data.manifest import Manifest
from sevenfold.errors import InputError
from sevenfold.recipe import Recipe
from sevenfold.report.console import say
from sevenfold.runs import cluster, prepare


def run(recipe: Recipe, verbose: bool = False) -> str:
    """Fills the folder that data.cache names; run again after a kill it goes on. Returns the folder.

    Raises:
        InputError: no data.cache; a cache of something else lies there; anything wrong with sources or tokenizer.
    """
    if not recipe.data.cache:
        raise InputError(f"{recipe.name}: expected data.cache (the folder to fill), found none: add data.cache=FOLDER")
    folder = storage.place(recipe.data.cache)
    cache.require_room(folder)
    found = None if prepare.corpus_to_make(recipe) else prepare.inputs(recipe)
    here, _ = prepare.check(recipe if found is None else prepare.with_classes(recipe, found.train))
    cluster.connect(verbose)
    cluster.require({"CPU": 1}, f"tokenizing {recipe.name}", recipe.cluster.wait_seconds)
    found = prepare.settle(here, found or prepare.inputs(here), storage.join(folder, "tokenizer"))
    encoder = prepare.encoder_of(here, storage.join(folder, "tokenizer"))
    chosen = Selection.of(here.data, encoder.fields)
    if cache.begin(folder, found.train, chosen, encoder):
        say(f"{folder}: finished before; nothing to do")
        return folder
    totals = _fill(folder, found.train, chosen, encoder)
    cache.finish(folder, found.train, chosen, encoder, totals)
    counted = f"{totals['documents']:,} documents, {totals['tokens']:,} tokens"
    steps = totals["tokens"] / recipe.tokens_per_step
    say(f"{folder}: {counted}, {totals['skipped']:,} bad ones left out; an epoch is about {steps:,.1f} steps of this recipe")
    return folder


def _fill(folder: str, manifest: Manifest, chosen: Selection, encoder: TextEncoder) -> dict[str, int]:
    """A task a shard, as many at once as the cluster has CPUs."""
    shared = ray.put((folder, manifest, chosen, encoder))
    todo = list(range(len(manifest.shards)))
    totals: Counter[str] = Counter(documents=0, tokens=0, skipped=0)
    running: list[ray.ObjectRef] = []
    done, told = 0, time.monotonic()
    while todo or running:
        while todo and len(running) < 2 * ray.cluster_resources().get("CPU", 1):
            running.append(_shard.remote(shared, todo.pop(0)))
        ready, running = ray.wait(running)
        totals.update(cluster.fetch(ready[0]))
        done += 1
        if time.monotonic() - told > 5 or not (todo or running):
            say(f"tokenized {done}/{len(manifest.shards)} shards, {totals['tokens']:,} tokens")
            told = time.monotonic()
    return dict(totals)


@ray.remote(num_cpus=1)
def _shard(shared: tuple[str, Manifest, Selection, TextEncoder], number: int) -> dict[str, int]:
    folder, manifest, chosen, encoder = shared
    return cache.write_shard(folder, number, manifest, chosen, encoder)
