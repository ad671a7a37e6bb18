"""Checks what somebody meets in the first hour: data of their own, mistakes, the installed wheel.

    python benchmarks/first_hour.py [--only kinds|mistakes|wheel] [--json FILE]

- kinds: `kinds_in_one_command`, how many of six kinds of data become an evaluated model by one
  command each, without a recipe. The data is made from the docstrings of Python's own library; chat
  and summaries start from a pretrained model, retrieval and classes from a pretrained encoder;
  both are fetched as packages. Seconds and commands are printed.
- mistakes: `mistakes_answered`, how many of twenty usual mistakes are answered by a line that names
  the key or file, the place and what to do.
- wheel: `wheel_alone`, whether the built wheel trains in an environment of its own, elsewhere.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure

ROOT = Path(__file__).resolve().parents[1]
SEVENFOLD = [sys.executable, "-m", "sevenfold.cli"]
ROWS = 600
TEN_MINUTES = 600.0


class Docstring(NamedTuple):
    module: str
    name: str
    first: str
    rest: str


def docstrings() -> Iterator[Docstring]:
    """Yields the docstrings of Python's library that have a summary and more."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py")):
        if path.parent.name in ("site-packages", "test", "idlelib"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                first, _, rest = text.partition("\n\n")
                first = " ".join(first.split())
                if 20 < len(first) < 200 and len(rest) > 80:
                    yield Docstring(path.parent.name, node.name, first, rest[:1500])


def write_data(folder: Path) -> dict[str, tuple[str, str]]:
    """Writes the data; returns for each task its file and the kind of base it starts from."""
    found = list(docstrings())[:ROWS]
    counts = {d.module: sum(e.module == d.module for e in found) for d in found}
    modules = sorted(counts, key=lambda m: -counts[m])[:4]

    def jsonl(name: str, rows: list[dict[str, Any]]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    chat = [
        {"instruction": f"What does {d.name} do?", "input": "", "output": d.first} for d in found
    ]
    (folder / "texts").mkdir()
    for i, d in enumerate(found):
        (folder / f"texts/{i}.txt").write_text(f"{d.name}: {d.first}\n\n{d.rest}\n")
    with (folder / "modules.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["description", "module"])
        writer.writerows([f"{d.first} {d.rest}", d.module] for d in found if d.module in modules)
    words = [re.sub(r"(?<=[a-z])(?=[A-Z])|_+", " ", d.name).strip().lower() for d in found]
    return {
        "pretrain": ("texts", ""),
        "chat": (jsonl("questions.jsonl", chat), "smollm2-135m"),
        "classify": ("modules.csv", "minilm-l6"),
        "summarize": (
            jsonl("papers.jsonl", [{"article": d.rest, "abstract": d.first} for d in found]),
            "smollm2-135m",
        ),
        "translate": (
            jsonl(
                "names.jsonl",
                [{"src": d.name, "tgt": w} for d, w in zip(found, words, strict=True)],
            ),
            "",
        ),
        "retrieve": (
            jsonl("search.jsonl", [{"question": d.first, "passage": d.rest} for d in found]),
            "minilm-l6",
        ),
    }


def run(home: Path, *arguments: str, timeout: float = 1800) -> tuple[int, str, float]:
    """Runs a command; returns its exit code, what it printed, and its seconds."""
    env = os.environ | {"SEVENFOLD_HOME": str(home), "PYTHONPATH": str(ROOT / "platform")}
    env.pop("RAY_ADDRESS", None)
    begin = time.perf_counter()
    done = subprocess.run(
        [*SEVENFOLD, *arguments], cwd=home, env=env, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - begin


def kinds(only: str | None) -> list[Any]:
    rows, good = [], 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        data = write_data(home)
        for base in sorted({base for _, base in data.values() if base}):
            code, printed, _ = run(home, "base", base, base)
            assert code == 0, printed
        for task, (file, base) in data.items():
            if only not in (None, task):
                continue
            job = "pretrain" if task == "pretrain" else "finetune"
            command = [job, file, *(["--model", base] if base else [])]
            code, printed, seconds = run(home, *command)
            name = Path(file).stem
            run_folder = home / "runs" / name
            result, metric = "", ""
            if code == 0:
                code, more, evaluated = run(home, "evaluate", f"runs/{name}")
                printed += more
                seconds += evaluated
            if code == 0:
                metrics = json.loads((run_folder / "metrics.json").read_text())
                metric = next(
                    f"{key} {value:.3f}"
                    for key in ("f1_macro", "ndcg@10", "rougeL", "bleu", "perplexity")
                    if isinstance(value := metrics.get(key), float)
                )
                summary = json.loads((run_folder / "summary.json").read_text())
                result = f"{summary['steps']} steps"
                good += f"task: {task}" in printed and seconds < TEN_MINUTES
            else:
                print(printed[-2000:], file=sys.stderr)
            typed = f"sevenfold {' '.join(command)}"
            rows.append((task, typed, f"{seconds:.0f}", result, metric or f"exit {code}"))
    columns = ("task", "typed, beside `sevenfold evaluate`", "seconds", "trained", "result")
    measure.show("From a file to an evaluated model", columns, rows)
    return [measure.claim("kinds_in_one_command", good, None, 6)]


BASE = {
    "name": "r",
    "data": {"sources": [{"path": "data.jsonl"}], "sequence_length": 64},
    "tokenizer": {"vocab_size": 512},
    "model": {"config": {"model_type": "llama", "hidden_size": 32}},
    "train": {"global_batch": 8, "micro_batch": 4, "steps": 100},
}
# (changes of the recipe's text or arguments, what the line must name)
MISTAKES: list[tuple[str, list[str], tuple[str, ...]]] = [
    ("optimizer: {lr: 2.0e-5}", [], ("r.yaml:", "optimizer.lr", "optimizer.learning_rate")),
    ("learning_rate: 1.0e-3", [], ("r.yaml:", "learning_rate", "optimizer.learning_rate")),
    ("num_train_epochs: 3", [], ("r.yaml:", "num_train_epochs", "data.epochs=3")),
    (
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 8\ncluster: {num_workers: 2}",
        [],
        ("r.yaml:", "per_device_train_batch_size", "train.global_batch=64"),
    ),
    ("max_seq_length: 2048", [], ("r.yaml:", "max_seq_length", "data.sequence_length=2048")),
    ("schedule: {warmup_ratio: 0.03}", [], ("r.yaml:", "warmup_ratio", "warmup_steps=3")),
    ("lr_scheduler_type: cosine", [], ("r.yaml:", "lr_scheduler_type", "schedule.name=cosine")),
    ("lora_r: 16", [], ("r.yaml:", "lora_r", "adapter.rank=16")),
    ("save_steps: 500", [], ("r.yaml:", "save_steps", "checkpoint.every=500")),
    ("bf16: true", [], ("r.yaml:", "bf16", "train.dtype=bfloat16")),
    ("load_in_4bit: true", [], ("r.yaml:", "load_in_4bit", "adapter")),
    ("deepspeed: ds.json", [], ("r.yaml:", "deepspeed", "FSDP2")),
    ("optimiser: {name: adamw}", [], ("r.yaml:", "optimiser", "optimizer")),
    ("optimizer: {name: adam}", [], ("r.yaml:", "optimizer.name", "adamw")),
    ("val_set_size: 0.05", [], ("r.yaml:", "val_set_size", "data.held_out=0.05")),
    ("", ["train.stepz=3"], ("train.stepz", "train.steps")),
    ("", ["train.steps", "100"], ("train.steps", "key.path=value")),
    ("", ["data.sources.0.path=missing.jsonl"], ("missing.jsonl", "expected")),
    (
        "",
        ["model.path=meta-llama/Llama-3.2-1B", "model.config=null", "tokenizer.vocab_size=null"],
        ("meta-llama", "hf"),
    ),
    ("", ["train.global_batch=10", "data.lanes=4"], ("train.global_batch", "multiple of", "4")),
]


def mistakes() -> list[Any]:
    import yaml

    rows, good = [], 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "data.jsonl").write_text('{"text": "some text"}\n' * 50)
        for change, arguments, named in MISTAKES:
            (home / "r.yaml").write_text(yaml.safe_dump(BASE) + change + "\n")
            code, printed, _ = run(home, "pretrain", "r.yaml", *arguments, "--dry-run")
            lines = [line for line in printed.splitlines() if line.startswith("error: ")]
            answered = [line for line in lines if all(name in line for name in named)]
            is_good = code == 2 and bool(answered) and "Traceback" not in printed
            good += is_good
            shown = (answered or lines or [f"exit {code}"])[0].removeprefix("error: ")
            rows.append(
                (change.split("\n")[0] or " ".join(arguments), "yes" if is_good else "NO", shown)
            )
    measure.show("Usual mistakes", ("mistake", "answered", "message"), rows)
    return [measure.claim("mistakes_answered", good, None, 20)]


def wheel() -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow", str(ROOT / "tests/test_wheel.py")],
        cwd=ROOT,
    )
    return [measure.claim("wheel_alone", float(done.returncode == 0), None, 1)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("kinds", "mistakes", "wheel"))
    parser.add_argument("--task", help="with --only kinds: this one alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    claims: list[Any] = []
    if arguments.only in (None, "mistakes"):
        claims += mistakes()
    if arguments.only in (None, "wheel"):
        claims += wheel()
    if arguments.only in (None, "kinds"):
        claims += kinds(arguments.task)
    return 0 if measure.report(claims, arguments.json) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
