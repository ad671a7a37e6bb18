"""EleutherAI's harness (lm-eval) on a task of your own: `pip install 'sevenfold[harness]'`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sevenfold.errors import InputError

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def harness(model_folder: str | Path, task_file: str | Path, limit: int | None = None, batch_size: int = 8) -> dict[str, Any]:
    """Evaluates a Hugging Face directory on the task that a YAML file of lm-eval's describes.

    lm-eval runs in a process of its own, which reads nothing from a network and leaves this one's seeds as they are. Paths in
    the task file (`dataset_kwargs: {data_files: {test: rows.jsonl}}`) are relative to it.

    Args:
        limit: of the task's examples, the first so many; a figure of a part is none to report.

    Returns:
        results: figures by task, as lm-eval names them ("acc,none", "acc_stderr,none"); samples: how many examples there are
        and how many counted, by task; version: of lm-eval.

    Raises:
        InputError: lm-eval is not installed, no such folder or file, or lm-eval could not read or do the task.
    """
    model, task = Path(model_folder).resolve(), require(task_file)
    if not (model / "config.json").is_file():
        raise InputError(f"{model}: expected a Hugging Face directory, found no config.json there")
    with tempfile.TemporaryDirectory() as made:
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", json.dumps({"pretrained": str(model)}),
            "--tasks", str(task), "--batch_size", str(batch_size), "--output_path", f"{made}/out.json",
            *(["--limit", str(limit)] if limit is not None else []),
        ]  # fmt: skip
        env = {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": f"{made}/cache"}
        done = subprocess.run(command, cwd=task.parent, env=env, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{task}: lm-eval could not evaluate {model} on it: {_error(done.stderr)}")
        found = json.loads(next(Path(made).glob("out*.json")).read_text())
    return {"results": found["results"], "samples": found["n-samples"], "version": found["lm_eval_version"]}


def require(task_file: str | Path) -> Path:
    """The task's file, with its whole path. Raises InputError where there is none, or lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError("the harness needs lm-eval, which is not installed: pip install 'sevenfold[harness]'")
    task = Path(task_file).resolve()
    if not task.is_file():
        raise InputError(f"{task}: expected a task's YAML file of lm-eval, found none")
    return task


def _error(trace: str) -> str:
    """What a traceback ends with."""
    lines = trace.strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith("  File ")]
    said = [line.strip() for line in lines[frames[-1] + 1 if frames else 0 :] if not line.startswith("    ")]
    return " ".join(said[-4:])
