"""From a recipe to a prepared run: all is looked at first, and written only when nothing is found wrong."""

from __future__ import annotations

import importlib
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray

from sevenfold import storage
from sevenfold.data import cache, corpus, tokens
from sevenfold.data.cache import TokenCache
from sevenfold.data.documents import BadDocuments, Documents, Selection, held_out
from sevenfold.data.encode import TextEncoder, admit
from sevenfold.data.examples import ENCODERS, PLAIN_TEMPLATE
from sevenfold.data.manifest import Manifest, scan
from sevenfold.data.order import MAX_GROUPS, WINDOWS_PER_LANE, Plan
from sevenfold.data.stream import TASK_CPUS, Stream
from sevenfold.errors import InputError
from sevenfold.recipe import PRETRAINING, Recipe, loads
from sevenfold.report.console import say
from sevenfold.runs import cluster
from sevenfold.storage import RunFolder

SURVEY_MB = 64.0  # of fine-tuning data that is looked through before training
MOST_CLASSES = 10_000
SAMPLE_MB = 1.0  # of text of each source, on which encoders are compared and tokens a byte are measured


@dataclass(frozen=True)
class Inputs:
    """The documents that a recipe names, found and counted."""

    train: Manifest
    validation: Manifest | None
    test: Manifest | None = None

    @property
    def all(self) -> dict[str, Manifest]:
        """Those that there are, by name."""
        return {k: m for k, m in vars(self).items() if m is not None}


@dataclass
class Job:
    """A prepared run, as it travels to the workers."""

    recipe: Recipe  # with absolute paths
    identity: str  # hash of the recipe as the run's folder keeps it
    folder: str
    tokenizer: str  # folder
    train: Stream
    validation: Stream | None
    queue: Any = None  # ray.util.queue.Queue of (step, metrics) and sentences, for whoever watches
    post: Any = None  # seats.Post of a trial, whose reports go to a sweep, and wait for their checkpoints
    bell: Any = None  # train.Bell, where the run may be asked to end
    verbose: bool = False
    descent: str = ""  # identity of the run whose checkpoint this one goes on from, under other settings


def begin(recipe: Recipe, folder: RunFolder, need: dict[str, float], what: str, verbose: bool) -> Job | None:
    """Connects to a cluster that can give `need`, and readies the run. None where it is finished already.

    Raises:
        InputError: anything about the recipe that can be told beforehand; nothing is written then.
        RunError: others hold the cluster's resources.
    """
    if storage.exists(folder.recipe):
        claim(folder, recipe)
    elif taken := folder.taken():
        raise InputError(
            f"{folder.root}: expected a new folder for this run, found {', '.join(taken)} in it without a recipe.yaml: "
            "move that elsewhere, or give this run another name (name=...)"
        )
    identity = recipe.hash()
    found = None if corpus_to_make(recipe) else kept(folder) or inputs(recipe)
    if folder.finished():
        say(f"{folder.root}: finished before; nothing to do")
        return None
    # torch and transformers, which take as long to import as Ray to start
    threading.Thread(target=importlib.import_module, args=("sevenfold.model.build",), daemon=True).start()
    cluster.connect(verbose, dashboard=recipe.search is not None)
    try:
        here, _ = check(recipe if found is None else with_classes(recipe, found.train))
    except InputError:
        ray.shutdown()
        raise
    cluster.require(need, what, recipe.cluster.wait_seconds)
    for key in ("worker_labels", "data_labels"):
        cluster.require_labels(f"{recipe.name}: cluster.{key}", getattr(recipe.cluster, key))
    if recipe.train.dtype == "bfloat16" and recipe.cluster.gpus_per_worker:
        cluster.require_bfloat16(recipe.name)
    if root := corpus_to_make(recipe):
        say(f"making the corpus {root} (sevenfold corpus python)")
        corpus.build_python(root)
    found = found or inputs(recipe)
    if recipe.data.cache:
        selection = Selection.of(recipe.data, ENCODERS[recipe.objective].fields)
        cache.check(storage.locate(recipe.data.cache), found.train, selection)
    new = not storage.exists(folder.recipe)
    claim(folder, recipe)
    try:
        found = settle(here, found, folder.tokenizer)
    except InputError:
        if new:  # what was made above; anything else in the folder was there before
            storage.remove(folder.tokenizer)
            storage.remove(folder.recipe)
            storage.remove_empty(folder.root)
        raise
    if not storage.exists(folder.manifest):
        storage.write(folder.manifest, json.dumps({k: m.to_json() for k, m in found.all.items()}))
    train, held = streams(here, found, folder.tokenizer)
    if not here.steps:
        here = here.override({"train.steps": train.plan.estimated_steps(here.tokens_per_step)})
        say(f"{recipe.data.epochs} epochs: about {here.steps:,} steps")
    return Job(here, identity, folder.root, folder.tokenizer, train, held, verbose=verbose)


