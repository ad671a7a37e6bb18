"""Chooses the settings of a recipe by the rows, the model and the machine."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevenfold import storage
from sevenfold.cluster.auto import Hardware
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.errors import InputError
from sevenfold.init.rows import Rows
from sevenfold.init.tasks import TASKS, Match, texts_of
from sevenfold.model.config import Family
from sevenfold.prepare.splits import PARTS
from sevenfold.recipe import PRETRAINING, shipped
from sevenfold.recipe.plain_yaml import read_yaml

MIN_ROWS, MIN_CHARACTERS = 10, 2_000  # of less, nothing can be learnt and held out
BYTES_PER_TOKEN = 3.0  # of a tokenizer that is trained on little text
PADDING = 0.9  # the share of a packed row that holds text
FRAME_TOKENS, CHAT_FRAME_TOKENS = 16, 64  # per row, of special tokens and of a chat template
# LoRA takes a fraction of the memory, and forgets less of what a large model knows.
LORA_PARAMETERS = 50_000_000
# Usual peaks: ten times as much for LoRA as for all weights (thinkingmachines.ai/blog/lora); small
# encoders learn classes and retrieval at more (benchmarks/uses.py).
LORA_RATE, FULL_RATE, SMALL_ENCODER_RATE = 5e-4, 5e-5, 1e-4
# How long a recipe trains on a machine without a GPU. A pretrained model that writes answers trains
# for less, since its evaluation, in which it writes some, takes minutes too: ten in all.
MINUTES_ON_CPUS, MINUTES_OF_WRITERS = 8.0, 5.0
STEP_SECONDS, START_SECONDS = 0.05, 40.0  # beside the matrix products, on CPUs
# Floating point operations per second and core that training reaches in float32, about. It is not
# measured, so that the same data on the same machine gives the same recipe.
CORE_FLOPS = 2.5e10
# Pairs of query and document are embedded twice and padded (benchmarks/first_hour.py: nine minutes
# where six were estimated).
EMBEDDED_TWICE = 1.5


@dataclass(frozen=True)
class Base:
    """The model to start from.

    Attributes:
        path: As it was given.
        family: Its architecture.
        parameters: The number of its parameters, by the size of its weights.
        embeddings: How many of these are an encoder's embeddings, which are only looked up.
        max_tokens: The longest text that it takes.
        vocabulary: The number of its tokens.
        tokens_per_byte: Of the rows, by its tokenizer.
        is_chat: Whether its tokenizer has a chat template.
    """

    path: str
    family: Family
    parameters: int
    embeddings: int
    max_tokens: int
    vocabulary: int
    tokens_per_byte: float
    is_chat: bool


@dataclass(frozen=True)
class Settings:
    """The numbers of a recipe; the names are those of the recipe."""

    objective: str
    name: str
    held_out: float
    split_column: str | None
    sequence_length: int
    cut: float  # the share of the rows that are longer
    global_batch: int
    steps: int
    epochs: int
    minutes: float | None  # None: not estimated
    is_shortened: bool  # whether the steps are fewer than the epochs
    validation_rows: int
    workers: int
    lora: bool
    learning_rate: float
    scratch: dict[str, Any]  # the sections of the shipped recipe, if a new model is trained


def look_at_base(path: str, rows: Rows, match: Match) -> Base:
    """Reads a model's config and tokenizer.

    Raises:
        InputError: There is no such model, or it cannot be used.
    """
    from transformers import AutoConfig

    from sevenfold.errors import first_line
    from sevenfold.model.config import family, local_model

    folder = local_model(path, weights=False)
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a config's own code raises anything
        raise InputError(f"{folder}/config.json: {first_line(e)}") from None
    tokenizer = load_tokenizer(folder)
    texts = texts_of(rows, match)
    tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    width = 2 if "16" in str(getattr(config, "dtype", "")) else 4
    kind = family(config)
    embeddings = len(tokenizer) * int(getattr(config, "hidden_size", 0) or 0)
    return Base(
        path,
        kind,
        weights // width,
        embeddings if kind == "encoder" else 0,
        min(int(longest), 2**20),
        len(tokenizer),
        tokens / max(1, sum(len(text.encode()) for text in texts)),
        bool(tokenizer.chat_template),
    )


def choose(rows: Rows, match: Match, base: Base | None, machine: Hardware) -> Settings:
    """Chooses the settings.

    Raises:
        InputError: There are too few rows, or the task needs another kind of model.
    """
    _require_enough(rows, match, base)
    objective = _objective(match, base)
    scratch = {} if base else read_yaml(str(shipped.recipes()[match.task.recipe]), "a recipe")
    tokens = _tokens_of_rows(rows, match, base)
    length, cut = _sequence_length(tokens, objective, base, machine)
    lora = base is not None and base.parameters >= LORA_PARAMETERS
    used = tokens if objective in PRETRAINING else [min(n, length) for n in tokens]
    sequences = max(1.0, sum(used) / len(used) * rows.rows / (length * PADDING))
    workers = max(1, machine.gpus)
    validation_rows = 16 if base and not machine.gpus else 64
    is_writer = base is not None and not machine.gpus and objective in ("sft", "seq2seq", "dpo")
    allowed = MINUTES_OF_WRITERS if is_writer else MINUTES_ON_CPUS
    budget = None
    if not machine.gpus:
        budget = _sequences_in_time(base, scratch, lora, length, machine, allowed, objective)
    if budget is not None:
        # three validations, whose rows take a third of the time of trained ones
        budget = max(20, budget - validation_rows)
    batch = _global_batch(sequences, budget, workers)
    steps_per_epoch = max(1, math.ceil(sequences / batch))
    epochs = max(1, min(3 if base else 10, math.ceil(300 / steps_per_epoch)))
    steps = steps_per_epoch * epochs
    most = steps if budget is None else max(10, budget // batch)
    minutes = None
    if budget is not None:
        minutes = allowed * min(steps, most) * batch / budget
    return Settings(
        objective=objective,
        name=run_name(rows.path),
        held_out=_held_out(rows, is_writer),
        split_column=_split_column(rows),
        sequence_length=length,
        cut=cut,
        global_batch=batch,
        steps=min(steps, most),
        epochs=epochs,
        minutes=minutes,
        is_shortened=steps > most,
        validation_rows=validation_rows,
        workers=workers,
        lora=lora,
        learning_rate=_learning_rate(base, lora, scratch),
        scratch=scratch,
    )


def _require_enough(rows: Rows, match: Match, base: Base | None) -> None:
    """Raises InputError if there are too few rows, or no model where the task needs one."""
    characters = rows.survey["characters"]
    if rows.rows < MIN_ROWS and characters < MIN_CHARACTERS * MIN_ROWS:
        raise InputError(
            f"{rows.path}: expected at least {MIN_ROWS} rows to learn from, found {rows.rows}"
        )
    if characters < MIN_CHARACTERS:
        raise InputError(
            f"{rows.path}: expected at least {MIN_CHARACTERS:,} characters of text to learn from, "
            f"found {characters:,}"
        )
    if base is None and not match.task.recipe:
        raise InputError(
            f"{rows.path}: {match.task.name} starts from a pretrained model: give it by --model"
        )


def _sequences_in_time(
    base: Base | None,
    scratch: dict[str, Any],
    lora: bool,
    length: int,
    machine: Hardware,
    minutes: float,
    objective: str,
) -> int:
    """Returns about how many sequences CPUs train on in some minutes."""
    parameters = base.parameters - base.embeddings if base else _parameters(scratch)
    # forward, backward to the activations, and to the weights, which LoRA leaves out
    flops = (4 if lora else 6) * parameters * length
    passes = EMBEDDED_TWICE if objective == "embed" else 1.0
    seconds = passes * flops / (machine.cores * CORE_FLOPS) + STEP_SECONDS / 8
    return int((minutes * 60 - START_SECONDS) / seconds)


def _learning_rate(base: Base | None, lora: bool, scratch: dict[str, Any]) -> float:
    if base is None:
        return float(scratch["optimizer"]["learning_rate"])
    if lora:
        return LORA_RATE
    return SMALL_ENCODER_RATE if base.family == "encoder" else FULL_RATE


def run_name(path: str) -> str:
    """Returns a run's name for data: the last part of its path, without its suffixes."""
    parts = storage.without_secrets(path).split("*")[0].rstrip("/").split("/")
    name = parts[-1].removesuffix(".gz").removesuffix(".zst")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.splitext(name)[0]).strip("-._")
    return name or "run"


