"""The memory of a layout by arithmetic alone, an independent check of sevenfold.plan.memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sevenfold.model import build
from sevenfold.plan import shape
from sevenfold.plan.layouts import Layout, micro_batches
from sevenfold.plan.memory import Memory, allocator, context, kept
from sevenfold.plan.shards import Shards, elements
from sevenfold.recipe import Recipe


@dataclass(frozen=True)
class _Block:
    """A block of a stack in the closed form.

    Attributes:
        parameters: Its parameters on a GPU that has gathered it.
        kept: Bytes of activations that it keeps for the backward pass.
        eager: Bytes of activations that it keeps without checkpointing or torch.compile.
    """

    parameters: float
    kept: float
    eager: float


def closed_form(recipe: Recipe, layout: Layout, vocab_size: int | None = None) -> Memory:
    """Returns the memory of one layout on a GPU by arithmetic alone, as a quick check of a trace.

    Attention is assumed to keep no probabilities (FlashAttention, arXiv 2205.14135). The
    activations of a block are counted as in arXiv 2205.05198, from the outputs of its matmuls: with
    full checkpointing it keeps its input, with selective checkpointing also these outputs
    (compiled: and the matmuls' inputs), else twice these outputs and the norms' float32 copies.

    Args:
        recipe: The recipe.
        layout: The layout.
        vocab_size: The size of the vocabulary if the recipe does not say it.
    """
    size = shape.vocabulary(recipe, vocab_size)
    shards = Shards.from_recipe(recipe, size, layout.shard, layout.tensor)
    item_bytes = 2 if recipe.train.dtype == "bfloat16" else 4
    parameters = shape.parameters(recipe, size)
    hidden = build.config_of(recipe, size).hidden_size
    lengths = shape.sides(recipe)

    activations = block_parameters = block_activations = 0.0
    for i, (name, depth) in enumerate(shape.blocks_of(recipe, size).items()):
        tokens = layout.micro_batch * lengths[min(i, len(lengths) - 1)]
        inside = [p for p in parameters if p.stack == name]
        block = _block(recipe, layout, inside, depth, tokens, hidden)
        activations += depth * block.kept
        block_parameters = max(block_parameters, block.parameters)
        block_activations = max(block_activations, block.eager)
    recomputed = block_activations if kept(recipe, layout) != "none" else 0.0

    counts = [elements(p, 1, layout.tensor) for p in parameters]
    outside = sum(n for n, p in zip(counts, parameters, strict=True) if p.stack is None)
    trained = sum(n for n, p in zip(counts, parameters, strict=True) if p.trained)
    trained_share = trained / sum(counts)
    tokens = layout.micro_batch * lengths[-1]
    has_logits = recipe.objective not in ("classify", "embed")
    logits = 12.0 * size * min(tokens, recipe.train.loss_chunk or tokens) * has_logits
    unsharded = 4.0 * trained * (micro_batches(recipe, layout) > 1)
    gathered = item_bytes * (outside + 2 * block_parameters)
    block_gradients = (item_bytes + 4) * block_parameters * trained_share
    embedding_gradients = 8.0 * outside * trained_share

    held, states = shards.parameters, shards.optimizer
    by_phase = (
        # In the loss.
        Memory(held, unsharded, states, activations, logits, gathered),
        # In the backward pass of the last block.
        Memory(held, unsharded, states, activations + recomputed, 0.0, gathered + block_gradients),
        # In the backward pass of the embedding.
        Memory(held, shards.gradients, states, embedding_gradients, 0.0, 0.0),
        # In the optimizer's step.
        Memory(held, shards.gradients, states, 0.0, 0.0, 0.0),
    )
    peak = max(by_phase, key=lambda m: m.total)
    return replace(peak, reserve=allocator(peak) + context(layout))


def _block(
    recipe: Recipe,
    layout: Layout,
    parameters: Sequence[shape.Parameter],
    depth: int,
    tokens: int,
    hidden: int,
) -> _Block:
    """Returns the mean block of a stack for the closed form.

    Args:
        recipe: The recipe.
        layout: The layout.
        parameters: The parameters of all blocks of the stack.
        depth: The number of blocks of the stack.
        tokens: Tokens per micro-batch that the stack reads.
        hidden: The model's width.
    """
    item_bytes = 2 if recipe.train.dtype == "bfloat16" else 4
    matrices = [p for p in parameters if len(p.shape) == 2]
    outputs = sum(p.shape[0] // (layout.tensor if p.split == 0 else 1) for p in matrices) / depth
    widest = max(p.shape[1] // (layout.tensor if p.split == 1 else 1) for p in matrices)
    compiled = recipe.train.compile and layout.activation_checkpointing == "none"
    inputs = 2 * hidden + widest if compiled else 0
    eager = tokens * (2 * item_bytes * outputs + 8 * hidden)
    by_checkpointing = {
        "full": item_bytes * tokens * hidden,
        "selective": item_bytes * tokens * (outputs + 2 * hidden + inputs),
    }
    return _Block(
        parameters=sum(elements(p, 1, layout.tensor) for p in parameters) / depth,
        kept=by_checkpointing.get(kept(recipe, layout), eager),
        eager=eager,
    )
