"""Compares the estimates of `sevenfold plan` with published results and with measurements here.

    python benchmarks/plan.py [--quick] [--json FILE]

Memory is compared for torchtitan's Llama 3.1 8B on H100s, our own runs on one H200
(benchmarks/RESULTS.md), and workers with small models on this machine; throughput for the rows of
published.py. --quick: some of the published results, and here only the larger model, to which
nothing is fitted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measure
import published

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "platform"))
GIB, MIB = 2**30, 2**20
LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
# models with published throughput, and small ones
MODELS: dict[str, dict[str, Any]] = {
    "8B": published.MODELS["Llama 8B"],
    "7B": published.MODELS["Llama 7B"],
    "1B": published.MODELS["Llama 1.24B"],
    "30M": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
    "13M": {
        "hidden_size": 320,
        "intermediate_size": 896,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}


class Case(NamedTuple):
    """A measured peak of memory.

    Attributes:
        model: A key of MODELS.
        gpus: The number of GPUs.
        length: Tokens per sequence.
        rows: Sequences per micro-batch.
        checkpointing: Activation checkpointing: none, selective or full.
        gib: Reserved GiB (torch.cuda.max_memory_reserved).
        compiled: Whether the model was compiled.
        loss_chunk: As in the recipe.
        adapter: Whether LoRA is trained.
        allocated: Allocated GiB, if they are known.
    """

    model: str
    gpus: int
    length: int
    rows: int
    checkpointing: str
    gib: float
    compiled: bool = False
    loss_chunk: int | None = None
    adapter: bool = False
    allocated: float | None = None


# torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (tables 1 to 3; 96 GB H100s, torch of
# 2024-12-23). Its selective checkpointing keeps every second matmul, and so does the trace here
# (`titan`). It also compiles the loss, which we do not: the plan's estimate for a compiled row is
# that of the eager one.
PUBLISHED = {
    "8 GPUs": Case("8B", 8, 8192, 2, "selective", 82.4),
    "8 GPUs, compiled": Case("8B", 8, 8192, 2, "selective", 77.0),
    "128 GPUs": Case("8B", 128, 8192, 2, "selective", 67.0),
    "128 GPUs, compiled": Case("8B", 128, 8192, 2, "selective", 62.0),
    "8 GPUs, 1 row of 32,768, compiled, float8": Case("8B", 8, 32768, 1, "full", 83.9),
}
# benchmarks/RESULTS.md, "On a GPU, without Ray", where they are in GB. The allowance for the
# allocator in plan.memory is fitted to them; allocated memory is not fitted to anything. Selective
# checkpointing is that of transformers 5.17, which wraps a compiled block and cannot look into it,
# so it had the effect of full. That of 5.23, which we pin, is inside of the compiled block and
# works (counted on a CPU: no matmul is recomputed).
OURS = {
    "1.24B, eager": Case("1B", 1, 8192, 2, "none", 77.6e9 / GIB, allocated=69.4e9 / GIB),
    "1.24B, compiled": Case("1B", 1, 8192, 2, "none", 68.8e9 / GIB, True, allocated=60.8e9 / GIB),
    "6.74B, compiled, selective": Case(
        "7B", 1, 4096, 1, "full", 113.6e9 / GIB, True, 2048, allocated=108.9e9 / GIB
    ),
    "8.03B, compiled, full": Case(
        "8B", 1, 8192, 1, "full", 143.0e9 / GIB, True, 2048, allocated=132.8e9 / GIB
    ),
    "8.03B, compiled, LoRA": Case(
        "8B", 1, 4096, 2, "full", 43.1e9 / GIB, True, 2048, True, allocated=40.3e9 / GIB
    ),
}
HERE_CASES = {"13M": (512, 4), "30M": (512, 4)}  # tokens per row, rows per micro-batch
WORKERS = 2


def recipe_of(model: str, gpus: int, length: int, rows: int, **train: Any) -> Any:
    from sevenfold.recipe import Recipe

    data = {"sources": [{"path": "none"}], "sequence_length": length, "lanes": gpus}
    settings = {"global_batch": gpus * rows, "micro_batch": rows, "steps": 1, **train}
    config = {"config": LLAMA | MODELS[model]}
    return Recipe.model_validate(
        {
            "name": "plan",
            "model": config,
            "tokenizer": {"path": "none"},
            "data": data,
            "train": settings,
        }
    )


def predicted(case: Case, trace: Any = None) -> Any:
    """Returns the plan's memory of a case.

    Args:
        case: The case.
        trace: Replaces the plan's function that traces a step.
    """
    from sevenfold.plan import memory
    from sevenfold.plan.layouts import Layout
    from sevenfold.recipe import Adapter

    recipe = recipe_of(
        case.model,
        case.gpus,
        case.length,
        case.rows,
        dtype="bfloat16",
        loss_chunk=case.loss_chunk,
        compile=case.compiled,
        activation_checkpointing=case.checkpointing,
    )
    if case.adapter:
        # not in the validated tree: there, an adapter requires model.path
        recipe = recipe.model_copy(update={"adapter": Adapter(rank=16, alpha=32)})
    layout = Layout(case.gpus, micro_batch=case.rows, activation_checkpointing=case.checkpointing)
    return (
        memory.measured(recipe, layout, trace=trace) if trace else memory.measured(recipe, layout)
    )


def reserved(case: Case, held: Any) -> float:
    """Returns the memory that torch counts as reserved, in bytes."""
    from sevenfold.plan import memory
    from sevenfold.plan.layouts import Layout

    return float(held.total - memory.context(Layout(case.gpus)))


def titan(job: Any) -> Any:
    """Traces a step with torchtitan's selective checkpointing. Runs in a process of its own.

    Of the matmuls of each block it keeps the first, the third and so on
    (torchtitan/models/llama/parallelize_llama.py, _apply_ac_to_transformer_block, as of 2024-12).
    """
    import torch
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    from sevenfold.model import parallel
    from sevenfold.plan import trace

    def contexts() -> Any:
        seen = Counter[bool]()

        def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
            keep = operator in parallel.SAVED
            if operator is torch.ops.aten.mm.default:
                seen[context.is_recompute] += 1
                keep = seen[context.is_recompute] % 2 == 1
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    def recompute(model: Any, how: str) -> None:
        if how != "selective":
            ours(model, how)
            return
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
        )

    ours, parallel.recompute = parallel.recompute, recompute
    try:
        return trace.trace(job)
    finally:
        parallel.recompute = ours


# On this machine


class WorkerFigures(NamedTuple):
    """What was measured on a worker, which has one thread.

    Attributes:
        bytes: Peak of resident memory during steps, above that before the model was built.
        step: Median seconds per step.
        gemm: FLOP/s of float32 matmuls of 2,048 x 2,048, in the same minute.
        copied: Bytes per second of a copy, read and written bytes together.
        sent: Bytes per second of an all-gather.
        attention: FLOP/s of SDPA, forward and backward.
    """

    bytes: float
    step: float
    gemm: float
    copied: float
    sent: float
    attention: float


def worker(model: str, length: int, rows: int, rank: int, store: str) -> WorkerFigures:
    """Trains a model on one worker, and measures memory and speed.

    A tiny model is trained before, so that libraries, threads and gloo's buffers exist already.
    """
    import torch.distributed as dist

    from sevenfold.engine import cpu

    cpu.prepare(threads=1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    try:
        _train(recipe_of("tiny", WORKERS, 64, 2))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before_rates = _rates(model, length, rows)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        step = _train(recipe_of(model, WORKERS, length, rows))
        peak = _status("VmHWM") - before
        after = _rates(model, length, rows)
        return WorkerFigures(
            peak, step, *((a + b) / 2 for a, b in zip(before_rates, after, strict=True))
        )
    finally:
        dist.destroy_process_group()


def _rates(model: str, length: int, rows: int) -> tuple[float, float, float, float]:
    """Returns gemm, copied, sent and attention, as in WorkerFigures."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    large, other, part = torch.zeros(2**24), torch.zeros(2**24), torch.zeros(2**21)
    gathered = [torch.empty_like(part) for _ in range(WORKERS)]
    heads = MODELS[model]["num_attention_heads"]
    q, k, v = (torch.randn(rows, heads, length, 64, requires_grad=True) for _ in range(3))

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    def rate(work: Callable[[], Any], amount: float) -> float:
        work()
        times = []
        for _ in range(5):
            dist.barrier()
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return amount / statistics.median(times)

    flops = rows * heads * 64 * length**2 * 2 * (1 + 2.5)  # the causal half, as plan.ops counts it
    return (
        rate(lambda: a @ b, 2 * 2048**3),
        rate(lambda: other.copy_(large), 2 * large.nbytes),
        rate(lambda: dist.all_gather(gathered, part), part.nbytes * (WORKERS - 1)),
        rate(attend, flops),
    )


