"""What money trains: the largest compute-optimal decoder and its tokens, and which pretrained ones the GPUs can fine-tune."""

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

RATIO = 20  # tokens a parameter: Hoffmann et al. (arXiv 2203.15556), approach 1
# loss of N parameters and D tokens, E + A / N^a + B / D^b: Besiroglu et al. (arXiv 2404.10102), refit of Hoffmann's approach 3
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
LENGTH, VOCABULARY = 2048, 32_000
BATCH = 2**19  # tokens a step: GPT-3's of 1B to 3B (arXiv 2005.14165, table 2.1: 1M and 0.5M)
HEAD = 128  # width of a head; a block's width and the number of blocks go together: width / blocks = 128 (arXiv 2001.08361)
WIDTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 5120)
WEEK = 168.0  # hours that a run may take before more machines are taken

# pretrained decoders by size: parameters, width, blocks, vocabulary (their configs on Hugging Face)
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
LORA = 0.005  # of the parameters, that an adapter of rank 16 on all linear layers has: 42M of 8B
TUNED_LENGTH, CHUNK = 2048, 2048


@dataclass(frozen=True)
class Trained:
    """A model that the money trains: its config, where it runs, tokens and hours that it gets, loss by the law above (nats)."""

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
        """Tokens a parameter."""
        return self.tokens / self.size.parameters


def law(parameters: float, tokens: float) -> float:
    return E + A / parameters**ALPHA + B / tokens**BETA


def recipe_of(width: int, gpus: int) -> Recipe:
    """Of a Llama of this width, on so many GPUs."""
    rows = BATCH // LENGTH
    batch = rows if gpus <= rows else gpus
    config = {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": max(4, width // HEAD),
        "tie_word_embeddings": width <= 2048, "intermediate_size": 256 * round(width * 8 / 3 / 256),
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD, "vocab_size": VOCABULARY,
    }  # fmt: skip
    return Recipe.model_validate({
        "name": "budget", "data": {"sources": [{"path": "text"}], "sequence_length": LENGTH, "lanes": batch},
        "tokenizer": {"vocab_size": VOCABULARY}, "model": {"config": config},
        "train": {"steps": 1, "global_batch": batch, "micro_batch": 1, "dtype": "bfloat16",
                  "compile": True, "loss_chunk": CHUNK},
        "checkpoint": {"every": "auto"}, "cluster": {"num_workers": gpus, "gpus_per_worker": 1},
    })  # fmt: skip


def closed_form(
    parameters: float, width: int, blocks: int, vocabulary: int, gpus: int, rows: int, length: int, checkpointing: str,
    trained: float | None = None,
) -> float:  # fmt: skip
    """Bytes a GPU, of FSDP over so many: float32 shards of weights, gradients and moments, two gathered blocks and the output
    layer in bfloat16, activations (about 50 bytes a token, width and block; fully checkpointed 2, and one block's), logits of a
    chunk in float32 with their gradients, 3 GiB for CUDA, NCCL and the allocator. It is to sort out by: the plan of a recipe
    traces the model itself.

    Args:
        trained: parameters, of LoRA; None: all.
    """
    trained = parameters if trained is None else trained
    shards = (4 * parameters + 12 * trained) / gpus
    edge = 2.0 * width * vocabulary
    gathered = (2 * 2 * (parameters - edge) / blocks + 2 * edge) * (1 if gpus > 1 else 0.5)
    tokens = rows * length
    kept = 50 * width * tokens * blocks if checkpointing == "none" else 2 * width * tokens * blocks + 60 * width * tokens
    logits = 12.0 * min(CHUNK, tokens) * vocabulary
    return shards + gathered + kept + logits + 3 * GIB


def train(usd: float, fleets: Sequence[Fleet]) -> list[Trained]:
    """For each width that fits, on the cheapest of the fleets, all the money spent: smallest first.

    Raises InputError: no money, no known price, nothing fits.
    """
    if not usd > 0:
        raise InputError(f"--budget: expected an amount above 0, found {usd:g}")
    priced = [f for f in fleets if f.hourly is not None]
    if not priced:
        raise InputError(f"--budget: no price is known: {fleets[0].priced}; give one by --hardware")
    out: list[Trained] = []
    for width in WIDTHS:
        if out and out[-1].ratio < 1:  # far past both optima
            break
        found = [made for fleet in priced if (made := _trained(usd, width, fleet)) is not None]
        if found:
            out.append(max(found, key=lambda t: t.tokens))
    if not out:
        gpu = priced[0].gpu
        speed.check(gpu, "bfloat16")
        raise InputError(
            f"--budget: not even a decoder of width {WIDTHS[0]} fits {gpu.name} of {gpu.memory / GIB:.1f} GiB in bfloat16"
        )
    return out


