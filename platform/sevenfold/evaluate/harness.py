"""Evaluation on a custom task with lm-eval, EleutherAI's evaluation harness.

lm-eval is an optional dependency: `pip install 'sevenfold[harness]'`.
"""

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


def harness(
    model_folder: str | Path, task_file: str | Path, limit: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Evaluates a Hugging Face directory on the task that an lm-eval YAML file describes.

    lm-eval runs in its own process without network access, so the random state of this process does
    not change. Paths in the task file (`dataset_kwargs: {data_files: {test: rows.jsonl}}`) are
    relative to that file.

    Args:
        model_folder: The Hugging Face directory.
        task_file: The task's YAML file.
        limit: Evaluates only the first examples of the task, this number of them. Scores of a part
            of a task should not be reported.
        batch_size: Examples per forward pass.

    Returns:
        `results`: scores by task, with lm-eval's names ("acc,none", "acc_stderr,none").
        `samples`: by task, the number of examples and how many of them were used.
        `version`: lm-eval's version.

    Raises:
        InputError: lm-eval is not installed, the folder or the file does not exist, or lm-eval
            failed.
    """
    model, task = Path(model_folder).resolve(), require_task(task_file)
    if not (model / "config.json").is_file():
        raise InputError(f"{model}: expected a Hugging Face directory, found no config.json there")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-P",  # not from the current folder
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            json.dumps({"pretrained": str(model)}),
            "--tasks",
            str(task),
            "--batch_size",
            str(batch_size),
            "--output_path",
            f"{folder}/out.json",
            *(["--limit", str(limit)] if limit is not None else []),
        ]
        env = {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": f"{folder}/cache"}
        process = subprocess.run(command, cwd=task.parent, env=env, capture_output=True, text=True)
        if process.returncode:
            raise InputError(
                f"{task}: lm-eval could not evaluate {model} on it: {_error(process.stderr)}"
            )
        # lm-eval adds the time to the name of the file.
        output = json.loads(next(Path(folder).glob("out*.json")).read_text())
    return {
        "results": output["results"],
        "samples": output["n-samples"],
        "version": output["lm_eval_version"],
    }


def require_task(task_file: str | Path) -> Path:
    """Checks that lm-eval is installed and the task's file exists; returns its absolute path.

    Raises:
        InputError: lm-eval is not installed, or there is no such file.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "evaluating on a task needs lm-eval, which is not installed: "
            "pip install 'sevenfold[harness]'"
        )
    task = Path(task_file).resolve()
    if not task.is_file():
        raise InputError(f"{task}: expected an lm-eval task (a YAML file), found no file")
    return task


def _error(trace: str) -> str:
    """Returns the exception at the end of a traceback as one line; at most its last four lines."""
    lines = trace.strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith("  File ")]
    after_last_frame = lines[frames[-1] + 1 if frames else 0 :]
    # Lines indented by four spaces are source code.
    message = [line.strip() for line in after_last_frame if not line.startswith("    ")]
    return " ".join(message[-4:])