def _train(recipe: Any) -> float:
    """Trains for six steps, and returns the median seconds of those after the first two."""
    import numpy as np
    import torch

    from sevenfold.data.rows import Rows
    from sevenfold.engine import optim
    from sevenfold.engine.batch import micro_batches, to_batch
    from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel

    device = torch.device("cpu")
    size, length = recipe.model.config["vocab_size"], recipe.data.sequence_length
    config = build.config_of(recipe, size)
    model: Any = build.build(
        recipe, config, weights=torch.distributed.get_rank() == 0, attention="sdpa"
    )
    attach_losses(model, Causal(SpecialTokens(size), 0, 0.15, 3), recipe.train.loss_chunk)
    model = parallel.shard(model, device, recipe.train, recipe.parallel)
    optimizers = optim.build(model, recipe.optimizer)
    model.train()
    rng, count = np.random.default_rng(torch.distributed.get_rank()), recipe.train.micro_batch
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        tokens = rng.integers(3, size, (count, length)).astype(np.uint32)
        rows = Rows(tokens, np.zeros(count, np.int32), np.full(count, length, np.int32), None)
        train_step(model, micro_batches(rows, count, 1, to_batch, device), optimizers, 1e-3, 1.0)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _status(name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return float(match[1]) * 1024


def measured_here(model: str, length: int, rows: int) -> WorkerFigures:
    """Returns the figures of the worker with the highest memory."""
    with tempfile.TemporaryDirectory() as at:
        command = [sys.executable, str(HERE), "--worker", json.dumps([model, length, rows])]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), f"{at}/store"], stdout=subprocess.PIPE, text=True
            )
            for rank in range(WORKERS)
        ]
        outputs = [p.communicate(timeout=300)[0] for p in ranks]
    return max(WorkerFigures(*json.loads(text.splitlines()[-1])) for text in outputs)


