"""Measures the platform's overhead per training step, and whether the number of workers matters.

    python benchmarks/step.py [--quick] [--json FILE] [--compiled]

Each side trains the same 25M decoder on the same packed rows of 512 tokens, in processes of its own
with the same number of threads. The figures are medians of the steps after the first few, and the
sides take turns. The bare loop consists of transformers' model, FSDP2 and AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import yaml

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "platform"))
ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT / "platform"),
}
LENGTH = 512
STEADY = 3  # steps at the start that are not measured
FABRIC = ["torch==2.13.*", "transformers==5.23.*", "lightning==2.*", "numpy", "safetensors"]


class Size(NamedTuple):
    hidden: int
    layers: int
    vocabulary: int
    rows: int  # per step, over all workers
    steps: int
    rounds: int
    invariant_steps: int
    invariant: tuple[tuple[int, int], ...]  # workers, micro_batch
    peers: tuple[str, ...]


FULL = Size(
    448,
    8,
    8192,
    8,
    13,
    3,
    50,
    ((1, 12), (1, 4), (2, 6), (2, 2), (3, 4), (4, 3), (4, 1)),
    ("hf", "fabric"),
)
QUICK = Size(64, 2, 512, 4, 8, 1, 10, ((1, 12), (2, 3)), ("hf",))


def recipe_of(
    size: Size, workers: int, threads: int, compiled: bool, **more: Any
) -> dict[str, Any]:
    return {
        "name": "step",
        "seed": 1,
        "data": {"sources": [{"path": "text"}], "sequence_length": LENGTH, "lanes": 4},
        "tokenizer": {"vocab_size": size.vocabulary, "train_mb": 4},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": size.hidden,
                "intermediate_size": size.hidden * 8 // 3 // 32 * 32,
                "num_hidden_layers": size.layers,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
            }
        },
        "train": {
            "global_batch": size.rows,
            "micro_batch": size.rows // workers,
            "steps": size.steps,
            "log_every": 1,
            "compile": compiled,
        },
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0},
        "schedule": {"name": "linear"},
        "cluster": {"num_workers": workers, "cpus_per_worker": threads},
    } | more


# The sides: each is this script in a process of its own, and prints the seconds of each step.


def prepare(folder: Path, size: Size) -> None:
    """Writes the text, trains on it, and saves the tokenizer and the rows of each step as tensors.

    The other sides read them.
    """
    from safetensors.torch import save_file

    from sevenfold.data.ledger import Ledger, Replay
    from sevenfold.data.sources.python_corpus import build_python
    from sevenfold.engine.batch import to_batch
    from sevenfold.prepare.streams import open_streams
    from sevenfold.recipe import parse
    from sevenfold.run_folder import RunFolder

    build_python(str(folder / "corpus"), 12)
    run(folder, recipe_of(size, 1, 1, False), folder)
    folder_of_run = RunFolder(str(folder / "step"))
    shutil.copytree(folder_of_run.tokenizer, folder / "tokenizer")
    stream, _ = open_streams(folder_of_run, parse(folder_of_run.recipe))
    replay, ledger = Replay(stream), Ledger(folder_of_run.ledger)
    steps = [to_batch(replay.rows(ledger.step(s + 1))) for s in range(size.steps)]
    tensors = {
        f"{name}.{i}": getattr(b, name)
        for i, b in enumerate(steps)
        for name in ("input_ids", "position_ids", "labels")
    }
    save_file(tensors, folder / "batches.safetensors")


def batches(folder: Path, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "batches.safetensors")
    names = ("input_ids", "position_ids", "labels")
    steps = len(tensors) // len(names)
    return [{n: tensors[f"{n}.{i}"].chunk(world)[rank] for n in names} for i in range(steps)]


def model_of(folder: Path, size: Size) -> Any:
    from transformers import AutoTokenizer

    from sevenfold.model import build
    from sevenfold.recipe import Recipe

    recipe = Recipe.model_validate(recipe_of(size, 1, 1, False))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return build.build(recipe, build.config_of(recipe, len(tokenizer), tokenizer), weights=True)


def loss_of(model: Any, batch: dict[str, Any]) -> Any:
    import torch.nn.functional as F

    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100
    )


def timed(steps: Iterator[Any]) -> Iterator[tuple[float, Any]]:
    begin = time.perf_counter()
    for value in steps:
        now = time.perf_counter()
        yield now - begin, value
        begin = now


def bare(a: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Runs a minimal training loop: in one process, or in one per rank with FSDP2."""
    if a.workers > 1:
        import torch.multiprocessing as mp

        with tempfile.TemporaryDirectory() as temporary:
            mp.start_processes(_bare, (a, size, Path(temporary)), a.workers, start_method="spawn")
            return dict(json.loads((Path(temporary) / "out.json").read_text()))
    return _bare(0, a, size, None)


