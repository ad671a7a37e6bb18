"""The input data of a run: finds the files of its sources, and checks and records them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sevenfold import storage
from sevenfold.data.examples import ENCODERS
from sevenfold.data.manifest import Manifest
from sevenfold.data.order import (
    CHUNKS_PER_LANE,
    FEISTEL,
    LANES_BYTES,
    LISTED,
    MAX_GROUPS_PER_CHUNK,
    DataOrder,
)
from sevenfold.data.scan import scan
from sevenfold.data.sources import formats, python_corpus
from sevenfold.data.sources.documents import BadDocumentsError, Documents, Selection, held_out
from sevenfold.data.sources.reading import column_names
from sevenfold.errors import InputError
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.report.console import say
from sevenfold.run_folder import RunFolder

MAX_CLASSES = 10_000  # of a classification task


@dataclass(frozen=True)
class Inputs:
    """The files that a recipe names, one manifest per split.

    Attributes:
        train: The manifest of data.sources.
        validation: The manifest of data.validation, None if the recipe has none.
        test: The manifest of data.test, None if the recipe has none.
        order: The version of the order in which the run reads them, see `data.order`.
    """

    train: Manifest
    validation: Manifest | None
    test: Manifest | None = None
    order: int = FEISTEL

    @property
    def all(self) -> dict[str, Manifest]:
        """The manifests that are not None, by the name of the split."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: manifest for split, manifest in splits.items() if manifest is not None}

    def recorded(self) -> Inputs:
        """Returns the inputs with what tells later whether a file has changed."""
        recorded = {split: manifest.recorded() for split, manifest in self.all.items()}
        return Inputs(
            recorded["train"], recorded.get("validation"), recorded.get("test"), self.order
        )


