"""The command `evaluate`: metrics and predictions of finished runs, and comparisons of runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import ray

from sevenfold import storage
from sevenfold.cluster import capacity, connect
from sevenfold.errors import InputError
from sevenfold.evaluate.actors import ActorPool
from sevenfold.evaluate.compare import paired_bootstrap
from sevenfold.evaluate.evaluators import (
    SAMPLES,
    Evaluation,
    measure,
)
from sevenfold.evaluate.harness import harness, require_task
from sevenfold.evaluate.held_out_text import SAMPLE_CHARACTERS
from sevenfold.export.card import with_metrics
from sevenfold.model.config import local_folder
from sevenfold.prepare.job import read_recipe
from sevenfold.prepare.streams import open_streams
from sevenfold.recipe import Recipe
from sevenfold.recipe.bleu import require_modules
from sevenfold.report import ranking
from sevenfold.report.console import print_text, say, table
from sevenfold.run_folder import RunFolder

# with fewer prompts the bootstrap's intervals are too narrow, and its p-values mean nothing
FEW_REFERENCES = 100


def run(
    paths: Sequence[str],
    verbose: bool = False,
    workers: int | None = None,
    task: str | None = None,
    new: int | None = None,
    tokenize: str | None = None,
    trusted_code: list[str] | None = None,
) -> None:
    """Evaluates finished runs on all their held-out documents.

    Writes `metrics.json` and `predictions.jsonl` of each run, and adds its metrics to its model
    card. Runs that completed the same prompts are compared with the first of them, by paired
    bootstrap.

    Args:
        paths: The runs' folders.
        verbose: Shows Ray's logs.
        workers: The number of processes that hold a model; by default as many as trained it, at
            least two, if the cluster has room for them.
        task: The YAML file of an lm-eval task on which the models are also evaluated.
        new: The maximum number of new tokens per completion; by default the recipe's.
        tokenize: sacrebleu's tokenizer for BLEU; by default each run's recipe says it, and for a
            comparison of runs the references' script.
        trusted_code: The hashes of the models' Python code that may run.

    Raises:
        InputError: A path has no finished run, or a run has no held-out data; or for one of the
            reasons of `harness`.
    """
    if task is not None:
        require_task(task)
    changes: dict[str, Any] = {}
    if new is not None:
        changes["validation.max_new_tokens"] = new
    if tokenize is not None:
        changes["validation.bleu_tokenize"] = tokenize
    results = [_evaluate(path, verbose, workers, task, changes, trusted_code) for path in paths]
    # The systems that share all references: completions by the run's name.
    comparable: dict[tuple[str, ...], dict[str, list[str]]] = {}
    names = [folder.name for folder, _ in results]
    for folder, predictions in results:
        if not predictions or "reference" not in predictions[0]:
            continue
        references = tuple(p["reference"] for p in predictions)
        label = folder.name if names.count(folder.name) == 1 else folder.root
        comparable.setdefault(references, {})[label] = [p["completion"] for p in predictions]
    for references, systems in comparable.items():
        if len(systems) > 1:
            _compare(list(references), systems, tokenize)


def _evaluate(
    path: str,
    verbose: bool,
    workers: int | None,
    task: str | None,
    changes: dict[str, Any],
    trusted_code: list[str] | None,
) -> tuple[RunFolder, list[dict[str, Any]]]:
    """Evaluates one run; returns its folder and predictions.

    The arguments are those of `run`; `changes` are the settings that replace the recipe's.
    """
    folder = RunFolder.existing(path)
    if not folder.finished():
        raise InputError(
            f"{folder.root}: expected a finished run, found an unfinished one: "
            "resume it first, with the command that started it"
        )
    configs = ("config.json", "adapter_config.json")
    if not any(storage.exists(storage.join(folder.model, name)) for name in configs):
        raise InputError(
            f"{folder.model}: expected the run's exported model, found none: "
            f"write it again by `sevenfold export {folder.root}`"
        )
    if not storage.is_url(folder.model):  # before Ray starts; else each machine verifies its copy
        local_folder(folder.model)
    recipe = read_recipe(folder).override(changes).trusting(trusted_code)
    require_modules(recipe.validation.bleu_tokenize)
    train, held = open_streams(folder, recipe, test=True)
    if held is None:
        raise InputError(
            f"{folder.root}: no data to evaluate on: "
            "the recipe has no data.test, data.validation or data.held_out"
        )
    if not ray.is_initialized():
        connect.connect(verbose)
    pool = _actor_pool(recipe, workers)
    # One more CPU, for the Ray Data tasks that read.
    need: dict[str, float] = {"CPU": pool.size + 1, "GPU": pool.size * pool.gpus_per_actor}
    capacity.require_resources(need, f"evaluating {folder.name}", recipe.cluster.wait_seconds)
    result = measure(folder, recipe, train, held, pool)
    lines = [storage.to_json(p) + "\n" for p in result.predictions]
    storage.write(folder.predictions, "".join(lines))
    # The metrics are also written before lm-eval runs, since it may fail.
    storage.write_json(folder.metrics, result.metrics)
    if task is not None:
        result.metrics["harness"] = harness(local_folder(folder.model), task)
        storage.write_json(folder.metrics, result.metrics)
    card = storage.join(folder.model, "README.md")
    if storage.exists(card):
        storage.write(card, with_metrics(storage.read_text(card), result.metrics))
    _show(folder, result)
    return folder, result.predictions


def _actor_pool(recipe: Recipe, count: int | None) -> ActorPool:
    """Chooses the actors: on GPUs if the run was trained on GPUs and this cluster has some.

    Args:
        recipe: The run's recipe.
        count: The number of actors. None: as many as trained, at least two, as far as they fit.
    """
    resources = ray.cluster_resources()
    gpus = int(bool(recipe.cluster.gpus_per_worker) and resources.get("GPU", 0) >= 1)
    cpus = int(resources.get("CPU", 0)) - 1  # one CPU is left for reading
    limit = min(cpus, int(resources["GPU"]) if gpus else sys.maxsize)
    default = max(1, min(max(2, recipe.workers[0]), limit))
    return ActorPool(count or default, gpus)


def _compare(references: list[str], systems: dict[str, list[str]], tokenize: str | None) -> None:
    if len(references) < FEW_REFERENCES:
        say(
            f"{len(references)} prompts are too few to say which run is better: expected "
            f"{FEW_REFERENCES} or more for p-values and intervals"
        )
    rows = paired_bootstrap(references, systems, tokenize=tokenize)
    table(
        f"Compared with {next(iter(systems))} (paired bootstrap)",
        ["run", "metric", "score", "mean", "95% interval", "p"],
        [
            [
                r["system"],
                r["measure"],
                r["score"],
                r["mean"],
                f"{r['low']:.1f} to {r['high']:.1f}",
                r["p"],
            ]
            for r in rows
        ],
    )


def _show(folder: RunFolder, result: Evaluation) -> None:
    """Prints the metrics beside those of the baselines, some predictions and the paths."""
    _show_metrics(folder, result.metrics)
    if storage.exists(folder.trials):
        ranking.show(folder)
    for prediction in result.predictions[:SAMPLES]:
        say("")
        for key, text in prediction.items():
            title = f"{key} by {folder.name}" if key == "completion" else key
            say(f"--- {title}")
            print_text(str(text)[-SAMPLE_CHARACTERS:])
    say("")
    for label, path in (
        ("model (Hugging Face)", folder.model),
        ("adapter (peft)", folder.adapter),
        ("trials", folder.trials),
        ("metrics", folder.metrics),
        ("predictions", folder.predictions),
        ("checkpoints", folder.checkpoints),
        ("TensorBoard", folder.tensorboard),
        ("recipe", folder.recipe),
    ):
        if storage.exists(path):
            say(f"{label:21} {path}")


def _show_metrics(folder: RunFolder, metrics: dict[str, Any]) -> None:
    baselines: dict[str, dict[str, Any]] = metrics["baselines"]
    rows = [
        [name, value, *(baseline.get(name) for baseline in baselines.values())]
        for name, value in metrics.items()
        if not isinstance(value, dict | str)
    ]
    table(f"{folder.name}: held-out data", ["metric", folder.name, *baselines], rows)
    if cut := metrics.get("cut_completions"):
        say(
            f"{cut} of {metrics['prompts']} completions reached the maximum number of new tokens: "
            "raise it with --max-new-tokens"
        )
    if "per_class" in metrics:
        say(
            f"f1_macro: the mean F1 of the {metrics['classes']} classes that occur as a label or "
            "as a prediction"
        )
    for name, scores in metrics.get("per_class", {}).items():
        say(
            f"{name}: F1 {scores['f1']:.3f}, precision {scores['precision']:.3f}, "
            f"recall {scores['recall']:.3f}, {scores['support']} examples"
        )
    for name, scores in metrics.get("harness", {}).get("results", {}).items():
        say(f"{name} (lm-eval): {scores}")
    for name in ("bleu_signature", "chrf_signature"):
        if name in metrics:
            say(f"{name}: {metrics[name]}")
