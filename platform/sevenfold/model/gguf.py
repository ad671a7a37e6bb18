"""Models in GGUF files, which transformers' own reader unpacks to a Hugging Face directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import filelock
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sevenfold import storage
from sevenfold.errors import InputError, first_line
from sevenfold.model import hub_kernels  # noqa: F401 (refuses them)

SUFFIX = ".gguf"


def unpacked(path: str) -> str:
    """Returns a local Hugging Face directory with the model of a GGUF file.

    It is written to the temporary folder, once per machine, and again if the file has changed.

    Args:
        path: The file's path or URL.

    Raises:
        InputError: See `unpack`.
    """
    key = f"{path}\0{storage.size(path)}\0{os.path.getmtime(path) if os.path.exists(path) else ''}"
    name = f"gguf-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    folder = os.path.join(storage.user_temporary_folder(), name)
    with filelock.FileLock(f"{folder}.lock"):
        if not os.path.isdir(folder):
            unpack(path, folder)
    return folder


def unpack(path: str, folder: str) -> None:
    """Writes the model of a GGUF file as a Hugging Face directory: float32 weights and tokenizer.

    Args:
        path: The file's path or URL.
        folder: A new or empty folder.

    Raises:
        InputError: transformers cannot read the file or its architecture.
    """
    with storage.new_folder(folder) as new, tempfile.TemporaryDirectory() as scratch:
        file = Path(path)
        if storage.is_url(path):
            file = Path(scratch) / "model.gguf"
            with storage.open_read(path) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, 4 << 20)
        where: dict[str, Any] = {
            "pretrained_model_name_or_path": str(file.parent),
            "gguf_file": file.name,
            "local_files_only": True,
        }
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            config = AutoConfig.from_pretrained(**where)
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        except ImportError:
            raise InputError(
                f"{path}: reading GGUF files needs the package gguf: pip install 'sevenfold[gguf]'"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, struct.error) as e:
            raise InputError(
                f"{path}: expected a GGUF file of an architecture that transformers reads: "
                f"{first_line(e)}"
            ) from None
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # a new model: the one that was read calls itself quantized, and would not be saved
        model: Any = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