def _objective(match: Match, base: Base | None) -> str:
    """Returns the objective of a task with a model of this architecture."""
    task, objective = match.task, match.task.objective
    if base is None:
        return objective
    if task.name == "pretrain":
        return {"decoder": "causal", "encoder": "masked", "encoder-decoder": "denoise"}[base.family]
    needed: dict[str, tuple[Family, ...]] = {
        "sft": ("decoder",),
        "dpo": ("decoder",),
        "seq2seq": ("encoder-decoder", "decoder"),
        "embed": ("encoder",),
        "classify": ("decoder", "encoder", "encoder-decoder"),
    }
    if base.family not in needed[objective]:
        raise InputError(
            f"{base.path}: {task.name} needs {' or '.join(needed[objective])}, found "
            f"{'an' if base.family[0] == 'e' else 'a'} {base.family}: give another --model, or "
            f"another --task ({', '.join(TASKS)})"
        )
    # a decoder writes summaries and translations as replies
    return "sft" if objective == "seq2seq" and base.family == "decoder" else objective


def _tokens_of_rows(rows: Rows, match: Match, base: Base | None) -> list[int]:
    """Returns the number of tokens of the rows of the sample, about."""
    per_byte = base.tokens_per_byte if base else 1 / BYTES_PER_TOKEN
    sizes = [len(text.encode()) for text in texts_of(rows, match)]
    frame = CHAT_FRAME_TOKENS if base is not None and base.is_chat else FRAME_TOKENS
    return [math.ceil(size * per_byte) + frame for size in sizes]