def planned_here(model: str, length: int, rows: int) -> float:
    from sevenfold.plan import memory
    from sevenfold.plan.layouts import Layout

    return memory.measured(
        recipe_of(model, WORKERS, length, rows), Layout(WORKERS, micro_batch=rows), device="cpu"
    ).total


# The share of the speed of large square matmuls that a model's matmuls reach here. Fitted to 13M;
# 30M is held out.
GEMM = 0.8


def planned_step(model: str, length: int, rows: int, figures: WorkerFigures) -> float:
    """Returns the seconds per step that plan.speed expects on a machine with these rates.

    A worker computes and sends on the same core, so that communication does not overlap.
    """
    from sevenfold.plan import hardware, ops, speed
    from sevenfold.plan.layouts import Layout

    recipe, size = recipe_of(model, WORKERS, length, rows), MODELS[model]["vocab_size"]
    core = hardware.Gpu(
        "core",
        0,
        {"float32": figures.gemm},
        figures.copied / speed.MEMORY,
        GEMM,
        figures.attention / figures.gemm,
    )
    fleet = hardware.Fleet(core, WORKERS, WORKERS, figures.sent / speed.SENT, figures.sent)
    operations = ops.count_operations(recipe, size, rows, "none")
    model_size = speed.size(recipe, size)
    estimate = speed.speed_of_pass(
        operations,
        model_size,
        Layout(WORKERS, micro_batch=rows),
        fleet,
        "float32",
        False,
        1,
        WORKERS * rows * length,
    )
    return estimate.step


# The report


def memory_claims(quick: bool) -> list[dict[str, Any]]:
    names = ["8 GPUs", "128 GPUs"] if quick else list(PUBLISHED)
    published = [(name, PUBLISHED[name], predicted(PUBLISHED[name], _by_titan)) for name in names]
    rows, errors = [], []
    for name, case, held in published:
        errors.append(reserved(case, held) / GIB / case.gib - 1)
        rows.append(_row(f"Llama 3.1 8B, {name} (torchtitan)", case, held))
    ours = [] if quick else [(name, case, predicted(case)) for name, case in OURS.items()]
    rows += [_row(f"{name} (ours, H200)", case, held) for name, case, held in ours]
    columns = (
        "case",
        "allocated GiB: plan",
        "measured",
        "",
        "reserved GiB: plan",
        "measured",
        "",
    )
    measure.show("peak memory of a GPU", columns, rows)
    claims = [measure.claim("memory_error", max(map(abs, errors)), None, 0.10, at_most=True)]
    if ours:
        differences = [
            abs(held.allocated / GIB / case.allocated - 1)
            for _, case, held in ours
            if case.allocated
        ]
        claims.append(
            measure.claim(
                "memory_error: ours, allocated", max(differences), None, 0.05, at_most=True
            )
        )
    return claims + _here(["30M"] if quick else list(HERE_CASES))