def check(recipe: Recipe) -> tuple[Recipe, int]:
    """The recipe with absolute paths, so that it means the same in any folder, and its model's parameters.

    Raises InputError where model, tokenizer and adapter are not there or do not fit together.
    """
    from sevenfold.engine.objectives import Words
    from sevenfold.model import build

    changes: dict[str, Any] = {}
    if recipe.model.path:
        changes["model.path"] = build.model_path(recipe.model.path)
    if recipe.tokenizer.path:
        changes["tokenizer.path"] = storage.locate(recipe.tokenizer.path)
    here = recipe.override(changes)
    if here.tokenizer.chat_template:
        _template(here.tokenizer.chat_template)
    size = here.tokenizer.vocab_size
    if size is None:
        tokenizer = tokens.load_tokenizer(here.tokenizer.path or str(here.model.path))
        ENCODERS[here.objective](tokenizer, here.data.sequence_length, classes=here.data.classes)
        Words.of(tokenizer, here.objective)
        size = len(tokenizer)
    return here, build.check(here, size)


def _template(given: str) -> str:
    """The text of tokenizer.chat_template."""
    if given == "plain":
        return PLAIN_TEMPLATE
    try:
        return storage.read_text(storage.locate(given))
    except (InputError, OSError) as e:
        raise InputError(
            f"tokenizer.chat_template: expected plain, or a file with a Jinja template, found {given}: {e}"
        ) from None


