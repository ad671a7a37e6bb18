"""A checkout of the project, as a user submits jobs from."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT


def write_checkout(folder: Path, tree: dict[str, Any], texts: Path) -> None:
    """Writes a checkout with the recipes `tiny` and `sft` (also a sweep), of jobs for a small Ray.

    Args:
        folder: The new folder.
        tree: The recipe `tiny`; its section `cluster` is replaced.
        texts: The folder of the fixture `texts`.
    """
    for part in ("platform", "jobs"):
        shutil.copytree(ROOT / part, folder / part)
    cluster = {"cpus_per_worker": 0.75}
    pairs = [{"path": str(texts / "pairs")}]
    sft = {
        "name": "sft",
        "objective": "sft",
        "model": {"path": "runs/tiny"},
        "adapter": {"rank": 2},
        "data": {
            "sources": pairs,
            "validation": pairs,
            "sequence_length": 64,
            "lanes": 2,
            "executor": "inline",
        },
        "train": {"global_batch": 4, "micro_batch": 4, "steps": 2},
        "cluster": cluster,
        "validation": {"every": 1, "rows": 8},
        "sweep": {
            "trials": 2,
            "scheduler": "none",
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        },
    }
    for name, recipe in (("tiny", tree | {"cluster": cluster}), ("sft", sft)):
        (folder / f"jobs/recipes/{name}.yaml").write_text(yaml.safe_dump(recipe))
