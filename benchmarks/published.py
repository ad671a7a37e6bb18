"""Compares the plan's throughput with published results and with our own measurements.

    python benchmarks/published.py        (prints the table; benchmarks/plan.py has it as claims)

Some rows were used to fit the plan's constants (`fitted`); the others were only compared later.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from sevenfold.plan import hardware, ops, speed
from sevenfold.plan.layouts import Layout
from sevenfold.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "torchtitan, docs/performance.md (2024)"
FOUNDRY = "LLM Foundry, scripts/train/benchmarking/README.md"
OURS = "benchmarks/RESULTS.md, On a GPU"
# transformers' configs of Llama 3.2 1B and Llama 3.1 8B (arXiv 2407.21783), and of
# jobs/recipes/llama-7b.yaml
LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 1.24B": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Llama 7B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "Llama 8B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
# MPT has GPT-2's shape (LLM Foundry, scripts/train/yamls/pretrain): width, blocks, heads
_MPT = {
    "760M": (1536, 24, 12),
    "1B": (2048, 24, 16),
    "3B": (2560, 32, 20),
    "7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
    "30B": (7168, 48, 56),
}
for _name, (_width, _blocks, _heads) in _MPT.items():
    MODELS[f"MPT {_name}"] = {
        "model_type": "gpt2",
        "n_embd": _width,
        "n_layer": _blocks,
        "n_head": _heads,
        "vocab_size": 50368,
        "activation_function": "gelu",
    }


@dataclass(frozen=True)
class Row:
    """A published or measured throughput.

    Attributes:
        source: Where it was published.
        model: A key of MODELS.
        gpu: The kind of GPU.
        gpus: The number of GPUs.
        length: Tokens per sequence.
        micro_batch: Sequences per micro-batch.
        micro_batches: Micro-batches per step and GPU.
        checkpointing: Activation checkpointing: none, selective, full, or half, which is
            torchtitan's and keeps attention and every second matmul.
        compiled: Whether the model was compiled.
        given: Tokens per second per GPU.
        fitted: Whether the plan's constants were fitted to this row.
        kernel: The attention kernel: flex, flash or triton (LLM Foundry's, of 2023).
        chunk: Tokens whose logits are in memory at once. None: all.
    """

    source: str
    model: str
    gpu: str
    gpus: int
    length: int
    micro_batch: int
    micro_batches: int
    checkpointing: str
    compiled: bool
    given: float
    fitted: bool = False
    kernel: str = "flash"
    chunk: int | None = None


ROWS = [
    Row(OURS, "Llama 1.24B", "h200-141gb", 1, 8192, 2, 1, "none", True, 45_905, True, "flex"),
    Row(OURS, "Llama 1.24B", "h200-141gb", 1, 8192, 2, 1, "none", True, 49_878, True),
    Row(OURS, "Llama 1.24B", "h200-141gb", 1, 8192, 2, 1, "none", False, 38_490, True, "flex"),
    # the recipe says selective, which had the effect of full: see plan.OURS
    Row(OURS, "Llama 7B", "h200-141gb", 1, 4096, 1, 1, "full", True, 7_412, False, "flex", 2048),
    Row(OURS, "Llama 8B", "h200-141gb", 1, 8192, 1, 1, "full", True, 6_926, True, "flex", 2048),
    Row(TITAN, "Llama 8B", "h100-96gb-500w", 8, 8192, 2, 1, "half", False, 5_762, True),
    Row(TITAN, "Llama 8B", "h100-96gb-500w", 8, 8192, 2, 1, "half", True, 6_667, True),
    Row(TITAN, "Llama 8B", "h100-96gb-500w", 128, 8192, 2, 1, "half", False, 5_605),
    Row(TITAN, "Llama 8B", "h100-96gb-500w", 128, 8192, 2, 1, "half", True, 6_514),
    Row(TITAN_A100, "Llama 8B", "a100-80gb", 64, 8192, 1, 1, "half", True, 2_973),
    Row(FOUNDRY, "MPT 7B", "a100-80gb", 8, 2048, 6, 2, "none", False, 4_641, True, "triton"),
    Row(FOUNDRY, "MPT 1B", "a100-80gb", 8, 2048, 14, 4, "none", False, 20_513, False, "triton"),
    Row(FOUNDRY, "MPT 3B", "a100-80gb", 8, 2048, 10, 2, "none", False, 10_811, False, "triton"),
    Row(FOUNDRY, "MPT 13B", "a100-80gb", 8, 2048, 2, 3, "none", False, 2_262, False, "triton"),
    Row(FOUNDRY, "MPT 7B", "a100-80gb", 8, 8192, 8, 2, "full", False, 3_206, False, "triton"),
    Row(FOUNDRY, "MPT 30B", "a100-80gb", 8, 2048, 3, 21, "full", False, 916, False, "triton"),
    Row(FOUNDRY, "MPT 7B", "a100-40gb", 128, 2048, 18, 1, "full", False, 3_623, False, "triton"),
    Row(FOUNDRY, "MPT 7B", "h100-80gb", 8, 2048, 6, 1, "none", False, 10_643, False, "triton"),
    Row(FOUNDRY, "MPT 1B", "h100-80gb", 8, 2048, 14, 1, "none", False, 45_455, False, "triton"),
    Row(FOUNDRY, "MPT 3B", "h100-80gb", 16, 2048, 10, 3, "none", False, 24_142, False, "triton"),
    Row(FOUNDRY, "MPT 13B", "h100-80gb", 8, 2048, 2, 1, "none", False, 4_792, False, "triton"),
    Row(FOUNDRY, "MPT 13B", "h100-80gb", 64, 2048, 2, 1, "none", False, 4_800, False, "triton"),
    Row(FOUNDRY, "MPT 7B", "h100-80gb", 8, 8192, 8, 2, "full", False, 6_935, True, "triton"),
    Row(FOUNDRY, "MPT 30B", "h100-80gb", 8, 2048, 3, 21, "full", False, 2_002, False, "triton"),
]


def recipe(row: Row) -> Recipe:
    batch = row.gpus * row.micro_batch * row.micro_batches
    return Recipe.model_validate(
        {
            "name": "published",
            "data": {"sources": [{"path": "text"}], "sequence_length": row.length, "lanes": batch},
            "tokenizer": {"path": "tokenizer"},
            "model": {"config": MODELS[row.model]},
            "train": {
                "steps": 1,
                "global_batch": batch,
                "micro_batch": row.micro_batch,
                "dtype": "bfloat16",
                "compile": row.compiled,
                "loss_chunk": row.chunk,
            },
            "cluster": {"num_workers": row.gpus, "gpus_per_worker": 1},
        }
    )


def fleet(row: Row) -> hardware.Fleet:
    """Returns the GPUs of a row, with eight per node.

    LLM Foundry's nodes of A100s are connected by 1,600 Gbit/s, all others by 3,200.
    """
    table = hardware.load()
    name = "h100-80gb" if row.gpu == "h100-96gb-500w" else row.gpu
    gpus = hardware.of_gpus(table, name, row.gpus)
    gpu = gpus.gpu
    # torchtitan's H100s have HBM2e and less power, which limits the speed of matmuls
    if row.gpu == "h100-96gb-500w":
        gpu = replace(gpu, bandwidth=2.4e12, gemm=TITANS_GEMM)
    if row.kernel != "flex":
        gpu = replace(gpu, attention=FLASH if row.kernel == "flash" else TRITON[gpu.name[0]])
    network = (1600 if gpu.name.startswith("a100") else 3200) * hardware.GBIT
    return replace(gpus, gpu=gpu, gpus_per_node=min(8, row.gpus), network=network)


TITANS_GEMM = 0.565  # fitted: 500 W instead of 700
# The share of the peak that torch's flash kernels reach, fitted to our row with
# model.attention=sdpa.
FLASH = 0.6
# The same for LLM Foundry's Triton kernels. On the A100 it is from the paper on FlashAttention-2
# (arXiv 2307.08691, figure 4); on the H100 it is fitted.
TRITON = {"a": 0.36, "h": 0.168}


def predicted(row: Row) -> speed.Speed:
    row_recipe, vocab_size = recipe(row), MODELS[row.model]["vocab_size"]
    kinds = ("selective", "full") if row.checkpointing == "half" else (row.checkpointing,)
    passes = [ops.count_operations(row_recipe, vocab_size, row.micro_batch, kind) for kind in kinds]
    operations = passes[0]
    if row.checkpointing == "half":
        full = passes[1].backward
        both = replace(
            operations.backward,
            matmul=(operations.backward.matmul + full.matmul) / 2,
            matmul_bytes=(operations.backward.matmul_bytes + full.matmul_bytes) / 2,
        )
        operations = replace(operations, backward=both)
    layout = Layout(row.gpus, 1, 1, row.micro_batch, row.checkpointing)
    tokens = row_recipe.train.global_batch * row.length
    return speed.speed_of_pass(
        operations,
        speed.size(row_recipe, vocab_size),
        layout,
        fleet(row),
        "bfloat16",
        row.compiled,
        row.micro_batches,
        tokens,
    )


def throughput() -> list[tuple[Row, float]]:
    """Returns each row with the plan's tokens per second per GPU."""
    return [(row, predicted(row).per_gpu) for row in ROWS]


def main() -> int:
    results = throughput()
    for row, estimate in results:
        parts = "  ".join(f"{k} {v:.3f}" for k, v in predicted(row).parts.items())
        print(
            f"{row.model:12} {row.gpus:4} x {row.gpu:15} {row.length:5} x {row.micro_batch:2} "
            f"{row.checkpointing:5} {'compiled' if row.compiled else 'eager':9}{row.given:9,.0f}"
            f"{estimate:9,.0f} {estimate / row.given - 1:+7.1%} "
            f"{'fitted' if row.fitted else '':7} {parts}"
        )
    for fitted in (True, False):
        errors = [
            abs(estimate / row.given - 1) for row, estimate in results if row.fitted is fitted
        ]
        print(
            f"{'fitted' if fitted else 'held out'}: {len(errors)} rows, largest error "
            f"{max(errors):.1%}, mean {sum(errors) / len(errors):.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