def with_classes(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Returns the recipe with the classes that occur in its training data.

    A recipe that names its classes, or is not for classification, is returned as it is.

    Args:
        recipe: The recipe.
        manifest: The manifest of the training data.

    Raises:
        InputError: There are fewer than two classes, or more than MAX_CLASSES.
    """
    if recipe.objective != "classify" or recipe.data.classes:
        return recipe
    selection = Selection.from_data(recipe.data, ENCODERS["classify"].fields)
    classes = {
        label
        for documents in iter_documents(selection, manifest)
        for label in documents.fields[1].to_pylist()
    }
    if not classes:
        check_documents(recipe, "train", manifest)
    if not 2 <= len(classes) <= MAX_CLASSES:
        only_class = f" ({next(iter(classes))})" if len(classes) == 1 else ""
        raise InputError(
            f"{recipe.name}: expected 2 to {MAX_CLASSES:,} classes in the sources, "
            f"found {len(classes):,}{only_class}: "
            "name the column that holds the labels (columns: {label: COLUMN})"
        )
    return recipe.override({"data.classes": sorted(classes, key=_class_order)})


def _class_order(name: str) -> tuple[bool, float, str]:
    """Returns the sorting key of a class: numbers by their values, then other names."""
    is_number = re.fullmatch(r"-?\d+(\.\d+)?", name) is not None
    return (not is_number, float(name) if is_number else 0.0, name)


def iter_documents(selection: Selection, manifest: Manifest) -> Iterator[Documents]:
    """Yields the selected documents of each row group.

    Bad documents do not end the iteration at once, so that all those of a file are reported
    together.

    Raises:
        BadDocumentsError: A file has bad documents. Raised at the end, with all bad documents of
            the first such file.
    """
    errors: list[BadDocumentsError] = []
    for group in range(len(manifest)):
        try:
            yield selection.read(manifest, group)
        except BadDocumentsError as e:
            if errors and errors[0].path != e.path:
                break
            errors.append(e)
    if errors:
        raise BadDocumentsError(errors[0].path, [document for e in errors for document in e.bad])


def missing_corpus(recipe: Recipe) -> str | None:
    """Returns the folder in which the recipe's built-in corpus has to be built.

    The result is None if the recipe uses no built-in corpus, or if it exists already.
    """
    root = storage.resolve_input("corpus/python")
    return root if recipe.data.corpus and not storage.exists(root) else None


def build_missing_corpus(recipe: Recipe) -> None:
    """Builds the built-in corpus if the recipe uses it and it does not exist yet."""
    if root := missing_corpus(recipe):
        say(f"building the corpus {root} (as `sevenfold corpus python` does)")
        python_corpus.build_python(root)


def find_inputs(recipe: Recipe) -> Inputs:
    """Finds and examines the files of a recipe's sources.

    Raises:
        InputError: A source does not exist or cannot be used, or the curriculum does not fit the
            data.
    """
    data, objective = recipe.data, recipe.objective
    max_bytes, reported = int(data.max_document_mb * 1e6), set[str]()
    validation, test = (
        scan(
            sources,
            objective,
            on_bad=data.on_bad_document,
            ignored_columns=data.ignore_columns,
            max_bytes=max_bytes,
            reported=reported,
        )
        if sources
        else None
        for sources in (data.validation, data.test)
    )
    chunks = recipe.lanes * CHUNKS_PER_LANE
    if objective not in PRETRAINING:
        # examples are few and often sorted: each chunk is to draw from many places
        chunks *= MAX_GROUPS_PER_CHUNK
    # row groups are made so small that the shortest stage of the curriculum has enough chunks
    stage_starts = [0, *(stage.at_tokens for stage in data.curriculum)]
    stage_tokens = (stop - start for start, stop in itertools.pairwise(stage_starts))
    max_group_bytes = min(
        2 * min(stage_tokens, default=2**62) // chunks, LANES_BYTES // recipe.lanes
    )
    train = scan(
        data.sources,
        objective,
        chunks,
        data.on_bad_document,
        max_group_bytes,
        data.ignore_columns,
        max_bytes,
        reported,
    )
    inputs = Inputs(train, validation, test)
    DataOrder.from_manifest(train, data, recipe.seed, recipe.lanes).segments  # noqa: B018 (checks the stages)
    skipped_files = [file for manifest in inputs.all.values() for file in manifest.skipped]
    if skipped_files:
        say(f"skipped {len(skipped_files)} files; the first: {skipped_files[0]}")
    for split, manifest in inputs.all.items():
        _report_unread_columns(split, manifest, data.ignore_columns)
    return inputs


def _report_unread_columns(split: str, manifest: Manifest, ignored: Sequence[str]) -> None:
    """Shows the columns of fine-tuning data that are not read, unless they are to be ignored."""
    for index, source in enumerate(manifest.sources):
        if source.shape is None:
            continue
        shard = next(s for s in manifest.shards if s.source == index)
        read = {*formats.columns_to_read(source), *(rule.column for rule in source.filters)}
        unread = [name for name in column_names(shard) if name not in read | set(ignored)]
        if unread:
            say(
                f"{split} data: {shard.path} has columns that are not read: {', '.join(unread)} "
                "(data.ignore_columns hides this line)"
            )


def load_unchanged_inputs(folder: RunFolder) -> Inputs | None:
    """Returns the inputs that a run has started with, or None if it has not started yet.

    Raises:
        InputError: A file has changed since then.
    """
    if not storage.exists(folder.manifest):
        return None
    inputs = load_inputs(folder)
    for manifest in inputs.all.values():
        manifest.check_unchanged()
    stored: dict[str, Any] = storage.read_json(folder.manifest)
    paths = [shard["path"] for split in inputs.all for shard in stored[split]["shards"]]
    if any(path != storage.without_secrets(path) for path in paths):
        write_inputs(folder, inputs)  # an earlier version kept the secrets of URLs
    return inputs


def write_inputs(folder: RunFolder, inputs: Inputs) -> None:
    """Writes the inputs of a run into its folder."""
    tree: dict[str, Any] = {split: manifest.to_json() for split, manifest in inputs.all.items()}
    if inputs.order != LISTED:  # earlier versions wrote none
        tree["order"] = inputs.order
    storage.write(folder.manifest, json.dumps(tree))


def load_inputs(folder: RunFolder) -> Inputs:
    """Returns the inputs that a run has started with, without checking the files.

    Raises:
        InputError: The run has no manifest.json, or it is damaged.
    """

    def parse(tree: Any) -> Inputs:
        splits = storage.json_object(tree)
        order = int(splits.pop("order", LISTED))
        manifests = {split: Manifest.from_json(subtree) for split, subtree in splits.items()}
        return Inputs(manifests["train"], manifests.get("validation"), manifests.get("test"), order)

    return storage.read_json(folder.manifest, parse)


def check_documents(recipe: Recipe, split: str, manifest: Manifest) -> None:
    """Checks that a split has usable documents, and that data.held_out selects some of them.

    For pretraining it reads only as many documents as it needs to know this. For fine-tuning it
    reads all of them.

    Args:
        recipe: The recipe.
        split: The name of the split: "train", "validation" or "test".
        manifest: The manifest of the split.

    Raises:
        InputError: An example is bad, no document can be used, or data.held_out holds out none or
            all of the documents.
    """
    data = recipe.data
    selection = replace(Selection.from_data(data, ENCODERS[recipe.objective].fields), held_out=0.0)
    fraction = data.held_out if split == "train" else 0.0
    total = held_out_total = bad = 0
    for documents in iter_documents(selection, manifest):
        total += len(documents.origin)
        bad += documents.skipped.count
        held_out_total += int(held_out(documents.fields[0], fraction).sum())
        is_enough = total > held_out_total >= bool(fraction)
        if recipe.objective in PRETRAINING and is_enough:
            break
    if fraction and total and not 0 < held_out_total < total:
        extent, change = ("all", "smaller") if held_out_total else ("none", "larger")
        raise InputError(
            f"data.held_out={fraction} holds out {extent} of the {total:,} documents: "
            f"choose a {change} fraction, or name separate files (data.validation)"
        )
    if total:
        return
    columns = ", ".join(
        sorted({rule.column for source in manifest.sources for rule in source.filters})
    )
    skipped = f" ({bad:,} bad ones are skipped)" if bad else ""
    if columns:
        problem = f"no document passes the filters on {columns}{skipped}"
        hint = ": change or remove the filters of this source"
    else:
        problem, hint = f"no document can be used{skipped}", ""
    raise InputError(f"{split} data: {manifest.sources[0].path}: {problem}{hint}")