def _bare(rank: int, a: argparse.Namespace, size: Size, temporary: Path | None) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from sevenfold.engine import cpu

    if a.same_gemm:
        cpu.prepare(a.threads)
    else:
        torch.set_num_threads(a.threads)
        torch.set_flush_denormal(True)
    model = model_of(a.data, size)
    if a.compiled:
        for layer in model.model.layers:
            layer.compile()
    if temporary is not None:
        dist.init_process_group(
            "gloo", init_method=f"file://{temporary}/store", rank=rank, world_size=a.workers
        )
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def steps() -> Iterator[float]:
        for batch in batches(a.data, rank, a.workers):
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach())

    model.train()
    result = {"step_s": [s for s, _ in timed(steps())]}
    if temporary is not None:
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            (temporary / "out.json").write_text(json.dumps(result))
    return result


def hf(a: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Runs transformers' Trainer on the same rows.

    It gets labels that are not shifted, since its models shift them.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    rows = []
    for batch in batches(a.data):
        labels = torch.full_like(batch["labels"], -100)
        labels[:, 1:] = batch["labels"][:, :-1]
        rows += [
            {"input_ids": i, "position_ids": p, "labels": t}
            for i, p, t in zip(batch["input_ids"], batch["position_ids"], labels, strict=True)
        ]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.begin)
            self.begin = now

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    model = model_of(a.data, size)
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            temporary,
            per_device_train_batch_size=size.rows,
            max_steps=size.steps,
            learning_rate=1e-3,
            weight_decay=0.0,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            torch_compile=a.compiled,
            remove_unused_columns=False,
            dataloader_num_workers=0,
        )
        trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[Clock()])
        with open(os.devnull, "w") as quiet:
            stdout, sys.stdout = sys.stdout, quiet
            trainer.train()
            sys.stdout = stdout
        losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    return {"step_s": seconds, "losses": losses}


