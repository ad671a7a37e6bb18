"""Changes of a model directory that name something outside it, or make others' code run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

OUTSIDE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../x.json",
    "..",
    ".",
    "",
    "a//b",
    "a\\b",
    "a\0b",
    "a\nb",
    7,
    None,
    ["x"],
    "x" * 300,
]
KERNELS = ["kernels-community/flash-attn", "org/repo", "org/repo@main:fn", "org/repo:fn", "eagre"]


class Case(NamedTuple):
    """A change of a model directory.

    Attributes:
        name: What is changed.
        change: Makes the change.
        says: Parts of the error, beside the names of the file and the field.
    """

    name: str
    change: Callable[[Path], None]
    says: tuple[str, ...]


def set_field(file: str, path: str, value: Any) -> Callable[[Path], None]:
    """Returns a function that sets a field of a JSON file of a directory; dots separate keys."""

    def change(folder: Path) -> None:
        target = folder / file
        tree = json.loads(target.read_text()) if target.exists() else {}
        keys = path.split(".")
        inner = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
        target.write_text(json.dumps(tree))

    return change


def outside_names() -> Iterator[Case]:
    """Yields a case for each field that names files, and each name that is none inside."""
    fields = {
        "model.safetensors.index.json": "weight_map.lm_head",
        "checksums.json": None,
        "tokenizer.json": "fast_tokenizer_files",
        "config.json": "configuration_files",
        "special_tokens_map.json": "merges_file",
    }
    for file, field in fields.items():
        for value in OUTSIDE:
            if file == "checksums.json":
                content = {str(value): {"bytes": 1, "sha256": "0"}}
                change = set_field(file, "files", content)
            elif field == "merges_file":
                if value is None:
                    continue
                change = set_field(file, field, value)
            elif file == "model.safetensors.index.json":
                change = set_field(file, str(field), value)
                if value in (7, None, ["x"]):  # a name, though a strange one
                    continue
            else:
                change = set_field(file, str(field), ["tokenizer.1.0.0.json", value])
            if file == "checksums.json" and value in (7, None, ["x"]):
                continue
            yield Case(f"{file} {str(value)[:20]!r}", change, (file, "inside the folder"))
    yield Case(
        "config.json transformers_weights",
        set_field("config.json", "transformers_weights", "../other/model.safetensors"),
        ("config.json: transformers_weights", "'../other/model.safetensors'"),
    )


def code_of_others() -> Iterator[Case]:
    """Yields a case for each field that makes transformers fetch or import code."""
    for field in (
        *("_attn_implementation", "attn_implementation", "experts_implementation"),
        *("_experts_implementation", "_attn_implementation_internal"),
        *("text_config.attn_implementation", "attn_implementation.text_config"),
        *("per_layer_config.0._attn_implementation",),
    ):
        for kernel in KERNELS:
            yield Case(
                f"{field}={kernel}",
                set_field("config.json", field, kernel),
                ("config.json: ", "kernels of the hub", repr(kernel)),
            )
    for field in ("use_kernels", "kernel_config", "allow_all_kernels"):
        yield Case(
            field,
            set_field("config.json", field, {"RMSNorm": "org/repo:RMSNorm"}),
            (f"config.json: {field}", "kernels of the hub"),
        )
    methods: list[Any] = ["gptq", "awq", "bitsandbytes", "torchao", "quark", "eetq", "x", None, 1]
    for method in methods:
        yield Case(
            f"quantization {method}",
            set_field("config.json", "quantization_config", {"quant_method": method}),
            ("config.json: quantization_config", "not quantized", repr(str(method))),
        )
    for file in ("config.json", "tokenizer_config.json"):
        for reference in ("org/repo--module.Class", "../module.Class", "/tmp/module.Class", "C"):
            yield Case(
                f"{file} auto_map {reference}",
                set_field(file, "auto_map", {"AutoConfig": [None, reference]}),
                (f"{file}: auto_map", "in files of this directory", repr(reference)),
            )
    yield Case(
        "adapter_config.json",
        set_field("adapter_config.json", "base_model_name_or_path", "org/repo"),
        ("adapter_config.json", "expected a model without an adapter"),
    )


def make_fifo(folder: Path) -> None:
    os.remove(folder / "tokenizer_config.json")
    os.mkfifo(folder / "tokenizer_config.json")


def link_to_device(folder: Path) -> None:
    os.remove(folder / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to("/dev/zero")


def special_files() -> Iterator[Case]:
    """Yields a case for each kind of file that is not to be opened."""
    yield Case("FIFO", make_fifo, ("tokenizer_config.json", "a named pipe (FIFO)"))
    yield Case("device", link_to_device, ("tokenizer.json", "a device"))


def cases() -> list[Case]:
    """Returns all cases."""
    return [*outside_names(), *code_of_others(), *special_files()]


def command(folder: Path) -> list[str]:
    """Returns the command line that reads a model directory."""
    return ["generate", str(folder), "--prompt", "the quick", "--max-new-tokens", "1"]
