"""What pretraining and fine-tuning share: preparing a run, and wiring it to Ray Train."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Empty, Queue

import sevenfold
from sevenfold import storage
from sevenfold.data import corpus
from sevenfold.data.manifest import Manifest, scan
from sevenfold.data.order import Plan
from sevenfold.data.stream import Stream
from sevenfold.data.tokens import CompletionEncoder, TextEncoder, load_tokenizer, save_tokenizer, train_tokenizer
from sevenfold.errors import InputError, RunError
from sevenfold.model import build
from sevenfold.recipe import Recipe, loads
from sevenfold.report.console import Progress, say
from sevenfold.runs import cluster
from sevenfold.runs.lanes import Lanes
from sevenfold.runs.worker import Job, work
from sevenfold.storage import RunFolder

FIELDS: dict[str, tuple[str, ...]] = {"causal": ("text",), "sft": ("prompt", "completion")}
DATA_CPUS = 1  # of Ray Data's tasks, a worker


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, found and looked at; nothing is written yet."""

    train: Manifest
    validation: Manifest | None


def inputs(recipe: Recipe, make_corpus: bool = True) -> Inputs:
    """Raises InputError for whatever can be told before a cluster is asked."""
    if recipe.data.corpus == "python":
        root = storage.locate("corpus/python")
        if make_corpus and not storage.exists(root):
            say(f"making the corpus {root} (sevenfold corpus python)")
            corpus.build_python(root)
    fields = FIELDS[recipe.objective]
    validation = scan(recipe.data.validation, fields) if recipe.data.validation else None
    found = Inputs(scan(recipe.data.sources, fields), validation)
    if recipe.tokenizer.path:
        load_tokenizer(storage.locate(recipe.tokenizer.path))
    config = build.config_of(recipe, recipe.tokenizer.vocab_size or 0)
    del config
    return found


def needs(recipe: Recipe) -> dict[str, float]:
    """The resources of a run: its workers, and Ray Data's tasks beside them."""
    c = recipe.cluster
    data = DATA_CPUS if recipe.data.executor == "ray" else 0
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


def prepare(recipe: Recipe, found: Inputs, folder: RunFolder) -> Job:
    """Settles what the first start of a run decides and every later one takes up: manifest and tokenizer."""
    claim(folder, recipe)
    if storage.exists(folder.manifest):
        Manifest.from_json(storage.read_json(folder.manifest)).check_unchanged(found.train)
    else:
        storage.write(folder.manifest, json.dumps(found.train.to_json()))
    if not storage.listdir(folder.tokenizer):
        ray.get(_settle_tokenizer.remote(recipe, found.train, folder.tokenizer))
    tokenizer = load_tokenizer(folder.tokenizer)
    length = recipe.data.sequence_length
    encoder = CompletionEncoder(tokenizer, length) if recipe.objective == "sft" else TextEncoder(tokenizer)
    train = Stream(Plan(found.train, recipe.seed, recipe.lanes), encoder, length, recipe.data.executor)
    held = found.validation and Stream(Plan(found.validation, 0, 1), encoder, length, "inline")
    if recipe.model.path:  # workers stand in folders of their own
        recipe = recipe.override({"model.path": build.model_path(recipe.model.path)})
    return Job(recipe, folder.root, folder.tokenizer, train, held or None)


@ray.remote(num_cpus=1)
def _settle_tokenizer(recipe: Recipe, manifest: Manifest, to: str) -> None:
    if recipe.tokenizer.vocab_size:
        made: Any = train_tokenizer(manifest, recipe.tokenizer.vocab_size, recipe.tokenizer.train_mb, recipe.seed)
    else:
        made = load_tokenizer(storage.locate(recipe.tokenizer.path or "") if recipe.tokenizer.path else _beside(recipe))
    save_tokenizer(made, to)


def _beside(recipe: Recipe) -> str:
    return build.model_path(recipe.model.path or "")


