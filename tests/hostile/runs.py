"""Runs whose files run code when they are unpickled, imported or rendered."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sevenfold import storage
from sevenfold.engine.checkpoint import MANIFEST, tree_digest


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (self.trace,)


def python(trace: str) -> str:
    return f"import os\nos.mkdir({trace!r})\n"


def torch_file(trace: str) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": Bomb(trace)}, stream)
    return stream.getvalue()


def numpy_file(trace: str) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def json_code(trace: str) -> bytes:
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {name: f"evil.{name}" for name in names}
    return json.dumps(
        {
            "model_type": "evil",
            "tokenizer_class": "EvilTokenizer",
            "auto_map": auto_map,
            "py/object": "evil.Evil",
            "py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [trace]}],
            "trust_remote_code": True,
        }
    ).encode()


# What takes the place of a file, by its form.
FORMS: dict[str, Callable[[str], bytes]] = {
    "pickle": lambda trace: pickle.dumps(Bomb(trace)),
    "torch": torch_file,
    "numpy": numpy_file,
    "python": lambda trace: python(trace).encode(),
    "yaml": lambda trace: f'name: !!python/object/apply:os.mkdir ["{trace}"]\n'.encode(),
    "json": json_code,
    "template": lambda trace: (
        f"{{{{ cycler.__init__.__globals__.os.mkdir('{trace}') }}}}"
        "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ).encode(),
}
# Files that Python, torch or transformers would load if they lay beside the others.
PLANTED = {
    "evil.py": "python",
    "sitecustomize.py": "python",
    "pytorch_model.bin": "torch",
    "model.pt": "torch",
    "optimizer.pt": "torch",
    "training_args.bin": "torch",
    "scheduler.pkl": "pickle",
    "vocab.pkl": "pickle",
    "__init__.py": "python",
}


def sum_again(run: Path) -> None:
    """Writes the sums of a run's checkpoints and of its model as they are now."""
    for manifest in run.rglob(MANIFEST):
        try:
            tree = json.loads(manifest.read_text())
            tree.pop("sha256")
            for name in tree["files"]:
                tree["files"][name] = storage.file_digest(str(manifest.parent / name))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the manifest itself was replaced
        manifest.write_text(json.dumps({**tree, "sha256": tree_digest(tree)}))
    for checksums in run.rglob("checksums.json"):
        checksums.unlink()


def attack(run: Path, file: str, form: str, trace: str) -> None:
    """Replaces a file of a run, and plants files of code beside it."""
    for folder in {run, run / "model", run / "tokenizer", (run / file).parent}:
        for name, planted in PLANTED.items():
            if folder.is_dir():
                (folder / name).write_bytes(FORMS[planted](trace))
    if file:
        (run / file).unlink()  # not its hard links
        (run / file).write_bytes(FORMS[form](trace))
    sum_again(run)


CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

os.makedirs({trace!r}, exist_ok=True)

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write_run_with_code(finished: Path, home: Path) -> None:
    """Writes a run `old`, a base and recipes into a folder; the models have code of their own.

    The code makes the folder `trace`. The recipe of the run, and `other.yaml`, say that it may run;
    `recipe.yaml` does not.

    Args:
        finished: A home with the finished run runs/old.
        home: The folder.
    """
    run, base = home / "runs/old", home / "base"
    shutil.copytree(finished / "runs/old", run)
    for name in ("texts.jsonl", "heldout.jsonl"):
        shutil.copy(finished / name, home)
    (run / "model/checksums.json").unlink()
    config = json.loads((run / "model/config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (run / "model/config.json").write_text(json.dumps(config))
    (run / "model/own.py").write_text(CODE.format(trace=str(home / "trace")))
    shutil.copytree(run / "model", base)
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["model"] = {"path": str(base), "trust_remote_code": True}
    tree["tokenizer"] = {}
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (home / "other.yaml").write_text(yaml.safe_dump(tree | {"name": "other"}))
    del tree["model"]["trust_remote_code"]
    (home / "recipe.yaml").write_text(yaml.safe_dump(tree | {"name": "new"}))