def _by_titan(jobs: Sequence[Any]) -> list[Any]:
    from sevenfold.plan import trace

    return list(trace.processes().map(titan, jobs))


def _row(name: str, case: Case, held: Any) -> tuple[str, ...]:
    allocated = (
        ("-", "-")
        if case.allocated is None
        else (f"{case.allocated:.1f}", f"{held.allocated / GIB / case.allocated - 1:+.1%}")
    )
    plan = reserved(case, held)
    return (
        name,
        f"{held.allocated / GIB:.1f}",
        *allocated,
        f"{plan / GIB:.1f}",
        f"{case.gib:.1f}",
        f"{plan / GIB / case.gib - 1:+.1%}",
    )


def _here(models: Sequence[str]) -> list[dict[str, Any]]:
    rows, memory_errors, step_errors = [], [], []
    for model in models:
        figures = measured_here(model, *HERE_CASES[model])
        plan = planned_here(model, *HERE_CASES[model])
        step = planned_step(model, *HERE_CASES[model], figures)
        memory_errors.append(abs(plan / figures.bytes - 1))
        step_errors.append(abs(step / figures.step - 1))
        memory = (
            f"{plan / MIB:.0f}",
            f"{figures.bytes / MIB:.0f}",
            f"{plan / figures.bytes - 1:+.1%}",
        )
        rows.append(
            (
                model,
                *memory,
                f"{step:.2f}",
                f"{figures.step:.2f}",
                f"{step / figures.step - 1:+.1%}",
            )
        )
    columns = ("model", "MiB: plan", "measured", "", "s per step: plan", "measured", "")
    measure.show(f"one of {WORKERS} workers on this machine", columns, rows)
    return [
        measure.claim("memory_error: this machine", max(memory_errors), None, 0.15, at_most=True),
        measure.claim("step_error: this machine", max(step_errors), None, 0.15, at_most=True),
    ]


def throughput(quick: bool) -> list[dict[str, Any]]:
    """Compares tokens per second per GPU of plan.speed with those of published.ROWS."""
    rows = [r for r in published.ROWS if not quick or r.source == published.TITAN]
    estimates = [published.predicted(r).per_gpu for r in rows]
    errors = [ours / r.given - 1 for r, ours in zip(rows, estimates, strict=True)]
    table_rows = []
    for r, ours, error in zip(rows, estimates, errors, strict=True):
        how = "compiled" if r.compiled else "eager"
        rates = (f"{r.given:,.0f}", f"{ours:,.0f}", f"{error:+.1%}", "fitted" if r.fitted else "")
        where = (
            r.model,
            f"{r.gpus} x {r.gpu}",
            f"{r.micro_batch} x {r.length}",
            r.checkpointing,
            how,
        )
        table_rows.append((*where, *rates, r.source.partition(",")[0]))
    columns = (
        "model",
        "GPUs",
        "rows",
        "checkpointing",
        "",
        "tokens/s/GPU",
        "the plan",
        "error",
        "",
        "source",
    )
    measure.show("Throughput", columns, table_rows)
    held_out = max(abs(e) for r, e in zip(rows, errors, strict=True) if not r.fitted)
    return [
        measure.claim("throughput_error", max(map(abs, errors)), None, 0.15, at_most=True),
        measure.claim("throughput_error_held_out", held_out, None, 0.15, at_most=True),
    ]


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="fewer cases")
    p.add_argument("--json", type=Path)
    p.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        model, length, rows = json.loads(a.worker[0])
        print(json.dumps(worker(model, length, rows, int(a.worker[1]), a.worker[2])))
        return 0
    claims = memory_claims(a.quick) + throughput(a.quick)
    return 0 if measure.report(claims, a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
