"""Writes a recipe with a comment at each choice."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sevenfold.init.rows import Rows
from sevenfold.init.settings import Base, Settings
from sevenfold.init.tasks import Match
from sevenfold.recipe import PRETRAINING, shipped

_COMMENT_COLUMN = 44
SMALL_BYTES = 200e6


def recipe_text(rows: Rows, path: str, match: Match, settings: Settings, base: Base | None) -> str:
    """Returns the recipe as YAML of 15 to 30 lines.

    Args:
        rows: The rows that it trains on.
        path: Their path, as the recipe is to have it.
        match: The task and its columns.
        settings: The numbers.
        base: The model to start from, None for a new one.
    """
    s = settings
    lines = [
        f"# Learns {match.task.learns} from {rows.rows:,}{'' if rows.is_complete else ' and more'} "
        f"rows. Written by `sevenfold init`.",
        "# Every key and its default: `sevenfold explain`.",
        f"name: {s.name}",
        "seed: 7",
        f"objective: {s.objective}",
        "data:",
        f"  sources: [{_flow(_source(rows, path, match, s, base))}]",
        *_division(s, rows),
        _copies(rows),
        _line(f"  sequence_length: {s.sequence_length}", _length_comment(s)),
        _line(f"  epochs: {s.epochs}", _epochs_comment(s)) if not s.is_shortened else "",
        *(_small(s) if rows.survey["bytes"] < SMALL_BYTES else []),
        *_model(s, base),
        *_training(s),
        _line(
            "cluster: {num_workers: auto, gpus_per_worker: auto}",
            "all GPUs that there are, else one worker on CPUs",
        ),
    ]
    return shipped.schema_line() + "\n".join(line for line in lines if line) + "\n"


def _source(rows: Rows, path: str, match: Match, s: Settings, base: Base | None) -> dict[str, Any]:
    source: dict[str, Any] = {"path": path}
    columns = match.columns
    is_by_decoder = match.task.objective == "seq2seq" and s.objective == "sft"
    if is_by_decoder:
        columns = {"prompt": columns["source"], "completion": columns["target"]}
    is_pair = is_by_decoder or match.shape == "pair"
    is_text = not any(rows.columns[column].lists for column in columns.values())
    is_chat = s.objective == "sft" and base is not None and base.is_chat
    if is_chat and is_pair and is_text:
        # a chat model is asked in its chat template, as `sevenfold chat` does; a pair has none
        turns = {"instruction": columns["prompt"], "output": columns["completion"]}
        return source | {"shape": "alpaca", "columns": turns}
    if is_by_decoder:
        return source | {"shape": "pair", "columns": columns}
    if match.is_usual:
        return source
    if match.shape is None:
        return source | {"text": columns["text"]}
    return source | {"shape": match.shape, "columns": columns}


def _division(s: Settings, rows: Rows) -> list[str]:
    held_out = _line(
        f"  held_out: {s.held_out}",
        f"about {s.held_out * rows.rows:,.0f} rows, chosen by a hash of their text",
    )
    if s.split_column is None:
        return [held_out]
    return [
        _line(f"  split_column: {s.split_column}", "rows of train, validation and test"),
        held_out,
    ]


def _copies(rows: Rows) -> str:
    """Returns the setting for a folder of texts, of which some are copies of others."""
    copies = rows.survey["exact_duplicates"]["texts"]
    if rows.formats["txt"] < 2 or not copies:
        return ""
    return _line("  on_bad_document: skip", f"{copies:,} files are copies of others: left out")


def _length_comment(s: Settings) -> str:
    if s.objective in PRETRAINING:
        return "tokens; longer documents are divided"
    return (
        f"tokens; {s.cut:.1%} of the rows are longer and are cut"
        if s.cut
        else "tokens; all rows fit"
    )


def _epochs_comment(s: Settings) -> str:
    return f"about {s.steps:,} steps{_minutes(s)}"


def _minutes(s: Settings) -> str:
    return "" if s.minutes is None else f", {max(1, round(s.minutes))} min on this machine's CPUs"


def _model(s: Settings, base: Base | None) -> list[str]:
    if base is not None:
        model = [
            _line(
                f"model: {_flow({'path': base.path})}", f"{base.parameters / 1e6:,.0f}M parameters"
            )
        ]
        adapter = "adapter: {rank: 16, alpha: 32}"
        return [
            *model,
            _line(adapter, "LoRA; without it, all weights are trained") if s.lora else "",
        ]
    return [
        f"tokenizer: {_flow(s.scratch['tokenizer'])} # a new one, trained on the data",
        "model: # a new one; --model starts from a pretrained one, which needs less data",
        f"  config: {_flow(s.scratch['model']['config'])}",
    ]


def _training(s: Settings) -> list[str]:
    train: dict[str, Any] = {"global_batch": s.global_batch, "micro_batch": "auto", "dtype": "auto"}
    if s.is_shortened:
        train["steps"] = s.steps
    optimizer = dict(s.scratch.get("optimizer", {})) or {"learning_rate": s.learning_rate}
    schedule = {"name": "cosine", "warmup_steps": max(1, s.steps // 20)}
    validation: dict[str, Any] = {
        "every": max(1, s.steps // 3),
        "rows": s.validation_rows,
        "keep_best": True,
    }
    if s.objective == "classify":
        validation["metric"] = "validation/f1_macro"
    if s.objective in ("sft", "seq2seq"):
        longest = max(16, min(128, s.sequence_length // 4))
        validation["max_new_tokens"] = longest
    longer = f"for {s.epochs} epochs replace train.steps by data.epochs: {s.epochs}"
    return [
        *([f"# {_minutes(s).lstrip(', ')}; {longer}"] if s.is_shortened else []),
        f"train: {_flow(train)}",
        f"optimizer: {_flow(optimizer)}",
        f"schedule: {_flow(schedule)}",
        f"validation: {_flow(validation)}",
        f"checkpoint: {{every: {max(10, math.ceil(s.steps / 4))}}}",
    ]


def _line(text: str, comment: str) -> str:
    return f"{text:<{_COMMENT_COLUMN}} # {comment}"


def _flow(value: Any) -> str:
    """Returns a value in YAML's flow style, on one line; strings are quoted where they need it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z/][\w./-]*", value, re.ASCII)
        reserved = value.lower() in (
            "true",
            "false",
            "null",
            "yes",
            "no",
            "on",
            "off",
            "nan",
            "y",
            "n",
        )
        return value if plain and not reserved else _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    """Returns a string in YAML's double quotes, with line separators and the like escaped."""
    characters = (
        f"\\{c}" if c in '"\\' else c if c.isprintable() else f"\\U{ord(c):08x}" for c in text
    )
    return f'"{"".join(characters)}"'


def _small(s: Settings) -> list[str]:
    """Returns the settings for data of less than SMALL_BYTES."""
    lanes = min(s.global_batch, max(4, 2 ** math.ceil(math.log2(s.workers))))
    return [
        _line(f"  lanes: {lanes}", "small data: few parallel streams, with less padding"),
        _line("  executor: inline", "small data: encoded by the workers themselves"),
    ]
