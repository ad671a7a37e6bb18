"""From a recipe to a prepared run: checks everything first, and writes files only then."""

from __future__ import annotations

import importlib
import re
import threading
from dataclasses import dataclass
from typing import Any

import ray

from sevenfold import storage
from sevenfold.cluster import capacity, connect
from sevenfold.data import lanes, token_cache
from sevenfold.data.examples import ENCODERS
from sevenfold.data.sources.documents import Selection
from sevenfold.data.stream import TASK_CPUS, Stream
from sevenfold.errors import InputError
from sevenfold.prepare.data import (
    Inputs,
    build_missing_corpus,
    find_inputs,
    load_unchanged_inputs,
    missing_corpus,
    with_classes,
    write_inputs,
)
from sevenfold.prepare.encoder import encoder_file
from sevenfold.prepare.memory import check_memory
from sevenfold.prepare.model import CheckedModel, check_model, pin_model
from sevenfold.prepare.splits import with_splits
from sevenfold.prepare.steps import with_steps
from sevenfold.prepare.streams import build_streams
from sevenfold.prepare.tokenizer import prepare_tokenizer
from sevenfold.recipe import Recipe, loads, stored_hash
from sevenfold.report.console import say
from sevenfold.run_folder import RunFolder

# said of a model whose documents would see each other in a packed row
UNPACKED = (
    "this model does not keep packed documents apart: each document is trained on as a padded row "
    "of its own, which takes more memory and time"
)


@dataclass
class Job:
    """A prepared run, as it is sent to the workers.

    Attributes:
        recipe: The recipe, with absolute paths.
        identity: The hash of the recipe that the run's folder holds.
        folder: The run's folder.
        tokenizer: The folder of the run's tokenizer.
        train: The training stream.
        validation: The held-out stream, None if nothing is held out.
        support: What the model supports, an engine.objectives.Support.
        queue: A ray.util.queue.Queue for the driver, which shows the sentences and the
            (step, metrics) that it receives. None: nothing is shown.
        reporter: worker_pool.Reporter of a trial: it sends the reports to the sweep, once their
            checkpoints are committed. None if the run is not a trial.
        stop_signal: The handle of a train.signals.StopSignal, None if the run cannot be asked to
            stop.
        verbose: Shows Ray's logs.
        parent_identity: The identity of the run from whose checkpoint this one continues with
            other settings; "" if there is none.
        estimated_steps: Whether the recipe's number of steps is an estimate.
    """

    recipe: Recipe
    identity: str
    folder: str
    tokenizer: str
    train: Stream
    validation: Stream | None
    support: Any
    queue: Any = None
    reporter: Any = None
    stop_signal: Any = None
    verbose: bool = False
    parent_identity: str = ""
    estimated_steps: bool = False


def prepare_job(
    recipe: Recipe, folder: RunFolder, need: dict[str, float], what: str, verbose: bool
) -> Job | None:
    """Connects to a cluster, checks all that a run needs, and prepares the run's folder.

    Args:
        recipe: The recipe.
        folder: The run's folder.
        need: The needed resources by Ray's names, such as CPU and GPU.
        what: What needs them, for messages.
        verbose: Shows Ray's logs.

    Returns:
        The prepared run, or None if it is finished already.

    Raises:
        InputError: The recipe, its data or its model cannot be used. Nothing was written.
        RunError: Other jobs hold the cluster's resources.
    """
    recipe = with_stored_separators(with_splits(pin_model(recipe, folder)), folder)
    identity = recipe.hash()
    if storage.exists(folder.recipe):
        identity = claim_folder(folder, recipe)
        _require_records(folder)
    elif taken := folder.existing_outputs():
        raise InputError(
            f"{folder.root}: expected a new folder for this run, found {', '.join(taken)} in it "
            "without a recipe.yaml: move these files elsewhere, or choose another name (name=...)"
        )
    inputs = (
        None if missing_corpus(recipe) else load_unchanged_inputs(folder) or find_inputs(recipe)
    )
    storage.save_full_urls()
    if folder.finished():
        say(f"{folder.root}: already finished; nothing to do")
        return None
    if storage.exists(folder.log):
        storage.read_text(folder.log)  # raises InputError if it is damaged, which a worker would
    # a run keeps the order of the classes that it was started with
    has_started = storage.exists(encoder_file(folder.tokenizer))
    known = with_stored_classes(recipe, folder) if has_started else recipe
    checked = _connect_and_check_model(known, inputs, verbose)
    resolved = checked.recipe
    _check_cluster(recipe, need, what, checked.parameters)
    build_missing_corpus(recipe)
    inputs = inputs or find_inputs(recipe)
    if recipe.data.cache:
        selection = Selection.from_data(recipe.data, ENCODERS[recipe.objective].fields)
        token_cache.require_cache(storage.resolve_input(recipe.data.cache), inputs.train, selection)
    inputs = _write_folder(folder, recipe, resolved, inputs)
    train, validation = build_streams(resolved, inputs, folder.tokenizer)
    batch, order = recipe.train.global_batch, train.order
    if idle := lanes.advice(batch, recipe.readers, order.lanes, may_change=not has_started):
        say(idle)
    if not checked.support.packing:
        say(UNPACKED)
    estimated = False
    if not resolved.steps:
        resolved, estimated = with_steps(resolved, train, folder.tokenizer)
    return Job(
        resolved,
        identity,
        folder.root,
        folder.tokenizer,
        train,
        validation,
        support=checked.support,
        verbose=verbose,
        estimated_steps=estimated,
    )


