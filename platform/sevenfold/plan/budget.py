"""What a budget in USD can train.

`train` and `optimum` give the compute-optimal decoder to pretrain, `tune` the pretrained models
that can be fine-tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sevenfold.errors import InputError
from sevenfold.plan import cost, speed
from sevenfold.plan.hardware import GIB, Fleet
from sevenfold.plan.layouts import Layout
from sevenfold.plan.speed import Size, Speed
from sevenfold.recipe import Recipe

# Compute-optimal tokens per parameter: Hoffmann et al. (arXiv 2203.15556), approach 1.
TOKENS_PER_PARAMETER = 20
# The loss of N parameters trained on D tokens is E + A / N^ALPHA + B / D^BETA: the refit of
# Hoffmann's approach 3 by Besiroglu et al. (arXiv 2404.10102).
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
SEQUENCE_LENGTH, VOCABULARY = 2048, 32_000
# GPT-3 used 1M and 0.5M tokens per step for its models of 1B to 3B (arXiv 2005.14165, table 2.1).
TOKENS_PER_STEP = 2**19
# The width of an attention head. It is also the ratio of a model's width to its number of blocks
# (arXiv 2001.08361).
HEAD_WIDTH = 128
WIDTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 5120)
MAX_HOURS = 168.0  # a run that would take longer than a week gets more machines

# Pretrained decoders: parameters, width, blocks, vocabulary (from their configs on Hugging Face).
PRETRAINED: dict[str, tuple[float, int, int, int]] = {
    "SmolLM2 135M": (0.135e9, 576, 30, 49_152),
    "SmolLM2 360M": (0.362e9, 960, 32, 49_152),
    "Qwen3 0.6B": (0.596e9, 1024, 28, 151_936),
    "Llama 3.2 1B": (1.236e9, 2048, 16, 128_256),
    "Qwen3 1.7B": (1.721e9, 2048, 28, 151_936),
    "Llama 3.2 3B": (3.213e9, 3072, 28, 128_256),
    "Qwen3 4B": (4.022e9, 2560, 36, 151_936),
    "Mistral 7B": (7.248e9, 4096, 32, 32_768),
    "Llama 3.1 8B": (8.030e9, 4096, 32, 128_256),
    "Qwen3 14B": (14.768e9, 5120, 40, 151_936),
    "Qwen3 32B": (32.762e9, 5120, 64, 151_936),
    "Llama 3.3 70B": (70.554e9, 8192, 80, 128_256),
}
# The size of a LoRA adapter of rank 16 on all linear layers, as a share of the model's parameters:
# 42M of 8B.
LORA_SHARE = 0.005
TUNED_LENGTH, LOSS_CHUNK = 2048, 2048


@dataclass(frozen=True)
class Trained:
    """A model that the budget can pretrain.

    Attributes:
        config: The model's transformers config.
        size: Its parameters and FLOPs.
        fleet: The machines to train on.
        layout: How the model is distributed over their GPUs.
        speed: The estimated speed with this layout.
        tokens: Tokens that the budget pays for.
        hours: Hours that the budget pays for.
        loss: The loss that the scaling law predicts, in nats per token.
    """

    config: dict[str, Any]
    size: Size
    fleet: Fleet
    layout: Layout
    speed: Speed
    tokens: float
    hours: float
    loss: float

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.size.parameters


def predicted_loss(parameters: float, tokens: float) -> float:
    """Returns the loss that the scaling law predicts, in nats per token."""
    return E + A / parameters**ALPHA + B / tokens**BETA


def _recipe(width: int, gpus: int) -> Recipe:
    """Returns the recipe of a Llama of this width on this number of GPUs."""
    sequences = TOKENS_PER_STEP // SEQUENCE_LENGTH
    global_batch = sequences if gpus <= sequences else gpus
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": max(4, width // HEAD_WIDTH),
        "tie_word_embeddings": width <= 2048,
        "intermediate_size": 256 * round(width * 8 / 3 / 256),
        "num_attention_heads": width // HEAD_WIDTH,
        "num_key_value_heads": width // HEAD_WIDTH,
        "vocab_size": VOCABULARY,
    }
    return Recipe.model_validate(
        {
            "name": "budget",
            "data": {
                "sources": [{"path": "text"}],
                "sequence_length": SEQUENCE_LENGTH,
                "lanes": global_batch,
            },
            "tokenizer": {"vocab_size": VOCABULARY},
            "model": {"config": config},
            "train": {
                "steps": 1,
                "global_batch": global_batch,
                "micro_batch": 1,
                "dtype": "bfloat16",
                "compile": True,
                "loss_chunk": LOSS_CHUNK,
            },
            "checkpoint": {"every": "auto"},
            "cluster": {"num_workers": gpus, "gpus_per_worker": 1},
        }
    )


def memory_estimate(
    parameters: float,
    width: int,
    blocks: int,
    vocabulary: int,
    gpus: int,
    micro_batch: int,
    length: int,
    checkpointing: str,
    trained: float | None = None,
) -> float:
    """Returns an estimate of the bytes on each GPU under FSDP, from a model's dimensions alone.

    It is the sum of
    - float32 shards of weights, gradients and AdamW's two moments;
    - two gathered blocks and both embedding matrices in bfloat16;
    - activations: about 50 bytes per token, unit of width and block; with full checkpointing 2
      bytes, and those of one block;
    - float32 logits of one chunk, with their gradients;
    - 3 GiB for CUDA, NCCL and the allocator.

    It only serves to rule out what cannot fit: the plan of a recipe traces the model itself
    (plan.memory).

    Args:
        parameters: The number of parameters.
        width: The hidden size.
        blocks: The number of transformer blocks.
        vocabulary: The size of the vocabulary.
        gpus: GPUs that the parameters are sharded over.
        micro_batch: Sequences per micro-batch.
        length: Tokens per sequence.
        checkpointing: Activation checkpointing: none or full.
        trained: The number of trained parameters, with LoRA; None if all are trained.
    """
    trained = parameters if trained is None else trained
    shards = (4 * parameters + 12 * trained) / gpus
    embeddings = 2.0 * width * vocabulary
    gathered = (2 * 2 * (parameters - embeddings) / blocks + 2 * embeddings) * (
        1 if gpus > 1 else 0.5
    )
    tokens = micro_batch * length
    activations = (
        50 * width * tokens * blocks
        if checkpointing == "none"
        else 2 * width * tokens * blocks + 60 * width * tokens
    )
    logits = 12.0 * min(LOSS_CHUNK, tokens) * vocabulary
    return shards + gathered + activations + logits + 3 * GIB


def train(usd: float, fleets: Sequence[Fleet]) -> list[Trained]:
    """Returns what the budget pretrains for each width that fits, smallest first.

    Each model spends the whole budget, on the fleet that trains it on the most tokens.

    Args:
        usd: The budget.
        fleets: The fleets to choose from.

    Raises:
        InputError: The budget is not above 0, no price is known, or nothing fits.
    """
    if not usd > 0:
        raise InputError(f"--budget: expected an amount above 0, found {usd:g}")
    priced = [fleet for fleet in fleets if fleet.hourly is not None]
    if not priced:
        raise InputError(
            f"--budget: no price is known ({fleets[0].price_source}); set one with --hardware FILE"
        )
    results: list[Trained] = []
    for width in WIDTHS:
        # Below one token per parameter a model is far beyond both optima.
        if results and results[-1].ratio < 1:
            break
        options = [
            result for fleet in priced if (result := _trained(usd, width, fleet)) is not None
        ]
        if options:
            results.append(max(options, key=lambda t: t.tokens))
    if not results:
        gpu = priced[0].gpu
        speed.require_dtype(gpu, "bfloat16")
        raise InputError(
            f"--budget: even the smallest decoder (width {WIDTHS[0]}, bfloat16) does not fit on "
            f"{gpu.name} with {gpu.memory / GIB:.1f} GiB"
        )
    return results


def _trained(usd: float, width: int, fleet: Fleet) -> Trained | None:
    """Uses as few machines as hold the model and finish within a week; None if it does not fit."""
    result = None
    for nodes in _node_counts(fleet):
        part = fleet.with_gpus(min(fleet.gpus, nodes * fleet.gpus_per_node))
        larger = _trained_on(usd, width, part)
        if larger is None:
            continue
        result = larger
        if result.hours <= MAX_HOURS:
            break
    return result


def _node_counts(fleet: Fleet) -> list[int]:
    """Returns powers of two up to the number of nodes, and that number."""
    return sorted({min(fleet.nodes, 2**i) for i in range(12)})


def _trained_on(usd: float, width: int, fleet: Fleet) -> Trained | None:
    """Uses all GPUs of the fleet; None if the model does not fit."""
    recipe = _recipe(width, fleet.gpus)
    if "bfloat16" not in fleet.gpu.flops:
        return None
    size = speed.size(recipe, VOCABULARY)
    fastest = _fastest_layout(recipe, size, fleet)
    if fastest is None:
        return None
    layout, estimate = fastest
    assert fleet.usd_per_hour is not None
    hours = usd / fleet.usd_per_hour
    goodput = cost.cost(recipe, size, estimate, layout, fleet).goodput
    tokens = hours * 3600 * goodput * estimate.tokens
    return Trained(
        config=recipe.model.config or {},
        size=size,
        fleet=fleet,
        layout=layout,
        speed=estimate,
        tokens=tokens,
        hours=hours,
        loss=predicted_loss(size.parameters, tokens),
    )


def _fastest_layout(recipe: Recipe, size: Size, fleet: Fleet) -> tuple[Layout, Speed] | None:
    """Returns the fastest layout that fits, without tensor parallelism; None if none fits.

    It compares no and full checkpointing, each with the largest micro-batch that fits.
    """
    sequences = recipe.train.global_batch // fleet.gpus
    fastest = None
    for checkpointing in ("none", "full"):
        for micro_batch in (8, 4, 2, 1):
            needed = memory_estimate(
                size.parameters,
                size.hidden,
                size.blocks,
                VOCABULARY,
                fleet.gpus,
                micro_batch,
                SEQUENCE_LENGTH,
                checkpointing,
            )
            if micro_batch <= max(1, sequences) and needed <= fleet.gpu.memory:
                layout = Layout(fleet.gpus, 1, 1, micro_batch, checkpointing)
                estimate = speed.estimate(recipe, VOCABULARY, layout, fleet)
                if fastest is None or estimate.tokens > fastest[1].tokens:
                    fastest = layout, estimate
                break
    return fastest


def optimum(found: Sequence[Trained]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the two compute-optimal points of a budget, each as (parameters, tokens).

    The first is where the budget gives 20 tokens per parameter, the second where the scaling law's
    loss is lowest. Between the sizes in `found` the tokens are interpolated as a power law of the
    parameters. An optimum that lies outside of these sizes is moved to the nearest of them.

    Args:
        found: The result of `train`.
    """
    points = [(math.log(t.size.parameters), math.log(t.tokens)) for t in found]

    def log_tokens(x: float) -> float:
        """Interpolates linearly between the logarithms."""
        if len(points) == 1:
            return points[0][1]
        k = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[k - 1], points[k]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    low, high, steps = points[0][0], points[-1][0], 2000
    grid = [low + (high - low) * i / steps for i in range(steps + 1)]
    by_ratio = min(grid, key=lambda x: abs(log_tokens(x) - x - math.log(TOKENS_PER_PARAMETER)))
    by_loss = min(grid, key=lambda x: predicted_loss(math.exp(x), math.exp(log_tokens(x))))
    return (
        (math.exp(by_ratio), math.exp(log_tokens(by_ratio))),
        (math.exp(by_loss), math.exp(log_tokens(by_loss))),
    )


