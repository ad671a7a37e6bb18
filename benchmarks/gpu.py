"""The training step on one GPU, without Ray: that it computes what the CPU does, how fast it is, and what it takes.

    python benchmarks/gpu.py [--only CASES] [--json FILE] [--quick] [--list]

Each case is a process of its own. Rows are random tokens, one document each where nothing else is said. The bare loop is
transformers' model, FSDP2, AdamW and nothing else. --quick: the same with small models, on a CPU where there is no GPU.
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
# transformers' configs of Llama 3.2 1B and Llama 3.1 8B (arXiv 2407.21783), and of jobs/recipes/llama-7b.yaml
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
MODELS: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8},
}  # fmt: skip
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
    rows: int  # a step, one micro-batch
    compiled: bool
    checkpointing: str = "none"
    bare: bool = False
    document: int | None = None  # mean tokens of one; None: as long as the row
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
STEPS, STEADY = 10, 4  # steps in all, and those at the start that do not count
OBJECTIVES = ("causal", "sft", "dpo", "classify", "masked", "embed", "denoise", "seq2seq")


@contextlib.contextmanager
def alone() -> Iterator[Any]:
    """A process group of this process; yields its device."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as at:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"file://{at}/store", rank=0, world_size=1
        )
        try:
            yield torch.device("cuda", 0) if cuda else torch.device("cpu")
        finally:
            dist.destroy_process_group()