def launch(job: Job, callbacks: list[Any]) -> dict[str, Any]:
    """Trains on Ray Train workers until the last step. Returns what was reported last.

    Raises:
        RunError: the workers failed more often than cluster.max_failures allows.
    """
    c = job.recipe.cluster
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"job": job},
        datasets={"train": job.train},
        dataset_config=Lanes(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=c.num_workers, use_gpu=c.gpus_per_worker > 0,
            resources_per_worker={"CPU": c.cpus_per_worker, **({"GPU": c.gpus_per_worker} if c.gpus_per_worker else {})},
        ),
        run_config=ray.train.RunConfig(
            name="train", storage_path=storage.RunFolder(job.folder).ray, callbacks=callbacks,
            failure_config=ray.train.FailureConfig(max_failures=c.max_failures, controller_failure_limit=3),
            logging_config=ray.train.LoggingConfig(log_level="INFO" if job.verbose else "ERROR"),
        ),
    )  # fmt: skip
    try:
        return dict(trainer.fit().return_value)
    except ray.train.TrainingFailedError as e:
        if "sevenfold.errors." not in str(e):
            say(str(e))  # a bug of ours or a fault of the machine: the worker's traceback tells
        raise RunError(f"{job.folder}: training failed: {_cause(e)}; resubmit to go on from the last checkpoint") from e


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
    return found.partition("sevenfold.errors.")[2].partition(": ")[2] or found


class _Watcher:
    """Shows what rank 0 sends while fit() blocks."""

    def __init__(self, name: str, steps: int):
        self.queue = Queue(actor_options={"num_cpus": 0})
        self._progress, self._stop = Progress(name, steps), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def _show(self) -> None:
        while not (self._stop.is_set() and self.queue.empty()):
            try:
                step, values = self.queue.get(timeout=0.5)
            except Empty:
                continue
            self._progress.log(step, values)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self._progress.close()
        self.queue.shutdown(force=True)


def run(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """Trains, resumes or finds finished what the recipe names; ends with a Hugging Face directory.

    Raises:
        InputError: see `inputs`, `cluster.require` and `claim`.
        RunError: the run failed.
    """
    folder = RunFolder(storage.join(storage.locate(recipe.storage), recipe.name))
    found = inputs(recipe)
    if storage.exists(folder.recipe):
        claim(folder, recipe)
    if folder.finished():
        say(f"{folder.root}: finished before; nothing to do")
        return folder
    begin = time.time()
    cluster.connect(verbose)
    cluster.require(needs(recipe), f"{recipe.name} ({recipe.cluster.num_workers} workers)", recipe.cluster.wait_seconds)
    job = prepare(recipe, found, folder)
    watcher = _Watcher(recipe.name, recipe.steps)
    job.queue, job.verbose = watcher.queue, verbose
    try:
        metrics = launch(job, [])
    finally:
        watcher.close()
    finish(job, metrics, time.time() - begin)
    return folder


def finish(job: Job, metrics: dict[str, Any], seconds: float) -> None:
    """Exports the reported checkpoint and writes the summary, which is what says that a run is finished."""
    folder, checkpoint = RunFolder(job.folder), metrics["checkpoint"]
    ray.get(_export.remote(job.recipe, checkpoint, job.tokenizer, folder))
    summary = {
        "sevenfold": sevenfold.__version__, "recipe": job.recipe.hash(), "steps": job.recipe.steps,
        "tokens": job.recipe.steps * job.recipe.tokens_per_step, "seconds": round(seconds, 1), "checkpoint": checkpoint,
        "model": folder.model, "metrics": metrics,
    }  # fmt: skip
    storage.write(folder.summary, json.dumps(summary, indent=1))


@ray.remote(num_cpus=1)
def _export(recipe: Recipe, checkpoint: str, tokenizer: str, to: RunFolder) -> None:
    from sevenfold.model.export import export

    export(recipe, checkpoint, tokenizer, to)
