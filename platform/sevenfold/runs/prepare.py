"""From a recipe to a prepared run: all is looked at first, and written only when nothing is found wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import ray

from sevenfold import storage
from sevenfold.data import corpus, tokens
from sevenfold.data.manifest import Manifest, scan
from sevenfold.data.order import Plan
from sevenfold.data.stream import TASK_CPUS, Stream
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.recipe import Recipe, loads
from sevenfold.report.console import say
from sevenfold.runs import cluster
from sevenfold.runs.worker import Job
from sevenfold.storage import RunFolder


@dataclass(frozen=True)
class Inputs:
    """The documents that a recipe names, found and counted."""

    train: Manifest
    validation: Manifest | None


def begin(recipe: Recipe, folder: RunFolder, need: dict[str, float], what: str, verbose: bool) -> Job | None:
    """Connects to a cluster that can give `need`, and readies the run. None where it is finished already.

    Raises:
        InputError: anything about the recipe that can be told beforehand; nothing is written then.
        RunError: others hold the cluster's resources.
    """
    here, _ = check(recipe)
    found = None if corpus_to_make(recipe) else inputs(recipe)
    if storage.exists(folder.recipe):
        claim(folder, recipe)
    if folder.finished():
        say(f"{folder.root}: finished before; nothing to do")
        return None
    cluster.connect(verbose)
    cluster.require(need, what, recipe.cluster.wait_seconds)
    if root := corpus_to_make(recipe):
        say(f"making the corpus {root} (sevenfold corpus python)")
        corpus.build_python(root)
    found = found or inputs(recipe)
    claim(folder, recipe)
    _keep_manifest(folder, found)
    if not storage.exists(storage.join(folder.tokenizer, tokens.LAST_WRITTEN)):
        cluster.fetch(_settle_tokenizer.remote(here, found.train, folder.tokenizer))
    train, held = streams(here, found, folder.tokenizer)
    return Job(here, recipe.hash(), folder.root, folder.tokenizer, train, held, verbose=verbose)


def check(recipe: Recipe) -> tuple[Recipe, int]:
    """The recipe with absolute paths, so that it means the same in any folder, and its model's parameters.

    Raises InputError where model, tokenizer and adapter are not there or do not fit together.
    """
    changes: dict[str, Any] = {}
    if recipe.model.path:
        changes["model.path"] = build.model_path(recipe.model.path)
    if recipe.tokenizer.path:
        changes["tokenizer.path"] = storage.locate(recipe.tokenizer.path)
    here = recipe.override(changes)
    size = here.tokenizer.vocab_size
    if size is None:
        tokenizer = tokens.load_tokenizer(here.tokenizer.path or str(here.model.path))
        tokens.ENCODERS[here.objective](tokenizer, here.data.sequence_length)
        size = len(tokenizer)
    return here, build.check(here, size)


def corpus_to_make(recipe: Recipe) -> str | None:
    """Where the recipe's built-in corpus is to be made; None where there is none to make."""
    root = storage.locate("corpus/python")
    return root if recipe.data.corpus and not storage.exists(root) else None


def inputs(recipe: Recipe) -> Inputs:
    """Raises InputError where sources are not there or not what they should be."""
    fields = tokens.ENCODERS[recipe.objective].fields
    validation = scan(recipe.data.validation, fields) if recipe.data.validation else None
    return Inputs(scan(recipe.data.sources, fields), validation)


def streams(recipe: Recipe, found: Inputs, tokenizer: str) -> tuple[Stream, Stream | None]:
    """The training stream, and the held-out one: always inline and in one lane, so that it is the same for all."""
    length = recipe.data.sequence_length
    encoder = tokens.ENCODERS[recipe.objective](tokens.load_tokenizer(tokenizer), length)
    train = Stream(Plan(found.train, recipe.seed, recipe.lanes), encoder, length, recipe.data.executor)
    held = Stream(Plan(found.validation, 0, 1), encoder, length, "inline") if found.validation else None
    return train, held


def needs(recipe: Recipe) -> dict[str, float]:
    """The resources of a run: its workers, and Ray Data's tasks beside them."""
    c = recipe.cluster
    data = TASK_CPUS if recipe.data.executor == "ray" else 0
    return {"CPU": c.num_workers * (c.cpus_per_worker + data), "GPU": c.num_workers * c.gpus_per_worker}


def claim(folder: RunFolder, recipe: Recipe) -> None:
    """Makes the folder the recipe's, or finds that it already is.

    Raises:
        InputError: a run of another recipe lies there.
    """
    if storage.exists(folder.recipe):
        there = loads(storage.read_text(folder.recipe), folder.recipe)
        if there.hash() != recipe.hash():
            raise InputError(
                f"{folder.root}: a run of this name exists with another recipe ({_difference(there, recipe)}): "
                "resume it with its own, or give this one a new name (name=...)"
            )
        return
    storage.write(folder.recipe, recipe.to_yaml())


def _difference(there: Recipe, here: Recipe) -> str:
    def flat(tree: Any, at: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {at: tree}
        return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{at}.{key}" if at else key).items()}

    a, b = flat(there.identity()), flat(here.identity())
    return ", ".join(f"{k}: {a.get(k)} there, {b.get(k)} here" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k))


def _keep_manifest(folder: RunFolder, found: Inputs) -> None:
    """Stores what a run reads from at its first start; raises InputError where a later one finds it changed."""
    now = {"train": found.train, "validation": found.validation}
    if not storage.exists(folder.manifest):
        storage.write(folder.manifest, json.dumps({k: m.to_json() for k, m in now.items() if m}))
    for key, then in storage.read_json(folder.manifest).items():
        Manifest.from_json(then).check_unchanged(now[key] or Manifest((), ()))


@ray.remote(num_cpus=1)
def _settle_tokenizer(recipe: Recipe, manifest: Manifest, to: str) -> None:
    if recipe.tokenizer.vocab_size:
        made: Any = tokens.train_tokenizer(manifest, recipe.tokenizer.vocab_size, recipe.tokenizer.train_mb, recipe.seed)
    else:
        made = tokens.load_tokenizer(recipe.tokenizer.path or str(recipe.model.path))
    tokens.save_tokenizer(made, to)
