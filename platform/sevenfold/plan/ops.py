"""What a GPU has to do for a micro-batch: the very model, run forward and backward on tensors without memory, its operations
counted.

Few layers and rows are run; what a block and a row take follows from their differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # pinned (constraints.txt): private, and nothing public does it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sevenfold.engine import objectives
from sevenfold.engine.batch import Batch, Decoder
from sevenfold.model import build, parallel
from sevenfold.plan import shape
from sevenfold.recipe import Recipe

NAME = "sdpa_without_mask"  # documents are kept apart by FlexAttention's block mask, which is next to nothing
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}  # touch no memory
FILLED = {"zeros", "full", "zeros_like", "fill_", "zero_", "new_zeros", "ones", "ones_like", "arange"}  # written alone


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and of attention, bytes that products read and write, bytes of all else (each operation by
    itself, as without torch.compile), operations started."""

    products: float = 0.0
    attention: float = 0.0
    product_bytes: float = 0.0
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
    """A micro-batch's way through a model, forward and backward (with what is computed again): all blocks, and what is
    outside of them."""

    forward: Work
    backward: Work
    rest_forward: Work
    rest_backward: Work

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Pass:
        return Pass(*(getattr(self, f.name) * factor for f in fields(self)))


def of(recipe: Recipe, vocab_size: int, micro_batch: int, checkpointing: str) -> Pass:
    """Of one GPU without tensor parallelism."""
    key = shape.Key(recipe, vocab_size)
    if micro_batch == 1:  # by itself: some operations of several rows are not there
        return _passed(key, 1, checkpointing)
    two, three = (_passed(key, rows, checkpointing) for rows in (2, 3))
    return two + (three + two * -1) * (micro_batch - 2)


@functools.lru_cache(maxsize=64)
def _passed(key: shape.Key, rows: int, checkpointing: str) -> Pass:
    recipe, vocab_size = key.recipe, key.vocab_size
    known = shape.depths(build.config_of(recipe, vocab_size))
    base = dict.fromkeys(known, 1)
    first = _run(recipe, vocab_size, base, rows, checkpointing)
    (forward, backward), blocks = first, (Work(), Work())
    for name, layers in known.items():
        more = _run(recipe, vocab_size, base | {name: 2}, rows, checkpointing)
        a, b = more[0] - first[0], more[1] - first[1]  # of a block
        blocks = blocks[0] + a * layers, blocks[1] + b * layers
        forward, backward = forward - a, backward - b
    return Pass(*blocks, forward, backward)


def _run(recipe: Recipe, vocab_size: int, layers: Mapping[str, int], rows: int, checkpointing: str) -> tuple[Work, Work]:
    """(forward, backward) of a model of so many blocks."""
    config = shape.config_at(recipe, vocab_size, dict(layers))
    for name in build.dropouts(config):  # with it a CPU's attention falls apart into single operations
        setattr(config, name, 0.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = build.build(recipe, config, weights=False)
        if recipe.adapter is not None:
            build.with_adapter(model, recipe)
        _cast(model, parallel.DTYPES[recipe.train.dtype])
        model.train()
        if build.CLASSES[recipe.objective][1] == "decoder" and model._can_set_attn_implementation():
            model.set_attn_implementation(NAME)
        parallel.recompute(model, checkpointing)
        losses = _losses(recipe, model, rows)
        with _Counter() as counter:
            total = losses().sum()
            forward = counter.work
            total.backward()
    return forward, counter.work - forward


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As FSDP does with parameters that it gathers. What two modules share stays shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made.setdefault(id(p), nn.Parameter(p.detach().to(dtype), p.requires_grad))
                module._parameters[name] = made[id(p)]


def _losses(recipe: Recipe, model: Any, rows: int) -> Callable[[], torch.Tensor]:
    """The losses of rows that are full, each one document."""
    length, train = recipe.data.sequence_length, recipe.train

    def ids(width: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=torch.int64)

    def batch(width: int, asked: int, decoder: Decoder | None = None) -> Batch:
        return Batch(ids(width), torch.arange(width).expand(rows, -1), ids(asked), torch.zeros(1, dtype=torch.int32), decoder)

    if recipe.objective in ("classify", "embed"):
        return lambda: next(iter(model(input_ids=ids(length)).values())).float().square()
    kinds = {"masked": objectives.Masked, "denoise": objectives.Denoise, "seq2seq": objectives.Denoise}
    objective = kinds.get(recipe.objective, objectives.Causal)(objectives.Words(0), 0, 0.0, 1.0)
    made = batch(length, length)
    if isinstance(objective, objectives.Denoise):
        rate, span = recipe.corruption.rate, recipe.corruption.mean_span
        asked = max(1, round(length * rate * (1 + 1 / span))) if recipe.objective == "denoise" else length // 2
        read = length if recipe.objective == "denoise" else length - asked
        made = batch(read, asked, Decoder(ids(asked), ids(asked)))
    losses = objectives.attach(model, objective, train.loss_chunk, train.z_loss, train.label_smoothing, cpu_logits=None)
    return lambda: losses(made)


def _without_mask(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register(NAME, _without_mask)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if "scaled_dot_product" in name:
            self.work += Work(attention=_attention_flops(name, tensors, args, kwargs or {}), kernels=1)
        elif func in PRODUCTS:
            a, b = (tensors[-2], tensors[-1])
            flops = 2.0 * a.numel() * b.shape[-1]
            self.work += Work(products=flops, product_bytes=_bytes([a, b, *made]), kernels=1)
        elif not func.is_view and name not in FREE and made:
            self.work += Work(bytes=_touched(name, tensors, made), kernels=1)
        return out


def _bytes(tensors: list[torch.Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _touched(name: str, tensors: list[torch.Tensor], made: list[torch.Tensor]) -> float:
    """Bytes read and written. Of a table only the rows looked up are; where a result is an argument, it is both."""
    if name == "embedding":
        return 2 * _bytes(made)
    if name in FILLED:
        return _bytes(made)
    return _bytes([t for t in tensors if t.numel() > 1]) + _bytes(made)


def _attention_flops(name: str, tensors: list[torch.Tensor], args: Any, kwargs: Mapping[str, Any]) -> float:
    """Of a flash kernel: two products forward, five backward (Dao, arXiv 2307.08691, section 3.1); causal: half of them."""
    backward = "backward" in name
    query, key = (tensors[1], tensors[2]) if backward else (tensors[0], tensors[1])
    rows, heads, asked, size = query.shape
    causal = 0.5 if any(a is True for a in (*args, *kwargs.values())) else 1.0
    return (5 if backward else 2) * 2.0 * rows * heads * asked * key.shape[-2] * size * causal