def fabric(a: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Runs a training loop with Lightning Fabric, as litgpt does."""
    import torch
    from lightning.fabric import Fabric

    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    runner = Fabric(accelerator="cpu", devices=1)
    runner.launch()
    model = model_of(a.data, size)
    if a.compiled:
        for layer in model.model.layers:
            layer.compile()
    model, optimizer = runner.setup(
        model,
        torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    )

    def steps() -> Iterator[float]:
        for batch in batches(a.data):
            loss = loss_of(model, batch)
            runner.backward(loss)
            runner.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach())

    return {"step_s": [s for s, _ in timed(steps())]}


SIDES = {"bare": bare, "hf": hf, "fabric": fabric}


def ours(
    folder: Path, size: Size, workers: int, threads: int, compiled: bool, **more: Any
) -> dict[str, Any]:
    """Runs jobs/pretrain.py, with Ray Train, Ray Data, the ledger and the log."""
    tree = recipe_of(size, workers, threads, compiled, **more) | {
        "tokenizer": {"path": str(folder / "tokenizer")}
    }
    with tempfile.TemporaryDirectory() as temporary:
        run(folder, tree, Path(temporary))
        logged = [
            json.loads(line)
            for line in (Path(temporary) / "step/metrics.jsonl").read_text().splitlines()
        ]
    steps = [m for m in logged if "train/loss" in m]
    steady = {
        k: measure.median([m[f"train/{k}"] for m in steps[STEADY:]]) for k in ("data_wait", "mfu")
    }
    return {
        "step_s": [m["train/step_seconds"] for m in steps],
        "losses": [m["train/loss"] for m in steps],
        **steady,
    }


def job(folder: Path, tree: dict[str, Any], home: Path) -> list[Any]:
    """Writes a recipe, and returns the command of the job; its run folder is `at`/step."""
    tree["data"] |= {"sources": [{"path": str(folder / "corpus/train")}]}
    tree["storage"] = str(home)
    (home / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return [sys.executable, ROOT / "jobs/pretrain.py", home / "recipe.yaml"]


def run(folder: Path, tree: dict[str, Any], home: Path) -> None:
    # not measure.run: sampling Ray's forty processes would take a tenth of a core from the steps
    env = {**os.environ, **ENV, "SEVENFOLD_HOME": str(folder)}
    subprocess.run(job(folder, tree, home), env=env, stdout=sys.stderr, check=True, timeout=1800)


# The claims


def other(
    side: str,
    a: argparse.Namespace,
    workers: int,
    threads: int,
    compiled: bool,
    same_gemm: bool = False,
) -> dict[str, Any]:
    python = measure.environment("fabric", FABRIC) if side == "fabric" else Path(sys.executable)
    command = [
        python,
        HERE,
        "--side",
        side,
        "--data",
        a.data,
        "--workers",
        str(workers),
        "--threads",
        str(threads),
    ]
    command += ["--compiled"] * compiled + ["--quick"] * a.quick + ["--same-gemm"] * same_gemm
    env = {**ENV, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        check=True,
        timeout=1800,
        text=True,
    )
    return dict(json.loads(process.stdout.splitlines()[-1]))


def speed(a: argparse.Namespace, size: Size, compiled: bool) -> list[dict[str, Any]]:
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        "ours, 1 worker, 2 threads": partial(ours, a.data, size, 1, 2, compiled),
        "bare, 1 process, 2 threads": partial(other, "bare", a, 1, 2, compiled),
        **{f"{p}, 1 process, 2 threads": partial(other, p, a, 1, 2, compiled) for p in size.peers},
        "bare, our matmuls": partial(other, "bare", a, 1, 2, compiled, True),
        "ours, 2 workers, 1 thread": partial(ours, a.data, size, 2, 1, compiled),
        "bare FSDP2, 2 processes, 1 thread": partial(other, "bare", a, 2, 1, compiled),
        "bare FSDP2, our matmuls": partial(other, "bare", a, 2, 1, compiled, True),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}

    def step(name: str) -> float:
        print(f"training: {name}{', compiled' if compiled else ''}", file=sys.stderr, flush=True)
        results[name].append(sides[name]())
        return measure.median(results[name][-1]["step_s"][STEADY:])

    seconds_by_side = measure.interleaved({n: partial(step, n) for n in sides}, size.rounds)
    medians = {k: measure.median(v) for k, v in seconds_by_side.items()}
    tokens = size.rows * LENGTH
    rates = {k: tokens / seconds for k, seconds in medians.items()}
    rows = []
    for name, seconds in medians.items():
        last = results[name][-1]
        rest = (f"{last['mfu']:.0%}", f"{last['data_wait']:.2%}") if "mfu" in last else ("-", "-")
        rows.append((name, f"{seconds * 1000:,.0f}", f"{rates[name]:,.0f}", *rest))
    title = (
        f"{size.hidden} x {size.layers}, rows of {LENGTH}, {size.rows} per step"
        f"{', compiled' if compiled else ''}"
    )
    measure.show(title, ("loop", "ms per step", "tokens/s", "MFU (fp32 GEMM)", "data wait"), rows)
    alone, single, hf_trainer, *_, same, two, bare_two, same_two = rates.values()
    end = "_compiled" if compiled else ""
    return [
        measure.claim(f"vs_bare_loop{end}", alone, single, 0.98),
        measure.claim(f"vs_bare_loop_two_workers{end}", two, bare_two, 0.98),
        measure.claim(f"vs_hf_trainer{end}", alone, hf_trainer, 1.0),
        # the overhead without the effect of torch's slow matmuls on CPUs that are not Intel's
        measure.claim(f"vs_bare_loop_same_gemm{end}", alone, same, 0.98),
        measure.claim(f"vs_bare_loop_two_workers_same_gemm{end}", two, same_two, 0.98),
    ]


def parity(a: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    """Compares our losses with those of transformers' Trainer, on the same weights and rows."""
    our_losses, trainer_losses = (
        ours(a.data, size, 1, 2, False)["losses"],
        other("hf", a, 1, 2, False)["losses"],
    )
    largest = max(abs(m / t - 1) for m, t in zip(our_losses, trainer_losses, strict=True))
    return [measure.claim("parity_with_hf_trainer", largest, None, 1e-5, at_most=True)]


def invariance(a: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    """Compares the losses of one recipe on 1 to 4 workers, with and without accumulation."""
    small = size._replace(hidden=64, layers=2, rows=12, steps=size.invariant_steps)
    base: list[float] = []
    largest, rows = 0.0, []
    for workers, micro in size.invariant:
        tree = recipe_of(small, 1, 1, False)["train"] | {"micro_batch": micro}
        losses = ours(a.data, small, workers, 1, False, train=tree)["losses"]
        base = base or losses
        difference = max(abs(x / y - 1) for x, y in zip(losses, base, strict=True))
        largest = max(largest, difference)
        rows.append((str(workers), str(micro), f"{losses[-1]:.6f}", f"{difference:.1e}"))
    measure.show(
        f"{small.steps} steps of one recipe",
        ("workers", "micro_batch", "last loss", "largest difference"),
        rows,
    )
    return [measure.claim("world_size_invariance", largest, None, 1e-5, at_most=True)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small model, few steps; too small to judge the claims by",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compiled", action="store_true", help="compiled against compiled as well")
    own = parser.add_argument_group("used by the script itself")
    own.add_argument("--side", choices=SIDES)
    own.add_argument("--data", type=lambda s: Path(s).absolute())
    own.add_argument("--workers", type=int)
    own.add_argument("--threads", type=int)
    own.add_argument(
        "--same-gemm",
        action="store_true",
        help="the matmuls that sevenfold chooses (engine/cpu.py)",
    )
    a = parser.parse_args()
    size = QUICK if a.quick else FULL
    if a.side:
        print(json.dumps(SIDES[a.side](a, size)), flush=True)
        return 0
    os.environ.update(ENV)
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        a.data = Path(folder)
        prepare(a.data, size)
        claims = [*invariance(a, size), *parity(a, size), *speed(a, size, False)]
        if a.compiled:
            claims += speed(a, size, True)
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