def with_classes(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with the labels of its sources put in, where it is about classes and names none. Raises InputError where they
    are fewer than two, or no classes at all."""
    if recipe.objective != "classify" or recipe.data.classes:
        return recipe
    chosen = Selection.of(recipe.data, ENCODERS["classify"].fields)
    found = {label for documents in _all(chosen, manifest) for label in documents.fields[1].to_pylist()}
    if not found:
        _look_through(recipe, "train", manifest)
    if not 2 <= len(found) <= MOST_CLASSES:
        raise InputError(
            f"{recipe.name}: expected 2 to {MOST_CLASSES:,} classes in the sources, found {len(found):,}"
            f"{': ' + ', '.join(sorted(found)) if len(found) == 1 else ''}: name their column (columns: {{label: COLUMN}})"
        )
    return recipe.override({"data.classes": sorted(found)})


def _all(chosen: Selection, manifest: Manifest) -> Iterator[Documents]:
    """Of each row group. Raises BadDocuments at the end, with all bad ones of the first file that has some."""
    bad: list[BadDocuments] = []
    for group in range(len(manifest)):
        try:
            yield chosen.read(manifest, group)
        except BadDocuments as e:
            if bad and bad[0].path != e.path:
                break
            bad.append(e)
    if bad:
        raise BadDocuments(bad[0].path, [b for e in bad for b in e.bad])


def corpus_to_make(recipe: Recipe) -> str | None:
    """Where the recipe's built-in corpus is to be made; None where there is none to make."""
    root = storage.locate("corpus/python")
    return root if recipe.data.corpus and not storage.exists(root) else None


def inputs(recipe: Recipe) -> Inputs:
    """Looks at the sources. Raises InputError where they are not there or not what they should be."""
    data, kind = recipe.data, recipe.objective
    aside = [scan(s, kind, on_bad=data.on_bad_document) if s else None for s in (data.validation, data.test)]
    windows = recipe.lanes * WINDOWS_PER_LANE
    if kind not in PRETRAINING:
        windows *= MAX_GROUPS  # rows are few, and often sorted: a window is put together from many places
    begins = [0, *(stage.at_tokens for stage in data.curriculum)]
    shortest = min((b - a for a, b in itertools.pairwise(begins)), default=2**62)
    found = Inputs(scan(data.sources, kind, windows, data.on_bad_document, 2 * shortest // windows), *aside)
    Plan.of(found.train, data, recipe.seed, recipe.lanes).segments  # noqa: B018 (a curriculum that cannot be kept raises)
    left_out = [shard for manifest in found.all.values() for shard in manifest.left_out]
    if left_out:
        say(f"left out {len(left_out)} shards, the first: {left_out[0]}")
    return found


def kept(folder: RunFolder) -> Inputs | None:
    """What the run in a folder began with; None where it has not begun. Raises InputError where a source has changed."""
    if not storage.exists(folder.manifest):
        return None
    found = _kept(folder)
    for manifest in found.all.values():
        manifest.check_unchanged()
    return found


def _kept(folder: RunFolder) -> Inputs:
    found = {k: Manifest.from_json(m) for k, m in storage.read_json(folder.manifest).items()}
    return Inputs(found["train"], found.get("validation"), found.get("test"))


def reopen(folder: RunFolder, recipe: Recipe, test: bool = False) -> tuple[Stream, Stream | None]:
    """The streams of a run that has begun, made in this process: what it read can be read again. test: the second is that of
    data.test, where the recipe names some."""
    if not storage.exists(folder.manifest):
        raise InputError(f"{folder.root}: expected a run that has begun to train, found no {folder.manifest}")
    recipe = recipe.override({"data.executor": "inline", "data.cache": None})
    found = _kept(folder)
    return streams(recipe, replace(found, validation=found.test) if test and found.test else found, folder.tokenizer)


def recipe_of(folder: RunFolder) -> Recipe:
    """The recipe of a run that has begun, with the classes that were found."""
    recipe = loads(storage.read_text(folder.recipe), folder.recipe)
    if recipe.objective != "classify" or recipe.data.classes:
        return recipe
    return recipe.override({"data.classes": storage.read_json(_encoder_file(folder.tokenizer))["classes"]})


def settle(recipe: Recipe, found: Inputs, tokenizer: str) -> Inputs:
    """Makes or copies the tokenizer, chooses the encoder and measures tokens a byte: here, where all that it takes has been
    imported already, since a task would spend longer on that than on the work.

    Returns:
        The inputs, measured.
    """
    if not (storage.exists(_encoder_file(tokenizer)) and found.train.tokens_per_byte):
        for what, manifest in found.all.items():
            _look_through(recipe, what, manifest)
        made = _settle(recipe, found.train, tokenizer)
        say(made["why"])
        if recipe.objective not in PRETRAINING:
            made |= {"classes": recipe.data.classes, "examples": _survey(recipe, found, tokenizer, made["backend"])}
        storage.write(_encoder_file(tokenizer), json.dumps(made, indent=1))
        found = replace(found, train=found.train.measured(made["tokens_per_byte"]))
    return found


def _look_through(recipe: Recipe, what: str, manifest: Manifest) -> None:
    """Raises InputError where examples are bad, where no document is left, or none would be held out. Of text only so much is
    read as tells this."""
    data = recipe.data
    chosen = replace(Selection.of(data, ENCODERS[recipe.objective].fields), held_out=0.0)
    part = data.held_out if what == "train" else 0.0
    left = aside = bad = 0
    for documents in _all(chosen, manifest):
        left, bad = left + len(documents.origin), bad + documents.skipped.count
        aside += int(held_out(documents.fields[0], part).sum())
        if recipe.objective in PRETRAINING and left > aside >= bool(part):
            break
    if part and left and not 0 < aside < left:
        raise InputError(
            f"data.held_out: {part} of {left:,} documents holds out {'all' if aside else 'none'}: choose a "
            f"{'smaller' if aside else 'greater'} part, or name files of their own (data.validation)"
        )
    if not left:
        columns = ", ".join(sorted({f.column for source in manifest.sources for f in source.filters}))
        passes = f"passes the filters on {columns}" if columns else "can be used"
        of = f" ({bad:,} bad ones are left out)" if bad else ""
        hint = "; of rows of one split: data.sources=[{}] data.validation=[] data.test=[] data.held_out=0.02" if columns else ""
        raise InputError(f"{what} data: {manifest.sources[0].path}: no document {passes}{of}{hint}")


def streams(recipe: Recipe, found: Inputs, tokenizer: str) -> tuple[Stream, Stream | None]:
    """The training stream, and the held-out one: always inline and in one lane, so that it is the same for all."""
    data = recipe.data
    encoder = encoder_of(recipe, tokenizer)
    plan = Plan.of(found.train, data, recipe.seed, recipe.lanes)
    chosen = Selection.of(data, encoder.fields)
    made = TokenCache.open(storage.locate(data.cache), found.train, chosen, encoder) if data.cache else None
    train = Stream(plan, chosen, encoder, data.sequence_length, data.executor, data.packing, tuple(data.skip), made)
    train = replace(train, labels=tuple(recipe.cluster.data_labels.items()))
    held = None
    if found.validation:
        held = Stream(Plan(found.validation, 0, 1), replace(chosen, held_out=0), encoder, data.sequence_length, "inline")
    elif data.held_out:
        aside = Selection.of(data, encoder.fields, "held_out")
        held = Stream(Plan(found.train, 0, 1), aside, encoder, data.sequence_length, "inline")
    return train, held


def encoder_of(recipe: Recipe, tokenizer: str) -> TextEncoder:
    """Of a tokenizer's folder that was settled."""
    backend = storage.read_json(_encoder_file(tokenizer))["backend"]
    return _encoder(recipe, tokenizer, backend)


def _encoder(recipe: Recipe, tokenizer: str, backend: str) -> TextEncoder:
    data = recipe.data
    return ENCODERS[recipe.objective](tokens.load_tokenizer(tokenizer), data.sequence_length, backend, data.classes)


def needs(recipe: Recipe) -> dict[str, float]:
    """The resources of a run: its workers, and Ray Data's tasks beside them."""
    c = recipe.cluster
    data = TASK_CPUS if recipe.data.executor == "ray" else 0
    fewest = recipe.workers[0]
    return {"CPU": fewest * (c.cpus_per_worker + data), "GPU": fewest * c.gpus_per_worker}


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
        if there == recipe:
            return
    storage.write(folder.recipe, recipe.to_yaml())


def _difference(there: Recipe, here: Recipe) -> str:
    def flat(tree: Any, at: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {at: tree}
        return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{at}.{key}" if at else key).items()}

    a, b = flat(there.identity()), flat(here.identity())
    return ", ".join(f"{k}: {a.get(k)} there, {b.get(k)} here" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k))


def _encoder_file(tokenizer: str) -> str:
    return storage.join(tokenizer, "encoder.json")


def _settle(recipe: Recipe, manifest: Manifest, to: str) -> dict[str, Any]:
    chosen = Selection.of(recipe.data, ENCODERS[recipe.objective].fields)
    wanted = recipe.tokenizer
    if not storage.exists(storage.join(to, tokens.LAST_WRITTEN)):
        if wanted.vocab_size:
            made: Any = tokens.train_tokenizer(
                manifest, chosen, wanted.vocab_size, wanted.train_mb, recipe.seed, recipe.objective
            )
        else:
            made = tokens.load_tokenizer(wanted.path or str(recipe.model.path))
        if wanted.chat_template and (wanted.chat_template != "plain" or not made.chat_template):
            made.chat_template = _template(wanted.chat_template)
        tokens.save_tokenizer(made, to)
    tokenizer = tokens.load_tokenizer(to)
    sample = [
        t for s in range(len(manifest.sources)) for c in tokens.sample(manifest, chosen, s, SAMPLE_MB, recipe.seed) for t in c
    ]
    backend, why = admit(tokenizer, sample)
    encoder = _encoder(recipe, to, backend)
    density = [tokens.per_byte(manifest, chosen, encoder, s, SAMPLE_MB, recipe.seed) for s in range(len(manifest.sources))]
    return {"backend": backend, "why": why, "identity": encoder.identity(), "tokens_per_byte": density}


def _survey(recipe: Recipe, found: Inputs, tokenizer: str, backend: str) -> dict[str, dict[str, int]]:
    """Looks through the examples, and says what part of them is learnt. Raises InputError where a row is bad (see Selection),
    or nothing is learnt from any."""
    encoder = _encoder(recipe, tokenizer, backend)
    out = {}
    for what, manifest in found.all.items():
        chosen = replace(Selection.of(recipe.data, encoder.fields), held_out=0.0)
        count = {"examples": 0, "tokens": 0, "targets": 0, "cut": 0, "left_out": 0}
        size = 0
        for group in range(len(manifest)):
            (made,) = encoder.encode([chosen.read(manifest, group)])
            learnt = int(made.targets.sum()) if made.targets is not None else len(made.ids)
            size += manifest.group(group).bytes
            more = (len(made.origin), len(made.ids), learnt, made.cut, made.skipped.count)
            count = {k: v + m for (k, v), m in zip(count.items(), more, strict=True)}
            if size > SURVEY_MB * 1e6:
                break
        if not count["targets"]:
            raise InputError(f"{what} data: {count['examples']} examples, and every label is masked: nothing would be learnt")
        masked = 1 - count["targets"] / count["tokens"]
        left_out = f", {count['left_out']:,} bad rows left out" if count["left_out"] else ""
        say(
            f"{what} data: {count['examples']:,} examples of {count['tokens'] / count['examples']:.0f} tokens, {masked:.1%} of "
            f"them masked; {count['cut']:,} examples are cut, longer than data.sequence_length{left_out}"
        )
        out[what] = count
    return out