def _sequence_length(
    tokens: list[int], objective: str, base: Base | None, machine: Hardware
) -> tuple[int, float]:
    """Returns a length that 99% of the rows fit into, and the share of the rows that do not."""
    most = min(base.max_tokens if base else 2**20, 2048 if machine.gpus else 512)
    if objective in PRETRAINING:
        most = min(most, 1024 if machine.gpus else 256)
        return most, 0.0  # a longer document is divided over several sequences
    ordered = sorted(tokens)
    fits = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    length = min(most, 64 * math.ceil(fits / 64))
    return length, sum(n > length for n in tokens) / len(tokens)


def _global_batch(sequences: float, budget: int | None, workers: int) -> int:
    """Returns a power of two, 4 to 32, of which an epoch or the time has about 20 steps or more."""
    most = min(sequences, budget or sequences)
    batch = 2 ** max(2, min(5, math.floor(math.log2(max(1.0, most / 20)))))
    return max(batch, 2 ** math.ceil(math.log2(workers)))


def _held_out(rows: Rows, is_writer: bool) -> float:
    """Returns the share of the rows to hold out: a tenth, and no more than are soon measured.

    Args:
        rows: The rows.
        is_writer: Whether each of them is answered by a pretrained model on CPUs.
    """
    share = min(0.1, (32 if is_writer else 1_000) / rows.rows)
    if rows.rows < 200:
        share = max(share, 5 / rows.rows)
    return round(max(share, 0.001), 3)


def _split_column(rows: Rows) -> str | None:
    """Returns the column that says which part a row belongs to, if there is one."""
    known = {name for names in PARTS.values() for name in names}
    column = rows.columns.get("split")
    is_known = column is not None and {v.lower() for v in column.values} <= known
    return "split" if is_known and column is not None and column.filled == rows.rows else None


def _parameters(scratch: dict[str, Any]) -> int:
    """Returns about how many parameters of matrices the model of a shipped recipe has."""
    config = scratch["model"]["config"]
    width = config.get("hidden_size") or config.get("d_model") or 256
    layers = config.get("num_hidden_layers") or 2 * (config.get("num_layers") or 3)
    has_head = scratch.get("objective") not in ("classify", "embed")
    head = width * scratch["tokenizer"]["vocab_size"] if has_head else 0
    return int(12 * width * width * layers + head)
