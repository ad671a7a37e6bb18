"""Evaluation of runs: Ray Data streams the held-out rows and prompts through workers that hold the model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from sevenfold import storage
from sevenfold.data.encode import CompletionEncoder
from sevenfold.data.rows import IGNORE, Rows, labels
from sevenfold.data.stream import Stream
from sevenfold.data.tokens import load_tokenizer, token_bytes
from sevenfold.engine import objectives
from sevenfold.errors import InputError
from sevenfold.evaluate import metrics
from sevenfold.evaluate.generate import complete
from sevenfold.model import build
from sevenfold.recipe import Recipe, loads
from sevenfold.report import trials
from sevenfold.report.console import say, table
from sevenfold.runs import cluster, prepare
from sevenfold.runs.worker import first_pairs
from sevenfold.storage import RunFolder

BATCH = 32  # rows or prompts at once
UNIGRAM_WINDOWS = 8  # of training text that the unigram is counted on
SAMPLES = 3
SAMPLE_TOKENS = 60  # of a sampled completion
SAMPLE_CHARACTERS = 300  # of a prompt that is shown


def run(path: str, verbose: bool = False, workers: int | None = None) -> RunFolder:
    """Measures a finished run on all its held-out documents; writes `metrics.json` and `predictions.jsonl`.

    Raises:
        InputError: no finished run at the path, or one without held-out documents.
    """
    folder = RunFolder.of(path)
    if not folder.finished():
        raise InputError(f"{folder.root}: expected a finished run, found one under way: resubmit its job first")
    recipe = loads(storage.read_text(folder.recipe), folder.recipe)
    train, held = prepare.reopen(folder, recipe)
    if held is None:
        raise InputError(f"{folder.root}: its recipe has no data.validation or data.held_out: nothing to measure it on")
    if not ray.is_initialized():
        cluster.connect(verbose)
    workers = workers or max(1, min(2, int(ray.cluster_resources().get("CPU", 0)) - 1))  # a CPU is left to the reading
    cluster.require({"CPU": workers + 1}, f"evaluating {folder.name}", recipe.cluster.wait_seconds)
    if recipe.objective == "causal":
        measured, predictions = _perplexity(folder, recipe, train, held, workers)
    elif recipe.objective == "sft":
        measured, predictions = _completions(folder, recipe, held, workers)
    else:
        measured, predictions = _loss(folder, recipe, held, workers), []
    storage.write(folder.metrics, json.dumps(measured, indent=1))
    storage.write(folder.predictions, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
    show(folder, measured, predictions)
    return folder


def _perplexity(
    folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, workers: int
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Bits per byte of every held-out document, in rows as in training, beside a unigram and xz on the same text."""
    rows = held.epoch()
    size = token_bytes(load_tokenizer(folder.tokenizer))
    wanted = labels(rows)
    asked = wanted[wanted != IGNORE]
    nats, _ = _scored(folder, recipe, rows, workers)
    counted = [labels(train.window(i).rows) for i in range(min(UNIGRAM_WINDOWS, train.plan.windows_per_epoch))]
    frequent = np.concatenate([c[c != IGNORE] for c in counted])
    texts = [text for (column,) in held.documents() for text in column]
    text_bytes = int(size[asked].sum())
    measured = {
        "bits_per_byte": metrics.bits_per_byte(nats, text_bytes), "perplexity": float(np.exp(nats / len(asked))),
        "baselines": {
            "unigram of its tokens": metrics.unigram_bits_per_byte(frequent, asked, text_bytes, len(size)),
            "xz -9 of the same text": metrics.xz_bits_per_byte(texts),
        },
        "documents": len(texts), "bytes": text_bytes, "tokens": len(asked),
    }  # fmt: skip
    prompts = [t[:SAMPLE_CHARACTERS].rsplit(" ", 1)[0] for t in texts[:SAMPLES]]
    new = min(SAMPLE_TOKENS, recipe.data.sequence_length // 2)
    made = _mapped(
        pa.table({"prompt": prompts}), _Completer,
        {"folder": folder, "recipe": recipe, "room": recipe.data.sequence_length - new, "new": new,
         "temperature": 0.7, "seed": recipe.seed}, 1,
    )  # fmt: skip
    return measured, [{"prompt": r["prompt"], "completion": r["completion"]} for r in made]


def _loss(folder: RunFolder, recipe: Recipe, held: Stream, workers: int) -> dict[str, Any]:
    """The objective's own loss on every held-out document, hidden as at each validation."""
    rows = held.epoch()
    nats, targets = _scored(folder, recipe, rows, workers)
    loss = nats / max(1, targets)
    return {"loss": loss, "perplexity": float(np.exp(loss)), "targets": targets, "rows": len(rows), "baselines": {}}


def _scored(folder: RunFolder, recipe: Recipe, rows: Rows, workers: int) -> tuple[float, int]:
    """The sum of -log p of all targets, nats, and their number."""
    starts = np.split(rows.starts, rows.bounds[1:-1])
    packed = pa.table({"tokens": list(rows.tokens), "starts": starts, "used": rows.used})
    scored = _mapped(packed, _Scorer, {"folder": folder, "recipe": recipe}, workers)
    return sum(r["nats"] for r in scored), sum(int(r["targets"]) for r in scored)


def _completions(folder: RunFolder, recipe: Recipe, held: Stream, workers: int) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """ROUGE of greedy completions of every held-out prompt, beside the prompt's own first sentence."""
    pairs = first_pairs(held)
    new = recipe.validation.max_new_tokens
    made = _mapped(
        pa.table({"prompt": [p for p, _ in pairs], "reference": [r for _, r in pairs]}), _Completer,
        {"folder": folder, "recipe": recipe, "room": recipe.data.sequence_length - new, "new": new, "temperature": 0.0,
         "seed": recipe.seed}, workers,
    )  # fmt: skip
    references = [r["reference"] for r in made]
    measured = {
        **metrics.rouge([r["completion"] for r in made], references),
        "baselines": {
            "first sentence (ROUGE-L)": metrics.rouge([metrics.lead(r["prompt"]) for r in made], references)["rougeL"]
        },
        "prompts": len(made),
    }
    return measured, [{k: r[k] for k in ("prompt", "reference", "completion")} for r in made]


def _mapped(rows: pa.Table, model: type, arguments: dict[str, Any], workers: int) -> list[dict[str, Any]]:
    """Streams rows through actors that hold the model, in order."""
    data = ray.data.from_arrow(rows).repartition(min(len(rows), 4 * workers))
    data.context.enable_progress_bars = False
    data.context.execution_options.preserve_order = True
    mapped = data.map_batches(
        model, fn_constructor_kwargs=arguments, batch_size=BATCH, batch_format="numpy", num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )  # fmt: skip
    return list(mapped.take_all())


class _Scorer:
    """An actor that adds up -log p over batches of packed rows."""

    def __init__(self, folder: RunFolder, recipe: Recipe):
        torch.set_num_threads(1)
        self.model = _load(folder, recipe)
        self.objective = objectives.of(recipe, load_tokenizer(folder.tokenizer), self.model.config)
        self.losses = objectives.attach(self.model, self.objective)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = Rows(np.stack(list(batch["tokens"])), np.concatenate(list(batch["starts"])), batch["used"])
        made = self.objective.collate(rows, 0).to(self.model.device)
        nats, targets = self.losses(made).double().sum(1), (made.labels != IGNORE).sum(1)
        return {"nats": nats.cpu().numpy(), "targets": targets.cpu().numpy()}


class _Completer:
    """An actor that completes prompts."""

    def __init__(self, folder: RunFolder, recipe: Recipe, room: int, new: int, temperature: float, seed: int):
        torch.set_num_threads(1)
        self.model, self.tokenizer = _load(folder, recipe), load_tokenizer(folder.tokenizer)
        self.encoder = CompletionEncoder(self.tokenizer, room + new)
        self.room = room
        self.settings: dict[str, Any] = {"max_new_tokens": new, "temperature": temperature, "seed": seed}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        prompts = [self.encoder.prompt(p, self.room) for p in batch["prompt"]]
        made = complete(self.model, self.tokenizer, prompts, **self.settings)
        return {**batch, "completion": np.array(made, dtype=object)}


def _load(folder: RunFolder, recipe: Recipe) -> Any:
    made, _ = build.CLASSES[recipe.objective]
    code = recipe.model.trust_remote_code
    return made.from_pretrained(storage.local(folder.model), trust_remote_code=code, dtype=torch.float32).eval()


def show(folder: RunFolder, measured: dict[str, Any], predictions: list[dict[str, str]]) -> None:
    """Prints the figures, a few samples and where everything lies."""
    figures = [(k, v) for k, v in measured.items() if k != "baselines"]
    table(f"{folder.name}: held-out", ["measure", "value"], [*figures, *measured["baselines"].items()])
    if storage.exists(folder.trials):
        trials.show(folder)
    for p in predictions[:SAMPLES]:
        say(f"\n--- prompt\n{p['prompt'][-SAMPLE_CHARACTERS:]}\n--- {folder.name} continues\n{p['completion']}")
        if "reference" in p:
            say(f"--- reference\n{p['reference']}")
    say("")
    for what, path in (
        ("model (Hugging Face)", folder.model), ("adapter (peft)", folder.adapter), ("trials", folder.trials),
        ("metrics", folder.metrics), ("predictions", folder.predictions), ("checkpoints", folder.checkpoints),
        ("TensorBoard", folder.tensorboard), ("recipe", folder.recipe),
    ):  # fmt: skip
        if storage.exists(path):
            say(f"{what:21} {path}")
