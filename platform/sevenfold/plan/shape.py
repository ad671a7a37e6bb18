"""The recipe's model as a plan sees it: parameters without weights, blocks that can be made fewer, a micro-batch."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from sevenfold.engine.batch import Batch, Decoder
from sevenfold.engine.optim import embedding_parameters
from sevenfold.errors import InputError
from sevenfold.model import build, parallel
from sevenfold.recipe import Recipe

# where configs say how many blocks a stack has; the first of a group speaks for the others, which say the same again
_DEPTHS = (("num_hidden_layers", "encoder_layers"), ("num_decoder_layers", "decoder_layers"))


def vocabulary(recipe: Recipe, otherwise: int | None = None) -> int:
    """Tokens of the vocabulary: what the model's config says, what is to be trained, or `otherwise`.

    The tokenizer itself need not be there yet. Raises InputError where nothing says it.
    """
    told: int | None = (recipe.model.config or {}).get("vocab_size") or recipe.tokenizer.vocab_size
    if told is None and recipe.model.path is not None:
        told = int(build.config_of(recipe, 0).vocab_size)
    told = told or otherwise
    if told is None:
        raise InputError("the plan needs the size of the vocabulary: give model.config.vocab_size, or tokenizer.vocab_size")
    return told


def depths(config: PreTrainedConfig) -> dict[str, int]:
    """Blocks of each stack, by the config's field: one of a decoder or an encoder, two of an encoder-decoder."""
    out: dict[str, int] = {}
    for names in _DEPTHS:
        for name in names:
            if getattr(config, name, None) is not None:
                out[name] = int(getattr(config, name))
                break
    return out


def config_at(recipe: Recipe, vocab_size: int, depth: dict[str, int]) -> PreTrainedConfig:
    """The recipe's config with so many blocks."""
    config = copy.deepcopy(build.config_of(recipe, vocab_size))
    for field, count in depth.items():
        for name in next(names for names in _DEPTHS if field in names):
            if getattr(config, name, None) is not None:
                setattr(config, name, count)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        config.layer_types = kinds[: depth.get("num_hidden_layers", len(kinds))]
    # a fused kernel keeps no mask of its dropout; torch's for a CPU has no dropout and would keep all probabilities
    for name in build.dropouts(config):
        if "att" in name:
            setattr(config, name, 0.0)
    return config


@dataclass(frozen=True)
class Parameter:
    """Of one parameter of the model. split: the dimension that tensor parallelism deals out, None: none."""

    shape: tuple[int, ...]
    trained: bool
    split: int | None
    matrix: bool  # whether Muon takes it
    stack: str | None  # of blocks that it lies in


def parameters(recipe: Recipe, vocab_size: int) -> list[Parameter]:
    """All of the model's, adapters included, made on the meta device."""
    return list(_parameters(Key(recipe, vocab_size)))


class Key:
    """A recipe, which is made of lists, too: known by the text of what its model and the work of a micro-batch hang on."""

    def __init__(self, recipe: Recipe, vocab_size: int):
        self.recipe, self.vocab_size = recipe, vocab_size
        r, train = recipe, recipe.train
        self.text = repr((
            vocab_size, r.objective, r.data.sequence_length, r.data.classes, r.model, r.adapter, r.corruption, train.dtype,
            train.loss_chunk, train.z_loss, train.label_smoothing, train.dropout, r.optimizer.name,
        ))  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@functools.lru_cache(8)
def _parameters(key: Key) -> tuple[Parameter, ...]:
    model = meta(key.recipe, key.vocab_size)
    ways = plan_of(model)
    embeddings = {id(p) for p in embedding_parameters(model)}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    found = set(parallel.blocks(model))
    inside = {id(p): stack(n) for n, m in model.named_modules() if m in found for p in m.parameters()}
    out = []
    for name, p in model.named_parameters():
        style = next((s for pattern, s in ways.items() if re.fullmatch(pattern, name.rpartition(".")[0])), None)
        split = {"colwise": 0, "rowwise": 1 if p.ndim > 1 else None}.get(style or "")
        matrix = p.ndim >= 2 and id(p) not in embeddings and not (head is not None and p is head.weight)
        out.append(Parameter(tuple(p.shape), p.requires_grad, split, matrix, inside.get(id(p))))
    return tuple(out)


def blocks_of(recipe: Recipe, vocab_size: int) -> dict[str, int]:
    """How many blocks each stack has, by its name."""
    return dict(_blocks(Key(recipe, vocab_size)))


@functools.lru_cache(8)
def _blocks(key: Key) -> tuple[tuple[str, int], ...]:
    model = meta(key.recipe, key.vocab_size)
    found = set(parallel.blocks(model))
    return tuple(Counter(stack(n) for n, m in model.named_modules() if m in found).items())


def plan_of(model: Any) -> dict[str, str]:
    """Regular expression of modules -> colwise or rowwise; empty where the model has no plan for tensor parallelism."""
    try:
        plan = parallel.tensor_plan(model, 1)
    except InputError:
        return {}
    return {re.escape(k).replace(r"\*", r"\d+"): v for k, v in plan.items()}


def stack(name: str) -> str:
    """Of a block's name, which ends in its number."""
    return name.rpartition(".")[0]


def meta(recipe: Recipe, vocab_size: int) -> Any:
    """The recipe's model, and its adapter, where nothing is allocated. Raises InputError as build.config_of."""
    config = build.config_of(recipe, vocab_size)
    with torch.device("meta"):
        model = build.CLASSES[recipe.objective][0].from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        model.tie_weights()
        if recipe.adapter is not None:
            build.with_adapter(model, recipe)
    return model


def batch_of(recipe: Recipe) -> Batch:
    """A micro-batch as long as the recipe's rows may be, one document each."""
    rows, length = recipe.train.micro_batch, recipe.data.sequence_length
    if recipe.objective in ("denoise", "seq2seq"):
        reads, says = sides(recipe)
        asked = _ids(rows, says)
        return _batch(_ids(rows, reads), asked, decoder=Decoder(_ids(rows, says), torch.zeros_like(asked)))
    plain = _ids(rows, length)
    if recipe.objective == "classify":
        return _batch(plain, torch.zeros(rows, dtype=torch.long), attention_mask=torch.ones_like(plain, dtype=torch.bool))
    if recipe.objective == "embed":  # queries, then documents, each half of a row
        halves = _ids(2 * rows, max(1, length // 2))
        labels = torch.zeros(rows, dtype=torch.long)
        return _batch(halves, labels, attention_mask=torch.ones_like(halves, dtype=torch.bool))
    if recipe.objective == "dpo":
        pairs = torch.zeros(rows, dtype=torch.long)
        return _batch(plain, pairs, segments=torch.zeros_like(plain), targets=_ids(rows, length))
    return _batch(plain, _ids(rows, length))


def sides(recipe: Recipe) -> tuple[int, ...]:
    """Tokens a row that each stack reads: of denoise as engine.objectives.Denoise lays them out, of seq2seq half and half."""
    length = recipe.data.sequence_length
    if recipe.objective == "seq2seq":
        return -(-length // 2), -(-length // 2)
    if recipe.objective == "denoise":
        asked = recipe.corruption.rate * (1 + 1 / recipe.corruption.mean_span)
        return length, min(length, math.ceil(asked * length) + 1)
    return (length,)


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long)


def _batch(ids: torch.Tensor, labels: torch.Tensor, **more: Any) -> Batch:
    """Each row one document."""
    edges = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
    places = torch.arange(ids.shape[1]).expand(ids.shape[0], -1).contiguous()
    return Batch(ids, places, labels, edges, **more)