def _require_records(folder: RunFolder) -> None:
    """Checks that a run with checkpoints still has what says how it has read its data.

    Written again, these files could differ: the data may have changed since, and the date that
    chat templates write has.

    Raises:
        InputError: A file is gone.
    """
    for path in (folder.manifest, encoder_file(folder.tokenizer)):
        if not storage.exists(path) and storage.listdir(folder.checkpoints):
            raise InputError(
                f"{path}: expected this file of a run with checkpoints, found none: "
                f"{storage.DAMAGED_HINT}, or give this run another name (name=...)"
            )


def _connect_and_check_model(recipe: Recipe, inputs: Inputs | None, verbose: bool) -> CheckedModel:
    """Connects to the cluster and checks the model."""
    # torch and transformers take as long to import as Ray to start: both are done at a time
    threading.Thread(
        target=importlib.import_module, args=("sevenfold.model.build",), daemon=True
    ).start()
    connect.connect(verbose, dashboard=recipe.sweep is not None)
    try:
        checked = check_model(recipe if inputs is None else with_classes(recipe, inputs.train))
    except InputError:
        ray.shutdown()
        raise
    return checked


def _check_cluster(recipe: Recipe, need: dict[str, float], what: str, parameters: int) -> None:
    """Checks that the cluster has what the recipe needs; see `prepare_job`.

    Args:
        recipe: The recipe.
        need: As in `prepare_job`.
        what: As in `prepare_job`.
        parameters: The number of the model's parameters.
    """
    if connect.is_local():
        check_memory(recipe, parameters)
    capacity.require_resources(need, what, recipe.cluster.wait_seconds)
    for key in ("worker_labels", "data_labels"):
        capacity.require_labels(f"{recipe.name}: cluster.{key}", getattr(recipe.cluster, key))
    if recipe.train.dtype == "bfloat16" and recipe.cluster.gpus_per_worker:
        capacity.require_bfloat16(recipe.name)


def _write_folder(folder: RunFolder, recipe: Recipe, resolved: Recipe, inputs: Inputs) -> Inputs:
    """Writes the recipe, the tokenizer and the manifest into the run's folder, if it is new.

    Args:
        folder: The run's folder.
        recipe: The recipe as it is stored in the folder.
        resolved: The recipe with absolute paths.
        inputs: The input files.

    Returns:
        The inputs, with the measured tokens per byte.
    """
    is_new = not storage.exists(folder.recipe)
    claim_folder(folder, recipe)
    try:
        inputs = prepare_tokenizer(resolved, inputs, folder.tokenizer)
    except InputError:
        if is_new:  # removes what was written above; other files in the folder are not ours
            storage.remove(folder.tokenizer)
            storage.remove(folder.recipe)
            storage.remove_empty(folder.root)
        raise
    if not storage.exists(folder.manifest):
        write_inputs(folder, inputs.recorded())
    return inputs


