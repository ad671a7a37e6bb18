"""Compares remedies against overfitting, on a small decoder and a few files of Python's library.

    python benchmarks/overfitting.py [--quick] [--json FILE] [--picture FILE]

Each case is a run of `jobs/pretrain.py` that differs in one setting. The first one has no remedy:
it memorizes its text, and its validation loss rises. The figures come from metrics.jsonl and
summary.json. The picture (default: beside the JSON file) shows both losses over the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import measure
import yaml

ROOT = Path(__file__).resolve().parents[1]
ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT / "platform"),
}
PLAIN = "nothing"
REMEDIES = {  # the settings of each remedy against overfitting
    "early stopping": {"validation.patience": 2},
    "L2": {"optimizer.weight_decay": 3.0},
    "L1": {"optimizer.l1": 0.2},
    "dropout": {"train.dropout": 0.3},
    "label smoothing": {"train.label_smoothing": 0.4},
}
TURNED = 1.02  # a run overfits if its last validation loss is above this multiple of the best one


class Curve(NamedTuple):
    """The results of a run.

    Attributes:
        train: The training loss by step.
        held: The validation loss by step.
        chosen: The step whose model was saved as the final one.
        sparsity: The fraction of weights that are zero.
    """

    train: dict[int, float]
    held: dict[int, float]
    chosen: int
    sparsity: float

    @property
    def best(self) -> float:
        return min(self.held.values())

    @property
    def last(self) -> float:
        """The validation loss of the final model."""
        return self.held[self.chosen]


def recipe_of(steps: int) -> dict[str, Any]:
    return {
        "name": PLAIN,
        "seed": 2,
        "data": {
            "sources": [{"path": "train.jsonl"}],
            "validation": [{"path": "held.jsonl"}],
            "sequence_length": 128,
            "lanes": 2,
            "executor": "inline",
        },
        "tokenizer": {"vocab_size": 1024},
        "model": {
            "config": {
                "model_type": "gpt2",
                "n_embd": 128,
                "n_layer": 2,
                "n_head": 4,
                "initializer_range": 0.08,
            }
        },
        "train": {
            "global_batch": 8,
            "micro_batch": 8,
            "steps": steps,
            "log_every": 5,
            "dropout": 0.0,
        },
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 10},
        "validation": {"every": 10, "rows": 64},
    }


def write_texts(folder: Path) -> None:
    """Writes the beginnings of modules of the standard library, 40 kB of them to train on.

    Others are for validation. The first 70 are left out, because the strengths of the remedies were
    chosen on them.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [p.read_text(encoding="utf-8")[:2500] for p in sorted(stdlib.glob("*.py"))]
    texts = [t for t in texts if len(t) == 2500]
    random.Random(0).shuffle(texts)  # noqa: S311 (an order, no secret)
    for name, part in (("train", texts[70:86]), ("held", texts[86:126])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))


def trained(folder: Path, name: str, changes: dict[str, Any]) -> Curve:
    """Runs `jobs/pretrain.py` with changes to the recipe, and returns the results."""
    run = folder / "runs" / name.replace(" ", "-")
    overrides = [f"name={run.name}", *(f"{key}={value}" for key, value in changes.items())]
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "recipe.yaml", *overrides]
    subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **ENV, "SEVENFOLD_HOME": str(folder)},
        stdout=sys.stderr,
        check=True,
    )
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train, held, zeros = (
        {m["step"]: m[key] for m in logged if key in m}
        for key in ("train/loss", "validation/loss", "train/sparsity")
    )
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    chosen = metrics.get("best_step", metrics["step"])
    assert held[chosen] == metrics["validation/loss"]
    return Curve(train, held, chosen, list(zeros.values())[-1] if zeros else 0.0)


def draw(curves: dict[str, Curve], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for i, (name, c) in enumerate(curves.items()):
        width, color = (2.5, "black") if name == PLAIN else (1.5, f"C{i - 1}")
        axes.plot(list(c.held), list(c.held.values()), color=color, linewidth=width, label=name)
        axes.plot(
            list(c.train), list(c.train.values()), color=color, linewidth=width / 2, linestyle=":"
        )
        axes.plot([c.chosen], [c.last], "o", color=color)
    axes.set(
        xlabel="step",
        ylabel="loss, nats per token",
        title="Validation (lines) and training (dotted); dots: the final model",
    )
    axes.legend(title="against overfitting")
    axes.grid(alpha=0.3)
    figure.savefig(to, dpi=120)


def show(curves: dict[str, Curve]) -> None:
    rows = []
    for name, c in curves.items():
        label = " ".join([name, *(f"({value:g})" for value in REMEDIES.get(name, {}).values())])
        train_loss = c.train[max(s for s in c.train if s <= c.chosen)]
        losses = [f"{loss:.3f}" for loss in (c.best, c.last, train_loss, c.last - train_loss)]
        rows.append(
            (
                label,
                *losses,
                f"{c.chosen}/{max(c.held)}",
                f"{c.sparsity:.1%}" if c.sparsity else "-",
            )
        )
    columns = ("against overfitting", "best", "last", "train", "gap", "step", "zeros")
    measure.show(
        "validation loss: best and last; train loss, gap and step: of the final model",
        columns,
        rows,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps; the claims need not hold"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG of the curves")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overfitting-") as temporary:
        folder = Path(temporary)
        write_texts(folder)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(100 if a.quick else 150)))
        curves = {
            name: trained(folder, name, changes)
            for name, changes in ({PLAIN: {}} | REMEDIES).items()
        }
    show(curves)
    if picture := a.picture or (a.json and a.json.with_suffix(".png")):
        draw(curves, picture)
    plain = curves[PLAIN]
    claims = [measure.claim("overfits_last_vs_best", plain.last, plain.best, TURNED)]
    for name in REMEDIES:
        key = name.lower().replace(" ", "_")
        claims.append(
            measure.claim(
                f"{key}_validation_loss", curves[name].last, plain.last, 0.99, at_most=True
            )
        )
    stopped = max(curves["early stopping"].held)
    claims.append(
        measure.claim("early_stopping_steps", stopped, max(plain.held), 0.99, at_most=True)
    )
    claims.append(measure.claim("l1_zeros", curves["L1"].sparsity, None, 0.1))
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
