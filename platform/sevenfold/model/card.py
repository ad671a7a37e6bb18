"""The model card: what a run knows about its model, for whoever finds the directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from sevenfold.data.manifest import Manifest
from sevenfold.engine.checkpoint import Checkpoint
from sevenfold.model.build import CLASSES
from sevenfold.recipe import Recipe

TAGS = {"causal": "text-generation", "sft": "text-generation", "masked": "fill-mask", "denoise": "text2text-generation",
        "dpo": "text-generation", "classify": "text-classification", "seq2seq": "text2text-generation",
        "embed": "sentence-similarity"}  # fmt: skip


def card(recipe: Recipe, checkpoint: Checkpoint, manifest: Manifest, metrics: Mapping[str, Any]) -> str:
    """A README.md with the hub's front matter. It names sources and base model, not where they lie.

    Args:
        metrics: of the checkpoint's step, as they are logged.
    """
    made, family = CLASSES[recipe.objective]
    base = recipe.model.path and PurePosixPath(recipe.model.path.rstrip("/").removesuffix("/model")).name
    loss, bits = metrics.get("validation/loss"), metrics.get("validation/bits_per_byte")
    measured = "not measured at this step" if loss is None else f"{loss:.4f} nats a target token"
    facts = {
        "run": recipe.name,
        "recipe, sha256": f"`{checkpoint.extra['recipe']}`",
        "objective": f"{recipe.objective}, from {base or 'random weights'}{' by LoRA, merged' if recipe.adapter else ''}",
        "step": f"{checkpoint.step:,} ({checkpoint.step * recipe.tokens_per_step:,} tokens with padding)",
        "held-out loss": measured if bits is None else f"{measured}, {bits:.4f} bits a byte",
        "trained with": ", ".join(f"{name} {version}" for name, version in checkpoint.extra["versions"].items()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    sources = "\n".join(f"- {text}" for text in _sources(manifest))
    front = ModelCardData(library_name="transformers", pipeline_tag=TAGS[recipe.objective], tags=["sevenfold"]).to_yaml()
    return f"""---
{front}
---

# {recipe.name}

A language model ({family}), trained with sevenfold. Only what stands here was measured, and what the model says was not
examined.

| | |
|-|-|
{rows}

## Data

{sources}

## Use

```python
from transformers import AutoTokenizer, {made.__name__}

model = {made.__name__}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


FIGURES = "\n## Measured on held-out data\n"


def with_figures(text: str, measured: Mapping[str, Any]) -> str:
    """A card with the figures of an evaluation in a section at its end; in place of those of an earlier one."""
    others = measured["baselines"]
    names = [k for k, v in measured.items() if not isinstance(v, dict | str)]
    head = " | ".join(["measure", "this model", *others])
    rows = [
        " | ".join([name, *(f"{v:.4g}" if isinstance(v, float) else str(v or "") for v in values)])
        for name in names
        for values in [[measured[name], *(other.get(name) for other in others.values())]]
    ]
    lines = [f"| {line} |" for line in (head, " | ".join(["-"] * (2 + len(others))), *rows)]
    signatures = [f"{k}: `{v}`" for k, v in measured.items() if isinstance(v, str)]
    return text.partition(FIGURES)[0] + "\n".join([FIGURES, *lines, "", *signatures, ""])


def _sources(manifest: Manifest) -> list[str]:
    out = []
    for number, (source, span) in enumerate(zip(manifest.sources, manifest.spans, strict=True)):
        files = [s.fingerprint for s in manifest.shards if s.source == number]
        version = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
        table = manifest.table[span.start : span.stop]
        documents = f"{int(table[:, 4].sum()):,} documents, " if table[:, 4].all() else ""
        weight = f", weight {source.weight:g}" if source.weight else ""
        size = f"{int(table[:, 5].sum()):,} bytes of text"
        out.append(f"{source.name}, version `{version}` (sizes and ends of its files): {documents}{size}{weight}")
    return out
