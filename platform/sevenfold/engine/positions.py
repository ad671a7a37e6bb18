"""Where a model's positions begin."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

_OFFSETS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def position_offset(model: nn.Module) -> int:
    """Returns the position of the first token of a text; 0 for most models.

    RoBERTa and its kin (XLM-R, CamemBERT, MPNet, ...) count from the position after that of padding
    if they number the tokens themselves, and have that many fewer positions for tokens. Position
    embeddings with a `padding_idx` tell them from others.
    """
    if model not in _OFFSETS:
        paddings = (
            module.padding_idx
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        )
        _OFFSETS[model] = next((int(p) + 1 for p in paddings if p is not None), 0)
    return _OFFSETS[model]
