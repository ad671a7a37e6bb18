"""What a plan needs to know of a recipe's model without building it with weights.

That is its parameters and their shapes, the number of blocks (which can be reduced, so that a trace
is quick), and a dummy micro-batch.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from sevenfold.engine.batch import IGNORE, Batch, Decoder
from sevenfold.engine.optim import embedding_parameters
from sevenfold.errors import InputError
from sevenfold.model import build, parallel
from sevenfold.recipe import Recipe

# The fields of configs that hold the number of blocks of a stack: of a decoder or encoder, then of
# the decoder of an encoder-decoder. Names in one group are aliases of each other.
_DEPTH_FIELDS = (("num_hidden_layers", "encoder_layers"), ("num_decoder_layers", "decoder_layers"))


def vocabulary(recipe: Recipe, otherwise: int | None = None) -> int:
    """Returns the size of the vocabulary.

    It is that of the model's config or of the tokenizer to be trained. The tokenizer itself need
    not exist yet.

    Args:
        recipe: The recipe.
        otherwise: The size if the recipe does not say it.

    Raises:
        InputError: Neither the recipe nor `otherwise` says it.
    """
    size: int | None = (recipe.model.config or {}).get("vocab_size") or recipe.tokenizer.vocab_size
    if size is None and recipe.model.path is not None:
        size = int(build.config_of(recipe, 0).vocab_size)
    size = size or otherwise
    if size is None:
        raise InputError(
            "the plan needs the size of the vocabulary: set model.config.vocab_size or "
            "tokenizer.vocab_size"
        )
    return size


def depths(config: PreTrainedConfig) -> dict[str, int]:
    """Returns the number of blocks of each stack, by the config's field.

    A decoder or an encoder has one stack, an encoder-decoder two.
    """
    result: dict[str, int] = {}
    for aliases in _DEPTH_FIELDS:
        for name in aliases:
            if getattr(config, name, None) is not None:
                result[name] = int(getattr(config, name))
                break
    return result


def config_at(recipe: Recipe, vocab_size: int, depth: dict[str, int]) -> PreTrainedConfig:
    """Returns the recipe's config with other numbers of blocks, and without attention dropout.

    Args:
        recipe: The recipe.
        vocab_size: The size of the vocabulary.
        depth: The number of blocks of each stack, by the fields that `depths` returns.
    """
    config = copy.deepcopy(build.config_of(recipe, vocab_size))
    for field, count in depth.items():
        for name in next(aliases for aliases in _DEPTH_FIELDS if field in aliases):
            if getattr(config, name, None) is not None:
                setattr(config, name, count)
    layer_types = getattr(config, "layer_types", None)
    if isinstance(layer_types, list):
        config.layer_types = layer_types[: depth.get("num_hidden_layers", len(layer_types))]
    # A fused kernel on a GPU does not store its dropout mask. torch's CPU kernel has no dropout:
    # with it attention would store all probabilities.
    for name in build.dropouts(config):
        if "att" in name:
            setattr(config, name, 0.0)
    return config


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        shape: Its shape.
        trained: Whether it is trained.
        split: The dimension that tensor parallelism splits; None if it is replicated.
        matrix: Whether Muon optimizes it: a matrix that is neither embedding nor output layer.
        stack: The stack of blocks that it is in; None outside of blocks.
    """

    shape: tuple[int, ...]
    trained: bool
    split: int | None
    matrix: bool
    stack: str | None


def parameters(recipe: Recipe, vocab_size: int) -> list[Parameter]:
    """Returns all parameters of the model, adapters included."""
    return list(_parameters(Key(recipe, vocab_size)))


