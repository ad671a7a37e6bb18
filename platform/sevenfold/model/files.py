"""Checks of the files of a Hugging Face directory before transformers reads them.

A directory may come from anywhere. What its files name must be inside it, and nothing in it may
make transformers fetch or import code of others.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sevenfold import storage
from sevenfold.data.named_files import check_file_lists, check_named_files
from sevenfold.errors import InputError, first_line

# How transformers itself computes attention and experts. Other names are those of repositories of
# the hub, whose code it would download and run.
_IMPLEMENTATIONS = (
    *("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
    *("flash_attention_4", "grouped_mm", "batched_mm"),
)
_IMPLEMENTATION_FIELDS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_KERNEL_FIELDS = re.compile(r"use_kernels|kernel_config|allow_all_kernels")
# Weights that transformers converts by itself. The other methods import packages that sevenfold
# does not depend on, and some of them run code of the hub.
_QUANTIZATIONS = ("mxfp4", "fp8")
_CLASS = re.compile(r"[\w-]+(\.\w+)+")


def check_files(folder: str, weights: bool) -> None:
    """Checks the files of a Hugging Face directory.

    transformers would ignore some that are damaged, and name no file for others.

    Args:
        folder: The directory.
        weights: Whether to read the headers of the weights files too.

    Raises:
        InputError: A file is damaged, names something outside the directory, or would make
            transformers run code of others.
    """
    for path in sorted(Path(folder).iterdir()):
        # links are followed, since the hub's cache consists of them
        if path.exists() and not (path.is_dir() or stat.S_ISREG(path.stat().st_mode)):
            storage.open_read(str(path))  # raises, where transformers would wait for ever
    check_named_files(folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = Path(folder, name)
        if os.path.lexists(path):
            tree = storage.read_json(str(path), storage.json_object)
            check_file_lists(str(path), tree)
            _check_code(str(path), tree, "")
    for path in sorted(Path(folder).glob("*.index.json")):
        names = storage.read_json(str(path), _weight_files)
        for name in names:
            storage.plain_name(name, f"{path}: weight_map")
    if os.path.lexists(os.path.join(folder, "adapter_config.json")):
        raise InputError(
            f"{folder}/adapter_config.json: expected a model without an adapter, which may name "
            "other models: merge it into the weights, or remove this file"
        )
    for weights_file in sorted(Path(folder).glob("*.safetensors")) if weights else []:
        try:
            with safe_open(weights_file, "pt"):
                pass
        except (SafetensorError, OSError) as e:
            raise InputError(
                f"{weights_file}: damaged: not valid safetensors ({first_line(e)}); "
                f"{storage.DAMAGED_HINT}"
            ) from None


def _weight_files(tree: Any) -> list[str]:
    """Returns the files that the index of sharded weights names."""
    return sorted({str(name) for name in storage.json_object(tree)["weight_map"].values()})


def _check_code(path: str, tree: Any, key: str) -> None:
    """Raises InputError if a config, or a part of it, would make transformers run code of others.

    Args:
        path: The file.
        tree: The config or the part.
        key: The key of the part, with those around it.
    """
    if isinstance(tree, list):
        for i, value in enumerate(tree):
            _check_code(path, value, f"{key}[{i}]")
    for name, value in tree.items() if isinstance(tree, dict) else ():
        where = f"{path}: {key}{name}"
        if name == "transformers_weights" and value is not None:
            storage.plain_name(value, where)
        elif name == "auto_map" and value is not None:
            for reference in _strings(value):
                if not _CLASS.fullmatch(reference):
                    raise InputError(
                        f"{where}: expected classes in files of this directory, as MODULE.CLASS, "
                        f"found {reference[:100]!r}: copy the code into the directory"
                    )
        elif _IMPLEMENTATION_FIELDS.fullmatch(name) and value is not None:
            for choice in _strings(value):
                if choice.removeprefix("paged|") not in _IMPLEMENTATIONS:
                    raise InputError(
                        f"{where}: expected one of {', '.join(_IMPLEMENTATIONS)}, found "
                        f"{choice[:100]!r}: kernels of the hub are code of others, which is not "
                        "run: remove the field"
                    )
        elif _KERNEL_FIELDS.fullmatch(name) and value:
            raise InputError(
                f"{where}: kernels of the hub are code of others, which is not run: remove the "
                "field"
            )
        elif name in ("quantization_config", "compression_config") and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else value
            if method not in _QUANTIZATIONS:
                raise InputError(
                    f"{where}: expected weights that are not quantized, or by one of "
                    f"{', '.join(_QUANTIZATIONS)}, found {str(method)[:100]!r}: choose the model "
                    "before quantization"
                )
        elif isinstance(value, dict | list):
            _check_code(path, value, f"{key}{name}.")


def _strings(tree: Any) -> list[str]:
    """Returns the values in a tree of dicts and lists, as strings, without those that are None."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [s for value in tree for s in _strings(value)]
    return [] if tree is None else [str(tree)]
