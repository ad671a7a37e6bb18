"""Evaluation of finished runs: figures, predictions, a table beside baselines, and runs against each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import ray

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.evaluate.compare import paired_bootstrap
from sevenfold.evaluate.harness import harness, require
from sevenfold.model.card import with_figures
from sevenfold.recipe import Recipe
from sevenfold.report import trials
from sevenfold.report.console import say, table
from sevenfold.runs import cluster, prepare
from sevenfold.runs.measure import SAMPLE_CHARACTERS, SAMPLES, Actors, measure
from sevenfold.storage import RunFolder


def run(
    paths: Sequence[str], verbose: bool = False, workers: int | None = None, task: str | None = None, new: int | None = None
) -> None:
    """Measures finished runs on all their held-out documents; writes `metrics.json` and `predictions.jsonl` of each and its
    figures into its model card. Runs that completed the same prompts are compared, by paired bootstrap, with the first of them.

    Args:
        task: file of a task of lm-eval (YAML) that the models are measured on as well.
        new: most tokens of a completion; default: as the recipe's validation.

    Raises:
        InputError: no finished run at a path, or one without held-out documents; as harness.
    """
    if task is not None:
        require(task)
    found = [_one(path, verbose, workers, task, new) for path in paths]
    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    tokenize, names = "13a", [folder.name for folder, _ in found]
    for folder, predictions in found:
        if predictions and "reference" in predictions[0]:
            references = tuple(p["reference"] for p in predictions)
            label = folder.name if names.count(folder.name) == 1 else folder.root
            alike.setdefault(references, {})[label] = [p["completion"] for p in predictions]
            tokenize = prepare.recipe_of(folder).validation.bleu_tokenize
    for references, systems in alike.items():
        if len(systems) > 1:
            _compare(list(references), systems, tokenize)


def _one(
    path: str, verbose: bool, workers: int | None, task: str | None, new: int | None
) -> tuple[RunFolder, list[dict[str, Any]]]:
    folder = RunFolder.of(path)
    if not folder.finished():
        raise InputError(f"{folder.root}: expected a finished run, found one under way: resubmit its job first")
    recipe = prepare.recipe_of(folder)
    if new is not None:
        recipe = recipe.override({"validation.max_new_tokens": new})
    train, held = prepare.reopen(folder, recipe, test=True)
    if held is None:
        raise InputError(
            f"{folder.root}: its recipe has no data.test, data.validation or data.held_out: nothing to measure it on"
        )
    if not ray.is_initialized():
        cluster.connect(verbose)
    actors = _actors(recipe, workers)
    need: dict[str, float] = {"CPU": actors.number + 1, "GPU": actors.number * actors.gpus}  # a CPU is left to the reading
    cluster.require(need, f"evaluating {folder.name}", recipe.cluster.wait_seconds)
    measured, predictions = measure(folder, recipe, train, held, actors)
    storage.write(folder.predictions, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
    storage.write(folder.metrics, json.dumps(measured, indent=1, ensure_ascii=False))
    if task is not None:
        measured["harness"] = harness(storage.local(folder.model), task)
        storage.write(folder.metrics, json.dumps(measured, indent=1, ensure_ascii=False))
    card = storage.join(folder.model, "README.md")
    if storage.exists(card):
        storage.write(card, with_figures(storage.read_text(card), measured))
    show(folder, measured, predictions)
    return folder, predictions


def _actors(recipe: Recipe, count: int | None) -> Actors:
    """On GPUs where the run had some and this cluster has. count: default: as many as trained, two at least, where they fit."""
    has = ray.cluster_resources()
    gpus = int(bool(recipe.cluster.gpus_per_worker) and has.get("GPU", 0) >= 1)
    room = min(int(has.get("CPU", 0)) - 1, int(has["GPU"]) if gpus else sys.maxsize)
    return Actors(count or max(1, min(max(2, recipe.workers[0]), room)), gpus)


def _compare(references: list[str], systems: dict[str, list[str]], tokenize: str) -> None:
    rows = paired_bootstrap(references, systems, tokenize=tokenize)
    table(
        f"Against {next(iter(systems))}, by paired bootstrap",
        ["run", "measure", "score", "mean", "95% interval", "p"],
        [[r["system"], r["measure"], r["score"], r["mean"], f"{r['low']:.1f} to {r['high']:.1f}", r["p"]] for r in rows],
    )


def show(folder: RunFolder, measured: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    """Prints the figures beside the baselines', a few samples and where everything lies."""
    others: dict[str, dict[str, Any]] = measured["baselines"]
    figures = {k: v for k, v in measured.items() if not isinstance(v, dict | str)}
    rows = [[name, value, *(other.get(name) for other in others.values())] for name, value in figures.items()]
    table(f"{folder.name}: held-out", ["measure", folder.name, *others], rows)
    if cut := measured.get("cut_completions"):
        say(f"{cut} of {measured['prompts']} completions were cut: allow more by --max-new-tokens")
    for name, one in measured.get("per_class", {}).items():
        say(f"{name}: F1 {one['f1']:.3f}, precision {one['precision']:.3f}, recall {one['recall']:.3f}, of {one['support']}")
    for name, figures in measured.get("harness", {}).get("results", {}).items():
        say(f"{name} (lm-eval): {figures}")
    for name in ("bleu_signature", "chrf_signature"):
        if name in measured:
            say(f"{name}: {measured[name]}")
    if storage.exists(folder.trials):
        trials.show(folder)
    for p in predictions[:SAMPLES]:
        say("")
        for key, text in p.items():
            said = f"{folder.name} continues" if key == "completion" else key
            say(f"--- {said}\n{str(text)[-SAMPLE_CHARACTERS:]}")
    say("")
    for what, path in (
        ("model (Hugging Face)", folder.model), ("adapter (peft)", folder.adapter), ("trials", folder.trials),
        ("metrics", folder.metrics), ("predictions", folder.predictions), ("checkpoints", folder.checkpoints),
        ("TensorBoard", folder.tensorboard), ("recipe", folder.recipe),
    ):  # fmt: skip
        if storage.exists(path):
            say(f"{what:21} {path}")