class Key:
    """A recipe and vocabulary size that can be the key of a cache.

    Two are equal if their models and the work of a micro-batch are the same.
    """

    def __init__(self, recipe: Recipe, vocab_size: int):
        self.recipe, self.vocab_size = recipe, vocab_size
        train = recipe.train
        # A recipe has lists, and cannot be hashed itself.
        self.text = repr(
            (
                vocab_size,
                recipe.objective,
                recipe.data.sequence_length,
                recipe.data.classes,
                recipe.model,
                recipe.adapter,
                recipe.corruption,
                train.dtype,
                train.loss_chunk,
                train.z_loss,
                train.label_smoothing,
                train.dropout,
                recipe.optimizer.name,
            )
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@functools.lru_cache(8)
def _parameters(key: Key) -> tuple[Parameter, ...]:
    model = meta(key.recipe, key.vocab_size)
    tensor_plan = _tensor_plan(model)
    embeddings = {id(p) for p in embedding_parameters(model)}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    blocks = set(parallel.blocks(model))
    stack_of = {
        id(p): stack(name)
        for name, module in model.named_modules()
        if module in blocks
        for p in module.parameters()
    }
    result = []
    for name, p in model.named_parameters():
        module_name = name.rpartition(".")[0]
        style = next(
            (style for pattern, style in tensor_plan.items() if re.fullmatch(pattern, module_name)),
            None,
        )
        is_head = head is not None and p is head.weight
        result.append(
            Parameter(
                shape=tuple(p.shape),
                trained=p.requires_grad,
                split={"colwise": 0, "rowwise": 1 if p.ndim > 1 else None}.get(style or ""),
                matrix=p.ndim >= 2 and id(p) not in embeddings and not is_head,
                stack=stack_of.get(id(p)),
            )
        )
    return tuple(result)


def blocks_of(recipe: Recipe, vocab_size: int) -> dict[str, int]:
    """Returns the number of blocks of each stack, by the stack's name in the model."""
    return dict(_blocks(Key(recipe, vocab_size)))


@functools.lru_cache(8)
def _blocks(key: Key) -> tuple[tuple[str, int], ...]:
    model = meta(key.recipe, key.vocab_size)
    blocks = set(parallel.blocks(model))
    return tuple(Counter(stack(n) for n, m in model.named_modules() if m in blocks).items())


def _tensor_plan(model: Any) -> dict[str, str]:
    """Returns the model's plan for tensor parallelism; empty if it has none.

    Keys are regular expressions of modules' names, values are colwise or rowwise.
    """
    try:
        plan = parallel.tensor_plan(model, 1)
    except InputError:
        return {}
    return {re.escape(name).replace(r"\*", r"\d+"): style for name, style in plan.items()}


def stack(name: str) -> str:
    """Returns the name of a block's stack: the block's name without its number."""
    return name.rpartition(".")[0]


def meta(recipe: Recipe, vocab_size: int) -> Any:
    """Returns the recipe's model with its adapter on the meta device, where nothing is allocated.

    Raises:
        InputError: As build.config_of.
    """
    config = build.config_of(recipe, vocab_size)
    with torch.device("meta"):
        model = build.MODEL_CLASSES[recipe.objective][0].from_config(
            config, trust_remote_code=build.runs_own_code(recipe)
        )
        model.tie_weights()
        if recipe.adapter is not None:
            build.with_adapter(model, recipe)
    return model


def add_adapter(model: Any, recipe: Recipe) -> None:
    """Adds the adapter without moving its layers.

    Peft moves each new layer to the device of its base layer. Fake tensors cannot be moved, and are
    on that device anyway.
    """
    move = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        build.with_adapter(model, recipe)
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def dummy_batch(recipe: Recipe) -> Batch:
    """Returns a dummy micro-batch whose sequences have the full length, one document each."""
    rows, length = recipe.train.micro_batch, recipe.data.sequence_length
    if recipe.objective in ("denoise", "seq2seq"):
        source_length, target_length = sides(recipe)
        return encoder_decoder_batch(rows, source_length, target_length)
    ids = _zeros(rows, length)
    if recipe.objective == "classify":
        labels = torch.zeros(rows, dtype=torch.long)
        return _batch(ids, labels, attention_mask=torch.ones_like(ids, dtype=torch.bool))
    if recipe.objective == "embed":  # queries and documents, each half as long as a sequence
        halves = _zeros(2 * rows, max(1, length // 2))
        index = torch.arange(2 * rows)
        return _batch(
            halves,
            torch.tensor([0, IGNORE]).repeat(rows),
            attention_mask=torch.ones_like(halves, dtype=torch.bool),
            text_index=index,
            text_keys=index.view(-1, 2),
        )
    if recipe.objective == "dpo":
        pairs = torch.zeros(rows, dtype=torch.long)
        return _batch(ids, pairs, segments=torch.zeros_like(ids), targets=_zeros(rows, length))
    return token_batch(rows, length)


def token_batch(rows: int, length: int) -> Batch:
    """Returns a dummy micro-batch with a label for each token, as for causal or masked models."""
    return _batch(_zeros(rows, length), _zeros(rows, length))


def encoder_decoder_batch(rows: int, source_length: int, target_length: int) -> Batch:
    """Returns a dummy micro-batch of an encoder-decoder."""
    labels = _zeros(rows, target_length)
    decoder = Decoder(_zeros(rows, target_length), torch.zeros_like(labels))
    return _batch(_zeros(rows, source_length), labels, decoder=decoder)


def sides(recipe: Recipe) -> tuple[int, ...]:
    """Returns the most tokens per sequence that each stack reads.

    For denoise the decoder's are as many as engine.objectives.Denoise makes of a full sequence; for
    seq2seq sources and targets are taken to be equally long.
    """
    length = recipe.data.sequence_length
    if recipe.objective == "seq2seq":
        return -(-length // 2), -(-length // 2)
    if recipe.objective == "denoise":
        target_share = recipe.corruption.rate * (1 + 1 / recipe.corruption.mean_span)
        return length, min(length, math.ceil(target_share * length) + 1)
    return (length,)


def _zeros(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long)


def _batch(ids: torch.Tensor, labels: torch.Tensor, **optional: Any) -> Batch:
    """Makes each row one document."""
    edges = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1).contiguous()
    return Batch(ids, positions, labels, edges, **optional)
