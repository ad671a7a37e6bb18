"""Measures the training step on one GPU, without Ray: exactness, speed and memory.

    python benchmarks/gpu.py [--only CASES] [--json FILE] [--quick] [--list]

The case `exact` compares losses with those of the CPU. Each case runs in a process of its own. Rows
are random tokens, and one document each unless the case says otherwise. The bare loop consists of
transformers' model, FSDP2 and AdamW. --quick: small models, also on a CPU if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "platform"))
# transformers' configs of Llama 3.2 1B and Llama 3.1 8B (arXiv 2407.21783), and of
# jobs/recipes/llama-7b.yaml
LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Case(NamedTuple):
    model: str
    length: int
    rows: int  # per step, in one micro-batch
    compiled: bool
    checkpointing: str = "none"
    bare: bool = False
    document: int | None = None  # mean tokens per document; None: each row is one document
    adapter: bool = False
    vocabulary: int = 128256
    loss_chunk: int | None = 2048
    attention: str = "auto"


CASES = {
    "1b, sdpa": Case("1B", 8192, 2, True, loss_chunk=None, attention="sdpa"),
    "1b": Case("1B", 8192, 2, False, loss_chunk=None),
    "1b bare": Case("1B", 8192, 2, False, bare=True),
    "1b compiled": Case("1B", 8192, 2, True, loss_chunk=None),
    "1b compiled bare": Case("1B", 8192, 2, True, bare=True),
    "1b compiled, documents of 1,024": Case("1B", 8192, 2, True, document=1024, loss_chunk=None),
    "7b compiled": Case("7B", 4096, 1, True, "selective", vocabulary=32000),
    "8b compiled": Case("8B", 8192, 1, True, "full"),
    "8b LoRA": Case("8B", 4096, 2, True, "selective", adapter=True),
}
STEPS, STEADY = 10, 4  # all steps, and those at the start that are not measured
OBJECTIVES = ("causal", "sft", "dpo", "classify", "masked", "embed", "denoise", "seq2seq")


@contextlib.contextmanager
def alone() -> Iterator[Any]:
    """Starts a process group of this process alone, and yields its device."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        try:
            yield torch.device("cuda", 0) if cuda else torch.device("cpu")
        finally:
            dist.destroy_process_group()