@dataclass(frozen=True)
class Tuned:
    """The number of GPUs needed to fine-tune a pretrained model, with full checkpointing.

    Attributes:
        name: The model.
        parameters: Its number of parameters.
        whole: GPUs to train all parameters; None if the fleet has too few.
        adapter: GPUs to train a LoRA adapter; None if the fleet has too few.
    """

    name: str
    parameters: float
    whole: int | None
    adapter: int | None


def tune(fleet: Fleet) -> list[Tuned]:
    """Returns the GPUs that each pretrained model needs, with one sequence of 2,048 tokens per GPU.

    The memory comes from `memory_estimate`.
    """
    within_node = [n for n in (1, 2, 4, 8) if n <= min(fleet.gpus, fleet.gpus_per_node)]
    whole_nodes = [nodes * fleet.gpus_per_node for nodes in _node_counts(fleet)]
    counts = sorted({*within_node, *(n for n in whole_nodes if n <= fleet.gpus)})

    def fewest(name: str, trained: float | None) -> int | None:
        parameters, width, blocks, vocabulary = PRETRAINED[name]
        for gpus in counts:
            needed = memory_estimate(
                parameters, width, blocks, vocabulary, gpus, 1, TUNED_LENGTH, "full", trained
            )
            if needed <= fleet.gpu.memory:
                return gpus
        return None

    return [
        Tuned(
            name=name,
            parameters=parameters,
            whole=fewest(name, None),
            adapter=fewest(name, LORA_SHARE * parameters),
        )
        for name, (parameters, *_) in PRETRAINED.items()
    ]