def rows_of(count: int, length: int, vocabulary: int, document: int | None, seed: int, answers: bool = False) -> Any:
    """Rows of random tokens. answers: the latter half of each document is what is asked for."""
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
            at = np.flatnonzero(row)
            row[at[1:][np.diff(at) < 8]] = False
            edges = [*np.flatnonzero(row).tolist(), length]
            for a, b in itertools.pairwise(edges):
                targets[i, (a + b) // 2 : b] = True
    return Rows(tokens, np.nonzero(begins)[1].astype(np.int32), np.full(count, length, np.int32), targets)


def random_weights(model: Any) -> None:
    """Written on the device: drawing 8B numbers on the host takes longer than all the rest."""
    import torch
    from torch.distributed.tensor import DTensor

    for p in model.parameters():
        shard = p.to_local() if isinstance(p, DTensor) else p
        with torch.no_grad():
            shard.fill_(1.0) if p.ndim == 1 else shard.normal_(0, 0.02)


# Speed and memory


def recipe_of(case: Case, quick: bool) -> Any:
    from sevenfold.recipe import Adapter, Recipe

    model = {"config": LLAMA | (SMALL if quick else MODELS[case.model]), "attention": case.attention}
    train = {
        "global_batch": case.rows, "micro_batch": case.rows, "steps": STEPS, "dtype": "bfloat16", "loss_chunk": case.loss_chunk,
        "compile": case.compiled, "activation_checkpointing": case.checkpointing,
    }  # fmt: skip
    data = {"sources": [{"path": "none"}], "sequence_length": 256 if quick else case.length}
    recipe = Recipe.model_validate(
        {"name": "gpu", "seed": 1, "model": model, "tokenizer": {"path": "none"}, "data": data, "train": train}
    )
    # not in the tree: a recipe that is read asks for a base to adapt
    return recipe.model_copy(update={"adapter": Adapter(rank=16, alpha=32)}) if case.adapter else recipe


def speed(case: Case, quick: bool) -> dict[str, Any]:
    import torch
    import transformers

    from sevenfold.engine import objectives, optim
    from sevenfold.engine.batch import micro_batches
    from sevenfold.engine.meter import Meter
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel

    if not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):  # its name before transformers 5.2x
        transformers.PreTrainedModel.activation_checkpointing_enable = lambda self, activation_checkpointing_kwargs: (
            self.gradient_checkpointing_enable(gradient_checkpointing_kwargs=activation_checkpointing_kwargs)
        )
    recipe = recipe_of(case, quick)
    vocabulary, length = 512 if quick else case.vocabulary, recipe.data.sequence_length
    with alone() as device:
        config = build.config_of(recipe, vocabulary)
        kernel = "sdpa" if case.bare else build.attention(recipe, device, config)
        model: Any = build.build(recipe, config, weights=False, attention=kernel)
        if case.adapter:
            build.with_adapter(model, recipe)
        flops = build.flops_per_token(model, recipe)
        if case.bare:
            model = _sharded_by_hand(model, device, case)
        else:
            objectives.attach(model, objectives.Causal(objectives.Words(vocabulary), 0, 0.15, 3), recipe.train.loss_chunk)
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
            drawn = rows_of(case.rows, length, vocabulary, case.document, step)
            (batch,) = micro_batches(drawn, case.rows, 1, objectives.to_batch, device)
            if case.bare:
                loss = _step_by_hand(model, batch, optimizers[0])
            else:
                loss = train_step(model, [batch], optimizers, 1e-4, 1.0).loss
            meter.add(case.rows * length, 0.0, 0.0)
        out = meter.read() | {"loss": loss, "starting": starting, "parameters": sum(p.numel() for p in model.parameters())}
        if device.type == "cuda":
            out["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return out


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
    """Of each objective, how far its losses over some steps on the GPU, in float32, are from the CPU's: relative."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with alone() as device:
        out = {}
        for objective in OBJECTIVES:
            here, there = (_losses(objective, d) for d in (torch.device("cpu"), device))
            out[objective] = max(abs(a / b - 1) for a, b in zip(here, there, strict=True))
            print(objective, here[-1], there[-1], file=sys.stderr, flush=True)
        if device.type == "cuda":
            both = [_losses("causal", device, dtype=d, compile=d == "bfloat16") for d in ("float32", "bfloat16")]
            out["bfloat16, compiled"] = max(abs(a / b - 1) for a, b in zip(*both, strict=True))
    return out


def _losses(objective: str, device: Any, **train: Any) -> list[float]:
    from sevenfold.engine import objectives, optim, tuning
    from sevenfold.engine.batch import micro_batches
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel
    from sevenfold.recipe import Recipe

    vocabulary, length, count = 512, 256, 8
    sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {"initializer_range": 0.1}
    config = {
        "masked": {"model_type": "modernbert", **sizes, "pad_token_id": 2},
        "denoise": {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    }  # fmt: skip
    config |= {"embed": config["masked"], "classify": config["masked"], "seq2seq": config["denoise"]}
    train |= {"global_batch": count, "micro_batch": count // 2, "steps": 6, "dropout": 0.0 if objective in config else None}
    classes = list("abc") if objective == "classify" else []
    tree = {
        "name": "gpu", "seed": 1, "objective": "sft" if objective == "dpo" else objective, "train": train,
        "model": {"config": config.get(objective, LLAMA | sizes)}, "tokenizer": {"path": "none"},
        "data": {"sources": [{"path": "none"}], "sequence_length": length, "classes": classes},
    }  # fmt: skip
    recipe = Recipe.model_validate(tree)
    words = objectives.Words(vocabulary, special=tuple(range(24)), mask=3, sentinels=tuple(range(4, 24)), pad=2, end=1, start=2)
    made = tuning.OBJECTIVES[objective](words, 1, 0.3, 3.0)
    settings = build.config_of(recipe, vocabulary)
    built = [build.build(recipe, settings, weights=True, attention=build.attention(recipe, device, settings)) for _ in range(2)]
    model, reference = built
    objectives.attach(model, made)
    if isinstance(made, tuning.Preference):
        objectives.attach(reference, objectives.Causal(words, 1, 0.3, 3.0))
        made.reference = parallel.shard(reference.requires_grad_(False), device, recipe.train).eval()
    model = parallel.shard(model, device, recipe.train)
    optimizers = optim.build(model, recipe.optimizer)
    model.train()
    out = []
    for step in range(6):
        drawn = rows_of(count, length, vocabulary, 64, step % 2, answers=objective not in ("causal", "masked", "denoise"))
        if objective == "classify":
            drawn.tokens[drawn.targets] %= 3
            drawn.targets[:] = False
            drawn.tokens.reshape(-1)[drawn.edges[1:] - 1] %= 3
        if objective == "dpo":
            drawn.targets = _pairs(drawn)
        batches = micro_batches(drawn, count // 2, 2, lambda rows, step=step: made.collate(rows, step), device)
        out.append(train_step(model, batches, optimizers, 1e-3, 1.0).loss)
    return out


def _pairs(rows: Any) -> Any:
    """Targets of two answers a document: prompt, answer, prompt, answer, a quarter each."""
    import numpy as np

    targets, edges = np.zeros(rows.tokens.size, bool), rows.edges.tolist()
    for a, b in itertools.pairwise(edges):
        quarter = (b - a) // 4
        targets[a + quarter : a + 2 * quarter] = targets[a + 3 * quarter : b] = True
        rows.tokens.reshape(-1)[a + 2 * quarter : a + 3 * quarter] = rows.tokens.reshape(-1)[a : a + quarter]
    return targets.reshape(rows.tokens.shape)


# The report


def in_process(name: str, quick: bool) -> dict[str, Any] | None:
    print(f"{name}...", file=sys.stderr, flush=True)
    words = [sys.executable, str(HERE), "--case", name, *["--quick"] * quick]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name}: failed with status {done.returncode}", file=sys.stderr, flush=True)
        return None
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    print(found, file=sys.stderr, flush=True)
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", help="cases, separated by semicolons; exact is one of them")
    p.add_argument("--json", type=Path)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--list", action="store_true")
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
        print("benchmarks/gpu.py: no GPU is here; --quick runs it small, on the CPU", file=sys.stderr)
        return 2
    names = a.only.split(";") if a.only else ["exact", *CASES]
    found = {name: seen for name in names if (seen := in_process(name, a.quick))}
    claims = []
    if off := found.pop("exact", None):
        claims += [
            measure.claim(f"as the CPU: {k}", v, None, 1e-2 if "bfloat16" in k else 1e-4, at_most=True) for k, v in off.items()
        ]
    rate = {name: seen["tokens_per_second"] for name, seen in found.items()}
    for name in rate:
        if f"{name} bare" in rate:
            claims.append(measure.claim(f"{name}: vs_bare_loop", rate[name], rate[f"{name} bare"], 0.98))
    rows = [
        (name, f"{s['parameters'] / 1e9:.2f}", f"{s['tokens_per_second']:,.0f}", f"{s.get('mfu', math.nan):.1%}",
         f"{s['memory_gb']:.1f}", f"{s.get('reserved_gb', math.nan):.1f}", f"{s['step_seconds']:.3f}", f"{s['starting']:.0f}")
        for name, s in found.items()
    ]  # fmt: skip
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    columns = ("case", "B parameters", "tokens/s", "MFU", "GB allocated", "GB reserved", "s a step", f"first {STEADY} steps, s")
    if rows:
        measure.show(f"{where}, torch {torch.__version__}", columns, rows)
    held = measure.report(claims, a.json) if claims else True
    return 0 if held and len(found) + ("exact" in names) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