def _trained(usd: float, width: int, fleet: Fleet) -> Trained | None:
    """On as few machines as hold it and are done within a week."""
    found = None
    for nodes in _counts(fleet):
        part = fleet.of(min(fleet.gpus, nodes * fleet.gpus_per_node))
        made = _on(usd, width, part)
        if made is None:
            continue
        found = made
        if made.hours <= WEEK:
            break
    return found


def _counts(fleet: Fleet) -> list[int]:
    return sorted({min(fleet.nodes, 2**i) for i in range(12)})


def _on(usd: float, width: int, fleet: Fleet) -> Trained | None:
    recipe = recipe_of(width, fleet.gpus)
    if "bfloat16" not in fleet.gpu.flops:
        return None
    made = speed.size(recipe, VOCABULARY)
    rows = recipe.train.global_batch // fleet.gpus
    best = None
    for how in ("none", "full"):
        for micro_batch in (8, 4, 2, 1):
            need = closed_form(made.parameters, width, made.blocks, VOCABULARY, fleet.gpus, micro_batch, LENGTH, how)
            if micro_batch <= max(1, rows) and need <= fleet.gpu.memory:
                layout = Layout(fleet.gpus, 1, 1, micro_batch, how)
                said = speed.estimate(recipe, VOCABULARY, layout, fleet)
                if best is None or said.tokens > best[1].tokens:
                    best = layout, said
                break
    if best is None:
        return None
    layout, said = best
    assert fleet.usd_per_hour is not None
    hours = usd / fleet.usd_per_hour
    lasting = cost.cost(recipe, made, said, layout, fleet).effective
    tokens = hours * 3600 * lasting * said.tokens
    return Trained(recipe.model.config or {}, made, fleet, layout, said, tokens, hours, law(made.parameters, tokens))


def optimum(found: Sequence[Trained]) -> tuple[tuple[float, float], tuple[float, float]]:
    """(parameters, tokens) that the money makes best: where tokens are 20 a parameter, and where the law's loss is least;
    between the sizes looked at tokens are a power of parameters. At an end of these sizes: that end."""
    points = [(math.log(t.size.parameters), math.log(t.tokens)) for t in found]

    def tokens(x: float) -> float:
        if len(points) == 1:
            return points[0][1]
        k = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[k - 1], points[k]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    low, high, steps = points[0][0], points[-1][0], 2000
    grid = [low + (high - low) * i / steps for i in range(steps + 1)]
    first = min(grid, key=lambda x: abs(tokens(x) - x - math.log(RATIO)))
    second = min(grid, key=lambda x: law(math.exp(x), math.exp(tokens(x))))
    return (math.exp(first), math.exp(tokens(first))), (math.exp(second), math.exp(tokens(second)))


@dataclass(frozen=True)
class Tuned:
    """GPUs that a pretrained model needs, whole and with LoRA, fully checkpointed; None: more than there are."""

    name: str
    parameters: float
    whole: int | None
    adapter: int | None


def tune(fleet: Fleet) -> list[Tuned]:
    """Of each pretrained size, by the closed form: one row of 2,048 tokens a GPU."""
    counts = sorted({*(n for n in (1, 2, 4, 8) if n <= min(fleet.gpus, fleet.gpus_per_node)),
                     *(n * fleet.gpus_per_node for n in _counts(fleet) if n * fleet.gpus_per_node <= fleet.gpus)})  # fmt: skip

    def fewest(name: str, trained: float | None) -> int | None:
        parameters, width, blocks, vocabulary = PRETRAINED[name]
        need = ((n, closed_form(parameters, width, blocks, vocabulary, n, 1, TUNED_LENGTH, "full", trained)) for n in counts)
        return next((n for n, b in need if b <= fleet.gpu.memory), None)

    return [Tuned(n, p[0], fewest(n, None), fewest(n, LORA * p[0])) for n, p in PRETRAINED.items()]