def rows_of(
    count: int, length: int, vocabulary: int, document: int | None, seed: int, answers: bool = False
) -> Any:
    """Returns rows of random tokens.

    Args:
        count: The number of rows.
        length: Tokens per row.
        vocabulary: Tokens are below this number.
        document: Mean tokens per document. None: each row is one document.
        seed: Seed of the tokens.
        answers: The targets are the second half of each document, as in fine-tuning.
    """
    import numpy as np

    from sevenfold.data.rows import Rows

    rng = np.random.default_rng(seed)
    tokens = rng.integers(30, vocabulary, (count, length)).astype(np.uint32)
    begins = rng.random((count, length)) < (1 / document if document else 0)
    begins[:, 0] = True
    targets = None
    if answers:
        targets = np.zeros((count, length), bool)
        for i, row in enumerate(begins):
            row[length - 4 :] = False
            indices = np.flatnonzero(row)
            row[indices[1:][np.diff(indices) < 8]] = False
            edges = [*np.flatnonzero(row).tolist(), length]
            for a, b in itertools.pairwise(edges):
                targets[i, (a + b) // 2 : b] = True
    return Rows(
        tokens, np.nonzero(begins)[1].astype(np.int32), np.full(count, length, np.int32), targets
    )


def random_weights(model: Any) -> None:
    """Fills a model with random weights.

    They are drawn on the device: drawing 8B numbers on the host takes longer than everything else.
    """
    import torch
    from torch.distributed.tensor import DTensor

    for p in model.parameters():
        shard = p.to_local() if isinstance(p, DTensor) else p
        with torch.no_grad():
            shard.fill_(1.0) if p.ndim == 1 else shard.normal_(0, 0.02)


# Speed and memory


def recipe_of(case: Case, quick: bool) -> Any:
    from sevenfold.recipe import Adapter, Recipe

    model = {
        "config": LLAMA | (SMALL if quick else MODELS[case.model]),
        "attention": case.attention,
    }
    train = {
        "global_batch": case.rows,
        "micro_batch": case.rows,
        "steps": STEPS,
        "dtype": "bfloat16",
        "loss_chunk": case.loss_chunk,
        "compile": case.compiled,
        "activation_checkpointing": case.checkpointing,
    }
    data = {"sources": [{"path": "none"}], "sequence_length": 256 if quick else case.length}
    recipe = Recipe.model_validate(
        {
            "name": "gpu",
            "seed": 1,
            "model": model,
            "tokenizer": {"path": "none"},
            "data": data,
            "train": train,
        }
    )
    if not case.adapter:
        return recipe
    # not in the validated tree: there, an adapter requires model.path
    return recipe.model_copy(update={"adapter": Adapter(rank=16, alpha=32)})


def speed(case: Case, quick: bool) -> dict[str, Any]:
    import torch
    import transformers

    from sevenfold.engine import optim
    from sevenfold.engine.batch import micro_batches, to_batch
    from sevenfold.engine.meter import Meter
    from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel

    # before transformers 5.2x this method had another name
    if not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
        transformers.PreTrainedModel.activation_checkpointing_enable = (
            lambda self, activation_checkpointing_kwargs: self.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=activation_checkpointing_kwargs
            )
        )
    recipe = recipe_of(case, quick)
    vocabulary, length = 512 if quick else case.vocabulary, recipe.data.sequence_length
    with alone() as device:
        config = build.config_of(recipe, vocabulary)
        kernel = "sdpa" if case.bare else build.choose_attention(recipe, device, config)
        model: Any = build.build(recipe, config, weights=False, attention=kernel)
        if case.adapter:
            build.with_adapter(model, recipe)
        flops = build.flops_per_token(model, recipe)
        if case.bare:
            model = _sharded_by_hand(model, device, case)
        else:
            attach_losses(
                model, Causal(SpecialTokens(vocabulary), 0, 0.15, 3), recipe.train.loss_chunk
            )
            model = parallel.shard(model, device, recipe.train, recipe.parallel)
        random_weights(model)
        model.train()
        optimizers = optim.build(model, recipe.optimizer)
        meter = Meter(flops, None, 1, device)
        begin = time.perf_counter()
        for step in range(STEPS):
            if step == STEADY:
                starting = time.perf_counter() - begin
                meter.reset()
            rows = rows_of(case.rows, length, vocabulary, case.document, step)
            (batch,) = micro_batches(rows, case.rows, 1, to_batch, device)
            if case.bare:
                loss = _step_by_hand(model, batch, optimizers[0])
            else:
                loss = train_step(model, [batch], optimizers, 1e-4, 1.0).loss
            meter.add(case.rows * length, 0.0, 0.0)
        metrics = meter.read() | {
            "loss": loss,
            "starting": starting,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if device.type == "cuda":
            metrics["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return metrics


def _sharded_by_hand(model: Any, device: Any, case: Case) -> Any:
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        if case.compiled:
            layer.compile()
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def _step_by_hand(model: Any, batch: Any, optimizer: Any) -> float:
    import torch
    import torch.nn.functional as F

    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# Exactness


def exact() -> dict[str, float]:
    """Returns the largest relative difference of each objective's losses between GPU and CPU.

    The losses are those of six steps in float32; on a GPU there is also an entry for a compiled
    model in bfloat16, compared with float32.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with alone() as device:
        differences = {}
        for objective in OBJECTIVES:
            cpu_losses, device_losses = (
                _losses(objective, d) for d in (torch.device("cpu"), device)
            )
            differences[objective] = max(
                abs(a / b - 1) for a, b in zip(cpu_losses, device_losses, strict=True)
            )
            print(objective, cpu_losses[-1], device_losses[-1], file=sys.stderr, flush=True)
        if device.type == "cuda":
            both = [
                _losses("causal", device, dtype=d, compile=d == "bfloat16")
                for d in ("float32", "bfloat16")
            ]
            differences["bfloat16, compiled"] = max(
                abs(a / b - 1) for a, b in zip(*both, strict=True)
            )
    return differences


def _losses(objective: str, device: Any, **train: Any) -> list[float]:
    from sevenfold.engine import optim
    from sevenfold.engine.objectives import (
        OBJECTIVES,
        Causal,
        Preference,
        SpecialTokens,
        attach_losses,
    )
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel
    from sevenfold.recipe import Recipe

    vocabulary, length, count = 512, 256, 8
    sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {
        "initializer_range": 0.1
    }
    config = {
        "masked": {"model_type": "modernbert", **sizes, "pad_token_id": 2},
        "denoise": {
            "model_type": "t5",
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
        },
    }
    config |= {
        "embed": config["masked"],
        "classify": config["masked"],
        "seq2seq": config["denoise"],
    }
    train |= {
        "global_batch": count,
        "micro_batch": count // 2,
        "steps": 6,
        "dropout": 0.0 if objective in config else None,
    }
    classes = list("abc") if objective == "classify" else []
    tree = {
        "name": "gpu",
        "seed": 1,
        "objective": "sft" if objective == "dpo" else objective,
        "train": train,
        "model": {"config": config.get(objective, LLAMA | sizes)},
        "tokenizer": {"path": "none"},
        "data": {"sources": [{"path": "none"}], "sequence_length": length, "classes": classes},
    }
    recipe = Recipe.model_validate(tree)
    words = SpecialTokens(
        vocabulary,
        special=tuple(range(24)),
        mask=3,
        sentinels=tuple(range(4, 24)),
        pad=2,
        end=1,
        start=2,
    )
    loss_function = OBJECTIVES[objective](words, 1, 0.3, 3.0)
    settings = build.config_of(recipe, vocabulary)
    models = [
        build.build(
            recipe,
            settings,
            weights=True,
            attention=build.choose_attention(recipe, device, settings),
        )
        for _ in range(2)
    ]
    model, reference = models
    attach_losses(model, loss_function)
    if isinstance(loss_function, Preference):
        attach_losses(reference, Causal(words, 1, 0.3, 3.0))
        loss_function.reference = parallel.shard(
            reference.requires_grad_(False), device, recipe.train
        ).eval()
    model = parallel.shard(model, device, recipe.train)
    optimizers = optim.build(model, recipe.optimizer)
    model.train()
    losses = []
    for step in range(6):
        rows = rows_of(
            count,
            length,
            vocabulary,
            64,
            step % 2,
            answers=objective not in ("causal", "masked", "denoise"),
        )
        if objective == "classify":
            rows.tokens[rows.targets] %= 3
            rows.targets[:] = False
            rows.tokens.reshape(-1)[rows.edges[1:] - 1] %= 3
        if objective == "dpo":
            rows.targets = _pairs(rows)
        batches = loss_function.batches(rows, step, count // 2, count, device)
        losses.append(train_step(model, batches, optimizers, 1e-3, 1.0).loss)
    return losses


def _pairs(rows: Any) -> Any:
    """Makes each document a preference pair, and returns the targets.

    A document consists of prompt, answer, the same prompt and another answer, a quarter each.
    """
    import numpy as np

    targets, edges = np.zeros(rows.tokens.size, bool), rows.edges.tolist()
    for a, b in itertools.pairwise(edges):
        quarter = (b - a) // 4
        targets[a + quarter : a + 2 * quarter] = targets[a + 3 * quarter : b] = True
        rows.tokens.reshape(-1)[a + 2 * quarter : a + 3 * quarter] = rows.tokens.reshape(-1)[
            a : a + quarter
        ]
    return targets.reshape(rows.tokens.shape)


# The report


def in_process(name: str, quick: bool) -> dict[str, Any] | None:
    print(f"{name}...", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE), "--case", name, *["--quick"] * quick]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        print(f"{name}: failed with status {process.returncode}", file=sys.stderr, flush=True)
        return None
    result = dict(json.loads(process.stdout.splitlines()[-1]))
    print(result, file=sys.stderr, flush=True)
    return result


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", help="cases to run, separated by semicolons; see --list")
    p.add_argument("--json", type=Path)
    p.add_argument("--quick", action="store_true", help="small models, also on a CPU")
    p.add_argument("--list", action="store_true", help="print the names of the cases")
    p.add_argument("--case", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.list:
        print("exact", *CASES, sep="\n")
        return 0
    if a.case:
        print(json.dumps(exact() if a.case == "exact" else speed(CASES[a.case], a.quick)))
        return 0
    import torch

    if not (a.quick or torch.cuda.is_available()):
        print(
            "benchmarks/gpu.py: no GPU found; --quick runs small models on a CPU", file=sys.stderr
        )
        return 2
    names = a.only.split(";") if a.only else ["exact", *CASES]
    results = {name: result for name in names if (result := in_process(name, a.quick))}
    claims = []
    if differences := results.pop("exact", None):
        claims += [
            measure.claim(
                f"as the CPU: {k}", v, None, 1e-2 if "bfloat16" in k else 1e-4, at_most=True
            )
            for k, v in differences.items()
        ]
    rate = {name: result["tokens_per_second"] for name, result in results.items()}
    for name in rate:
        if f"{name} bare" in rate:
            claims.append(
                measure.claim(f"{name}: vs_bare_loop", rate[name], rate[f"{name} bare"], 0.98)
            )
    rows = [
        (
            name,
            f"{s['parameters'] / 1e9:.2f}",
            f"{s['tokens_per_second']:,.0f}",
            f"{s.get('mfu', math.nan):.1%}",
            f"{s['memory_gb']:.1f}",
            f"{s.get('reserved_gb', math.nan):.1f}",
            f"{s['step_seconds']:.3f}",
            f"{s['starting']:.0f}",
        )
        for name, s in results.items()
    ]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    columns = (
        "case",
        "B parameters",
        "tokens/s",
        "MFU",
        "GB allocated",
        "GB reserved",
        "s per step",
        f"first {STEADY} steps, s",
    )
    if rows:
        measure.show(f"{where}, torch {torch.__version__}", columns, rows)
    held = measure.report(claims, a.json) if claims else True
    return 0 if held and len(results) + ("exact" in names) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
