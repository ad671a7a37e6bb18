"""Tiny copies of models' configs, on which a training step takes milliseconds."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 512  # tokens of a shrunken model
_MIN_HEAD = 8  # the smallest size of an attention head; rotary embeddings need an even part of it
_MIN_LAYERS = 2
_MAX_LAYERS = 12
_WINDOW = 8  # tokens; documents of a few dozen tokens are longer

# how the fields of configs are named across the model types of transformers
_LAYERS = re.compile(
    r"^(n_layers?|num_(hidden_|encoder_|decoder_)?layers|(encoder|decoder)_layers|depth)$"
)
_LAYER_NUMBER = re.compile(r"layer|first_k|period|interval|offset|every|pattern|_step$|_freq")
_WIDTH = re.compile(
    r"(size|dim|dims|rank|width|embd|inner|d_model|d_ff|d_kv|d_head|head_d|sections?)$|_dim_"
)
_NO_WIDTH = re.compile(
    r"vocab|window|chunk|patch|image|block|kernel|group_size|state|conv|type|pool|token|batch|dtype"
)
_WINDOWS = re.compile(
    r"^(sliding_window(_size)?|attention_window(_size)?|local_attention|window_size|attention_chunk_size)$"
)
_CHUNK = re.compile(r"^(mamba_)?chunk_size$")  # of recurrent layers, which pad to whole chunks
_EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$")
_MAX_EXPERTS = 16  # more than models choose from in a group of experts
_TOKEN = re.compile(r"token_(id|index)$")


def shrunken(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yields ever larger tiny copies of a config, the smallest first.

    They have the same kinds of layers, the same numbers of heads and experts, a small vocabulary
    and short attention windows. All widths are divided by the same number, because a model may
    require that one is the product of others. Not every divisor suits every model, so a caller
    takes the first copy that can be built. The last copy has the original's widths.

    Args:
        config: The config. It stays as it is.
    """
    head = _head_size(_text_parts(config)[0])
    divisors = [
        d for d in range(head, 0, -1) if head % d == 0 and head // d >= min(_MIN_HEAD, head)
    ]
    for divisor in divisors:
        copied = copy.deepcopy(config)
        for part in _parts(copied):
            _shrink_depth(part)
        for part in _text_parts(copied):
            _shrink_widths(part, divisor)
            _shrink_layers(part, divisor)
        for part in _parts(copied):
            _shrink_vocabulary(part)
        copied.use_cache = False
        yield copied


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns a config and the configs in it, such as those of a text and an image model."""
    nested = [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    return [config, *(part for inner in nested for part in _parts(inner))]


def _text_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns the configs of a model's parts that read or write text."""
    if config.is_encoder_decoder:
        return _parts(config)[::-1]
    return [config.get_text_config()]


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields of a config by the names that its class uses, without nested configs."""
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and not isinstance(value, PreTrainedConfig)
    }


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _head_size(config: PreTrainedConfig) -> int:
    """Returns the size of an attention head, or a number that divides the width like one."""
    fields = _fields(config)
    for name in ("head_dim", "d_kv", "v_head_dim", "attention_head_dim"):
        if _is_count(fields.get(name)):
            return int(fields[name])
    width: Any = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    heads: Any = getattr(config, "num_attention_heads", None)
    if not _is_count(width) or not _is_count(heads) or width % heads:
        return math.gcd(width, 64) if _is_count(width) else 1
    return int(width // heads)


def _shrink_depth(config: PreTrainedConfig) -> None:
    """Keeps as few of the first layers as there are kinds of layers to be seen."""
    fields = _fields(config)
    depths = {n: v for n, v in fields.items() if _LAYERS.match(n) and _is_count(v)}
    if not depths:
        return
    depth = max(depths.values())
    needed = _MIN_LAYERS
    for name, value in fields.items():
        if isinstance(value, list) and len(value) in depths.values():
            kinds = [str(kind) for kind in value]
            needed = max(needed, *(kinds.index(kind) + 1 for kind in set(kinds)))
        elif _LAYER_NUMBER.search(name) and name not in depths and _is_count(value):
            needed = max(needed, value + 1) if value < depth else needed
    needed = min(needed, _MAX_LAYERS)
    for name, value in depths.items():
        setattr(config, name, min(value, needed))
    for name, value in fields.items():
        if isinstance(value, list) and len(value) in depths.values():
            setattr(config, name, value[:needed])


def _shrink_widths(config: PreTrainedConfig, divisor: int) -> None:
    """Divides all widths by a number, where they are multiples of it."""
    for name, value in _fields(config).items():
        if _WINDOWS.match(name):
            windows = value if isinstance(value, list) else [value]
            short = [min(w, _WINDOW) if _is_count(w) else w for w in windows]
            setattr(config, name, short if isinstance(value, list) else short[0])
        elif _CHUNK.match(name) and _is_count(value):
            setattr(config, name, min(value, _WINDOW))
        elif _EXPERTS.match(name) and _is_count(value) and value % _MAX_EXPERTS == 0:
            setattr(config, name, _MAX_EXPERTS)
        elif isinstance(value, dict) and "rope" in name:
            _shrink_rope(value, divisor)
        elif _WIDTH.search(name) and not _NO_WIDTH.search(name):
            setattr(config, name, _divided(value, divisor))


def _shrink_layers(config: PreTrainedConfig, divisor: int) -> None:
    """Divides the widths of single layers that differ from the others (Gemma 4)."""
    layers = config.to_dict().get("per_layer_config")
    if not layers:
        return
    depth = config.num_hidden_layers
    config.per_layer_config = {
        int(layer): {
            name: _divided(value, divisor) if _WIDTH.search(name) else value
            for name, value in fields.items()
        }
        for layer, fields in layers.items()
        if int(layer) < depth
    }


def _divided(value: Any, divisor: int) -> Any:
    """Returns a number, or each number of a list, divided if it is a multiple."""
    if isinstance(value, list):
        return [_divided(v, divisor) for v in value]
    return value // divisor if _is_count(value) and value % divisor == 0 else value


def _shrink_rope(parameters: dict[str, Any], divisor: int) -> None:
    """Shortens the lists of factors per frequency, of which there are as many as widths/2."""
    for name, value in parameters.items():
        if isinstance(value, dict):
            _shrink_rope(value, divisor)
        elif isinstance(value, list):
            is_section = all(type(v) is int for v in value)
            parameters[name] = (
                _divided(value, divisor) if is_section else value[: max(1, len(value) // divisor)]
            )


def _shrink_vocabulary(config: PreTrainedConfig) -> None:
    """Limits the vocabulary; special tokens beyond it become its last ones."""
    sizes = [v for n, v in _fields(config).items() if n == "vocab_size" and _is_count(v)]
    limit = min([VOCABULARY, *sizes])
    moved: dict[int, int] = {}

    def small(token: Any) -> Any:
        if isinstance(token, list):
            return [small(t) for t in token]
        if type(token) is not int or token < limit:
            return token
        return moved.setdefault(token, limit - 1 - len(moved))

    for name, value in _fields(config).items():
        if "vocab_size" in name and _is_count(value):
            setattr(config, name, min(value, VOCABULARY))
        elif _TOKEN.search(name):
            setattr(config, name, small(value))