def with_stored_separators(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Returns a run's recipe with the separators of its sources that it was started with.

    A run of an earlier version has stored that each line is a document, which was the default.

    Args:
        recipe: The recipe. What it sets itself stays.
        folder: The run's folder.
    """
    if not storage.exists(folder.recipe):
        return recipe
    stored = loads(storage.read_text(folder.recipe), folder.recipe)
    changes = {
        f"data.{where}.separator": before
        for where, before, now in _separators(stored, recipe)
        if now is None and before is not None
    }
    return recipe.override(changes) if changes else recipe


def _separators(stored: Recipe, recipe: Recipe) -> list[tuple[str, str | None, str | None]]:
    """Returns (place, separator in the stored recipe, separator in the recipe) of each source."""
    return [
        (f"{key}.{i}", before.separator, now.separator)
        for key in ("sources", "validation", "test")
        for i, (before, now) in enumerate(
            zip(getattr(stored.data, key), getattr(recipe.data, key), strict=False)
        )
    ]


def read_recipe(folder: RunFolder) -> Recipe:
    """Returns the recipe of a run that has started, with the classes that its data has."""
    return with_stored_classes(loads(storage.read_text(folder.recipe), folder.recipe), folder)


def with_stored_classes(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Returns a run's recipe with the classes that its data had when it was started."""
    if recipe.objective != "classify" or recipe.data.classes:
        return recipe
    classes = storage.read_json(
        encoder_file(folder.tokenizer), lambda description: list(map(str, description["classes"]))
    )
    return recipe.override({"data.classes": classes})


def required_resources(recipe: Recipe) -> dict[str, float]:
    """Returns the resources of a run's workers and of its Ray Data tasks, by Ray's names.

    A run with an elastic number of workers needs those of the minimum number.
    """
    cluster = recipe.cluster
    data_cpus = TASK_CPUS if recipe.data.executor == "ray" else 0
    workers = recipe.workers[0]
    return {
        "CPU": workers * (cluster.cpus_per_worker + data_cpus),
        "GPU": workers * cluster.gpus_per_worker,
    }


def claim_folder(folder: RunFolder, recipe: Recipe) -> str:
    """Writes the recipe into a run's folder.

    If the folder has a recipe, the new one replaces it, provided that both describe the same run.
    They may differ in train.micro_batch, which changes results by rounding only: a run that is out
    of memory is resumed with a smaller one.

    Returns:
        The identity by which the run's checkpoints know it: the hash of its first recipe, as it
        was computed then.

    Raises:
        InputError: The folder belongs to a run of another recipe.
    """
    if not storage.exists(folder.recipe):
        storage.write(folder.recipe, recipe.to_yaml())
        return recipe.hash()
    text = storage.read_text(folder.recipe)
    stored, first_hash = loads(text, folder.recipe), stored_hash(text, folder.recipe)
    has_identity = storage.exists(folder.identity)
    identity = storage.read_text(folder.identity) if has_identity else first_hash
    if not re.fullmatch("[0-9a-f]{64}", identity):
        raise InputError(
            f"{folder.identity}: damaged: expected the SHA-256 of the run's first recipe, found "
            f"{identity[:80]!r}; it is in `recipe` of each checkpoint's MANIFEST.json, from where "
            "you can restore it"
        )
    if stored.hash() != recipe.hash():
        micro_batch = {"train.micro_batch": stored.train.micro_batch}
        if stored.hash() != recipe.override(micro_batch).hash():
            raise InputError(
                f"{folder.root}: a run of this name exists with another recipe "
                f"({_differences(stored, recipe)}): "
                "use its recipe to resume it, or choose another name (name=...)"
            )
        storage.write(folder.identity, identity)
    for where, before, now in _separators(stored, recipe):
        if before is None and now is not None:  # the hash is the same
            raise InputError(
                f"{folder.root}: a run of this name exists with another recipe (data.{where}."
                f"separator: unset in that run, {now!r} in this recipe): use its recipe to resume "
                "it, or choose another name (name=...)"
            )
    had_secrets = first_hash != stored.hash()  # an earlier version has stored it
    if had_secrets and not has_identity:
        storage.write(folder.identity, identity)
    if stored != recipe or had_secrets:
        storage.write(folder.recipe, recipe.to_yaml())
    return identity


def _differences(stored: Recipe, recipe: Recipe) -> str:
    """Describes the settings in which the recipes of two runs differ."""
    before, now = _flatten(stored.identity()), _flatten(recipe.identity())
    return ", ".join(
        f"{key}: {before.get(key)} in that run, {now.get(key)} in this recipe"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, subtree in tree.items():
        leaves |= _flatten(subtree, f"{prefix}.{key}" if prefix else key)
    return leaves
