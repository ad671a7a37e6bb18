"""How the value of another tool's setting is converted to settings of a recipe (synonyms.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

REFUSED = object()


class Answer(NamedTuple):
    """What to write instead of a setting of another tool.

    Attributes:
        settings: Values by `key.path`; empty if there is nothing to write.
        note: What the user should know besides; empty if nothing.
        is_same: Whether the settings do the same; else they are only the nearest that there is.
    """

    settings: dict[str, Any]
    note: str = ""
    is_same: bool = True


class Given:
    """What the recipe says elsewhere, from which some answers are computed."""

    def __init__(self, tree: Mapping[str, Any]):
        self._tree = tree

    def at(self, path: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Returns the value of a key of a recipe if it has this type, else the default."""
        node: Any = self._tree
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node if isinstance(node, kind) and not isinstance(node, bool) else default

    def named(self, *names: str) -> Any:
        """Returns the number that the recipe gives under one of the names, anywhere; else None."""
        values = (
            value
            for mapping in _mappings(self._tree)
            for name, value in mapping.items()
            if plain_name(name) in names and _is_number(value)
        )
        return next(values, None)

    @property
    def workers(self) -> int:
        """The number of workers that read different sequences."""
        count = self.at("cluster.num_workers", (int, list), 1)
        count = count[-1] if isinstance(count, list) and count else count
        tensor = self.at("parallel.tensor", int, 1)
        return max(1, count // max(1, tensor)) if isinstance(count, int) else 1

    @property
    def steps(self) -> int | None:
        """The number of steps of the run, if the recipe says it."""
        if (steps := self.at("train.steps", int) or self.named("max_steps")) and steps > 0:
            return int(steps)
        tokens = self.at("train.tokens", int)
        per_step = self.at("train.global_batch", int, 0) * self.at("data.sequence_length", int, 0)
        return math.ceil(tokens / per_step) if tokens and per_step > 0 else None


def _mappings(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
        for value in node.values():
            yield from _mappings(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain_name(name: object) -> str:
    """Returns a name in lower case, with underscores."""
    return str(name).strip("-").lower().replace("-", "_")


Rule = Callable[[Any, Given], Answer]


def same(path: str, note: str = "") -> Rule:
    """The setting has another name here."""
    return lambda value, given: Answer({path: value}, note)


def nothing(note: str, **settings: Any) -> Rule:
    """There is no such setting; `settings` (a double underscore is a dot) are the nearest."""
    return lambda value, given: Answer(
        {key.replace("__", "."): v for key, v in settings.items()}, note, is_same=False
    )


def choice(path: str, values: Mapping[str, Any], note: str) -> Rule:
    """The setting has other values here: a table, whose keys may be beginnings of the values."""

    def rule(value: Any, given: Given) -> Answer:
        text = str(value).lower()
        found = next((v for k, v in values.items() if text == k), REFUSED)
        if found is REFUSED:
            found = next((v for k, v in values.items() if k and text.startswith(k)), REFUSED)
        return Answer({}, f"{note}: see {path}") if found is REFUSED else Answer({path: found})

    return rule


def whole(path: str, note: str) -> Rule:
    """A whole number above 0; others need no setting, or have no counterpart."""

    def rule(value: Any, given: Given) -> Answer:
        if _is_number(value) and value > 0 and float(value).is_integer():
            return Answer({path: int(value)})
        return Answer({}, note)

    return rule


def every(path: str) -> Rule:
    """A number of steps; below 1 it is a fraction of all steps."""

    def rule(value: Any, given: Given) -> Answer:
        if _is_number(value) and 0 < value < 1:
            return _of_steps(path, value, given)
        return whole(path, f"remove it: {path} is a number of steps above 0")(value, given)

    return rule


def _of_steps(path: str, fraction: float, given: Given) -> Answer:
    if given.steps is None:
        return Answer({}, f"write {path}=N, where N is {fraction} times the number of steps")
    return Answer({path: math.ceil(round(fraction * given.steps, 6))})  # 0.07 of 100 is 7


def warmup(value: Any, given: Given) -> Answer:
    """A number of steps, or the fraction of all steps: steps."""
    if _is_number(value) and 0 < value < 1:
        return _of_steps("schedule.warmup_steps", value, given)
    if _is_number(value) and value >= 0 and float(value).is_integer():
        return Answer({"schedule.warmup_steps": int(value)})
    return Answer({}, "write schedule.warmup_steps=N, a number of steps")


PER_DEVICE = (
    "per_device_train_batch_size",
    "per_gpu_train_batch_size",
    "train_micro_batch_size_per_gpu",
    "micro_batch_size",
    "device_batch_size",
)
ACCUMULATION = ("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches")


def batches(value: Any, given: Given) -> Answer:
    """Batch size of a worker, and steps of accumulation: micro batch and global batch."""
    micro = given.named(*PER_DEVICE) or given.at("train.micro_batch", int)
    steps = given.named(*ACCUMULATION) or 1
    counts = (value, micro, steps)
    if not all(_is_number(n) and n >= 1 and float(n).is_integer() for n in counts):
        return Answer(
            {},
            "write train.micro_batch=N, the sequences per forward pass, and train.global_batch=M, "
            "those per step; gradients are accumulated as these numbers need it",
        )
    total = int(micro) * int(steps) * given.workers
    return Answer(
        {"train.global_batch": total, "train.micro_batch": int(micro)},
        f"{int(micro)} x {int(steps)} accumulated x {given.workers} worker"
        f"{'' if given.workers == 1 else 's'}",
    )


def dtype(value: Any, given: Given) -> Answer:
    """A name of a data type, or whether it is bfloat16."""
    if value in (False, "false", "no", "32", 32, "fp32", "float32"):
        return Answer({"train.dtype": "float32"})
    if "16" in str(value) and "bf" not in str(value):
        return float16(True, given)
    return Answer({"train.dtype": "bfloat16"})


def float16(value: Any, given: Given) -> Answer:
    """Whether to train in float16, which does not exist here."""
    if value is False:
        return Answer({}, "remove it: there is no float16")
    return Answer(
        {"train.dtype": "bfloat16"}, "there is no float16; nearest: bfloat16", is_same=False
    )


def recomputed(value: Any, given: Given) -> Answer:
    """Whether to recompute activations: all of them, or none."""
    kind = "none" if value in (False, None) else "full"
    return Answer(
        {"train.activation_checkpointing": kind}, "" if value is False else "or selective"
    )


def betas(value: Any, given: Given) -> Answer:
    """One of AdamW's two betas: both."""
    if not _is_number(value):
        return Answer({}, "write optimizer.betas=[FIRST, SECOND]")
    first = given.named("adam_beta1", "beta1")
    second = given.named("adam_beta2", "beta2")
    return Answer(
        {"optimizer.betas": [0.9 if first is None else first, 0.95 if second is None else second]}
    )


def min_ratio(value: Any, given: Given) -> Answer:
    """The lowest learning rate: as a fraction of the peak."""
    peak = given.named("lr", "learning_rate")
    if _is_number(value) and peak and 0 <= value <= peak:
        return Answer({"schedule.min_ratio": round(value / peak, 6)}, "a fraction of the peak")
    return Answer({}, "write schedule.min_ratio=F, a fraction of optimizer.learning_rate")


def target_modules(value: Any, given: Given) -> Answer:
    """Names of modules, in a list or separated by commas; or all of them."""
    if value in ("all", True, "all-linear"):
        return Answer({"adapter.target_modules": "all-linear"})
    if isinstance(value, str):
        return Answer({"adapter.target_modules": [v.strip() for v in value.split(",")]})
    return Answer({"adapter.target_modules": value})


def base(value: Any, given: Given) -> Answer:
    """The name of a model of the hub, or a folder."""
    note = "model.path is a folder, or hf://ORGANIZATION/NAME for a model of the hub"
    if isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
        return Answer({"model.path": f"hf://{value}"}, f"or model.path={value} if it is a folder")
    return Answer({"model.path": value} if isinstance(value, str) else {}, note)


def sources(path: str) -> Rule:
    """Files or data sets: a name, a list of names, or axolotl's list of mappings with `path`."""

    def rule(value: Any, given: Given) -> Answer:
        entries = value if isinstance(value, list) else [value]
        paths = [e.get("path") if isinstance(e, Mapping) else e for e in entries]
        if not paths or not all(isinstance(p, str) and p for p in paths):
            return Answer({}, f"write {path}=[{{path: FILE_OR_FOLDER}}]")
        is_path = any("/" in str(p) or "." in str(p) for p in paths)
        note = "" if is_path else "a file, folder, glob or URL: data sets have no names here"
        return Answer({path: [{"path": p} for p in paths]}, note)

    return rule


def held_out(value: Any, given: Given) -> Answer:
    """The fraction of the documents to validate on."""
    note = "write data.held_out=F, a fraction of the documents of at most 0.5"
    if _is_number(value) and 1 < value <= 50 and float(value).is_integer():
        return Answer({}, f"{note}; {value}% is {value / 100}")
    if _is_number(value) and 0 <= value <= 0.5:
        return Answer({"data.held_out": value})
    return Answer({}, note)


def packing(value: Any, given: Given) -> Answer:
    """Whether to pack sequences, which is always done."""
    if value in (False, None):
        return Answer(
            {}, "remove it: sequences are always packed, and no document sees another one"
        )
    return Answer({"data.packing": "best_fit"}, "no document sees another one")


def run_name(value: Any, given: Given) -> Answer:
    """The name of a run, with the characters that are allowed here."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)[:200]).strip("-._")
    return Answer({"name": name} if name else {}, "" if name else "write name=NAME")


def tuning(value: Any, given: Given) -> Answer:
    """Whether to train an adapter."""
    if str(value).lower() == "qlora":
        return Answer({"adapter.rank": 8}, "LoRA; weights are not quantized for training")
    if str(value).lower() in ("lora", "dora"):
        return Answer({"adapter.rank": 8}, "LoRA is on if the recipe has a section adapter")
    return Answer({}, "remove it: all weights are trained unless there is a section adapter")


def best_metric(value: Any, given: Given) -> Answer:
    """The name of a metric, which has another prefix here."""
    name = str(value).removeprefix("eval_").removeprefix("validation/")
    return Answer({"validation.metric": f"validation/{name}"})


def mode(value: Any, given: Given) -> Answer:
    """Whether a greater value of the metric is better."""
    return Answer({"validation.mode": "max" if value in (True, "true") else "min"})


def gpus(value: Any, given: Given) -> Answer:
    """A number of GPUs is a number of workers with one each."""
    if _is_number(value) and value >= 1 and float(value).is_integer():
        return Answer({"cluster.num_workers": int(value), "cluster.gpus_per_worker": 1})
    return Answer({}, "write cluster.num_workers=N and cluster.gpus_per_worker=1")
