"""Counts the operations of a micro-batch by running the model itself on fake tensors.

Forward and backward run without allocating memory or computing anything. Only few blocks and
sequences are run: what each further one adds follows from the differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

# FakeTensorMode is private, but there is no public alternative; constraints.txt pins torch.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sevenfold.engine.objectives import Causal, Denoise, Masked, SpecialTokens, attach_losses
from sevenfold.model import build, parallel
from sevenfold.plan import shape
from sevenfold.recipe import Recipe

# Attention without a mask: FlexAttention's block mask, which separates documents, costs next to
# nothing.
_ATTENTION = "sdpa_without_mask"
aten = torch.ops.aten
_MATMULS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# Operations that do not touch memory.
_NO_MEMORY = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
}
# Operations that write their result and read nothing.
_WRITE_ONLY = {
    "zeros",
    "full",
    "zeros_like",
    "fill_",
    "zero_",
    "new_zeros",
    "ones",
    "ones_like",
    "arange",
}


@dataclass(frozen=True)
class Work:
    """The operations of a part of a step.

    Attributes:
        matmul: FLOPs of matrix multiplications.
        attention: FLOPs of attention.
        matmul_bytes: Bytes that matrix multiplications read and write.
        bytes: Bytes that all other operations read and write, each on its own (without
            torch.compile).
        kernels: The number of operations.
    """

    matmul: float = 0.0
    attention: float = 0.0
    matmul_bytes: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    def __mul__(self, factor: float) -> Work:
        return Work(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True)
class Pass:
    """The forward and backward pass of a micro-batch.

    Attributes:
        forward: The forward pass of all blocks.
        backward: The backward pass of all blocks, including what checkpointing recomputes.
        rest_forward: The forward pass of everything outside of the blocks.
        rest_backward: The backward pass of everything outside of the blocks.
    """

    forward: Work
    backward: Work
    rest_forward: Work
    rest_backward: Work

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Pass:
        return Pass(*(getattr(self, f.name) * factor for f in fields(self)))


def count_operations(recipe: Recipe, vocab_size: int, micro_batch: int, checkpointing: str) -> Pass:
    """Returns the operations of a micro-batch on one GPU, without tensor parallelism.

    Args:
        recipe: The recipe.
        vocab_size: The size of the vocabulary.
        micro_batch: Sequences per micro-batch.
        checkpointing: Activation checkpointing: none, selective or full.
    """
    key = shape.Key(recipe, vocab_size)
    # A single sequence is counted separately: it lacks some operations that several have.
    if micro_batch == 1:
        return _count(key, 1, checkpointing)
    two, three = (_count(key, rows, checkpointing) for rows in (2, 3))
    return two + (three + two * -1) * (micro_batch - 2)


@functools.lru_cache(maxsize=64)
def _count(key: shape.Key, rows: int, checkpointing: str) -> Pass:
    """Counts operations at the recipe's depth, from models with one and two blocks per stack."""
    recipe, vocab_size = key.recipe, key.vocab_size
    depths = shape.depths(build.config_of(recipe, vocab_size))
    one_each = dict.fromkeys(depths, 1)
    base_forward, base_backward = _run(recipe, vocab_size, one_each, rows, checkpointing)
    rest_forward, rest_backward = base_forward, base_backward
    blocks_forward, blocks_backward = Work(), Work()
    for name, count in depths.items():
        deeper = _run(recipe, vocab_size, one_each | {name: 2}, rows, checkpointing)
        block_forward, block_backward = deeper[0] - base_forward, deeper[1] - base_backward
        blocks_forward = blocks_forward + block_forward * count
        blocks_backward = blocks_backward + block_backward * count
        rest_forward = rest_forward - block_forward
        rest_backward = rest_backward - block_backward
    return Pass(blocks_forward, blocks_backward, rest_forward, rest_backward)


def _run(
    recipe: Recipe, vocab_size: int, layers: Mapping[str, int], rows: int, checkpointing: str
) -> tuple[Work, Work]:
    """Returns the operations (forward, backward) of a model with these numbers of blocks."""
    config = shape.config_at(recipe, vocab_size, dict(layers))
    # With dropout the CPU's attention is not one operation but many.
    for name in build.dropouts(config):
        setattr(config, name, 0.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = build.build(recipe, config, weights=False)
        if recipe.adapter is not None:
            shape.add_adapter(model, recipe)
        _cast(model, parallel.DTYPES[recipe.train.dtype])
        model.train()
        if (
            build.MODEL_CLASSES[recipe.objective][1] == "decoder"
            and model._can_set_attn_implementation()
        ):
            model.set_attn_implementation(_ATTENTION)
        parallel.recompute(model, checkpointing)
        losses = _losses(recipe, model, rows)
        with _Counter() as counter:
            total = losses().sum()
            forward = counter.work
            total.backward()
    return forward, counter.work - forward


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters as FSDP does when it gathers them; tied parameters stay tied."""
    cast_of: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                cast_of.setdefault(id(p), nn.Parameter(p.detach().to(dtype), p.requires_grad))
                module._parameters[name] = cast_of[id(p)]


def _losses(recipe: Recipe, model: Any, rows: int) -> Callable[[], torch.Tensor]:
    """Returns a function that computes the losses of full sequences, one document each."""
    length, train = recipe.data.sequence_length, recipe.train
    if recipe.objective in ("classify", "embed"):

        def losses_of_padded() -> torch.Tensor:
            # The counter also counts how these ids are made.
            ids = torch.zeros(rows, length, dtype=torch.int64)
            outputs: torch.Tensor = next(iter(model(input_ids=ids).values()))
            return outputs.float().square()

        return losses_of_padded
    kinds = {"masked": Masked, "denoise": Denoise, "seq2seq": Denoise}
    objective = kinds.get(recipe.objective, Causal)(SpecialTokens(0), 0, 0.0, 1.0)
    if isinstance(objective, Denoise):
        batch = shape.encoder_decoder_batch(rows, *_mean_lengths(recipe))
    else:
        batch = shape.token_batch(rows, length)
    losses = attach_losses(
        model, objective, train.loss_chunk, train.z_loss, train.label_smoothing, cpu_logits=None
    )
    return lambda: losses(batch)


def _mean_lengths(recipe: Recipe) -> tuple[int, int]:
    """Returns the mean tokens per sequence of encoder and decoder.

    Time depends on the mean, memory on the most: for that see shape.sides.
    """
    length = recipe.data.sequence_length
    if recipe.objective == "seq2seq":
        return length - length // 2, length // 2
    rate, span = recipe.corruption.rate, recipe.corruption.mean_span
    return length, max(1, round(length * rate * (1 + 1 / span)))


def _without_mask(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register(_ATTENTION, _without_mask)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)


class _Counter(TorchDispatchMode):
    """Counts the operations that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if "scaled_dot_product" in name:
            flops = _attention_flops(name, inputs, args, kwargs or {})
            self.work += Work(attention=flops, kernels=1)
        elif func in _MATMULS:
            a, b = inputs[-2:]  # addmm and baddbmm have the bias first
            flops = 2.0 * a.numel() * b.shape[-1]
            self.work += Work(matmul=flops, matmul_bytes=_bytes([a, b, *outputs]), kernels=1)
        elif not func.is_view and name not in _NO_MEMORY and outputs:
            self.work += Work(bytes=_bytes_accessed(name, inputs, outputs), kernels=1)
        return result


def _bytes(tensors: list[torch.Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _bytes_accessed(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    """Returns the bytes that an operation reads and writes.

    An embedding reads only the rows that it looks up. A tensor that is changed in place is both
    read and written.
    """
    if name == "embedding":
        return 2 * _bytes(outputs)
    if name in _WRITE_ONLY:
        return _bytes(outputs)
    return _bytes([t for t in inputs if t.numel() > 1]) + _bytes(outputs)


def _attention_flops(
    name: str, inputs: list[torch.Tensor], args: Any, kwargs: Mapping[str, Any]
) -> float:
    """Returns the FLOPs of a FlashAttention kernel.

    It has two matmuls forward and five backward (Dao, arXiv 2307.08691, section 3.1); with a causal
    mask half of each.
    """
    backward = "backward" in name
    query, key = (inputs[1], inputs[2]) if backward else (inputs[0], inputs[1])
    batch, heads, queries, head_dim = query.shape
    causal = 0.5 if any(a is True for a in (*args, *kwargs.values())) else 1.0
    matmuls = 5 if backward else 2
    return matmuls * 2.0 * batch * heads * queries * key.shape[-2] * head_dim * causal
