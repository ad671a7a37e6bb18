"""Model cards: README.md files that describe exported models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from sevenfold.data.manifest import Manifest
from sevenfold.engine.checkpoint import Checkpoint
from sevenfold.model import hub
from sevenfold.model.build import MODEL_CLASSES
from sevenfold.recipe import Recipe

# The hub's pipeline tag, by objective.
TAGS = {
    "causal": "text-generation",
    "sft": "text-generation",
    "masked": "fill-mask",
    "denoise": "text2text-generation",
    "dpo": "text-generation",
    "classify": "text-classification",
    "seq2seq": "text2text-generation",
    "embed": "sentence-similarity",
}
# The heading of the section that `with_metrics` replaces. Cards of earlier evaluations have it.
FIGURES = "\n## Measured on held-out data\n"


def card(
    recipe: Recipe, checkpoint: Checkpoint, manifest: Manifest, metrics: Mapping[str, Any]
) -> str:
    """Returns the text of a README.md, with the hub's YAML header.

    It gives the names of sources and base model, but not their paths.

    Args:
        recipe: The run's recipe.
        checkpoint: The checkpoint that is exported.
        manifest: The training data.
        metrics: The metrics that were logged at the checkpoint's step.
    """
    model_class, family = MODEL_CLASSES[recipe.objective]
    facts = _facts(recipe, checkpoint, metrics)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    sources = "\n".join(f"- {source}" for source in _sources(manifest))
    header = ModelCardData(
        library_name="transformers", pipeline_tag=TAGS[recipe.objective], tags=["sevenfold"]
    ).to_yaml()
    return f"""---
{header}
---

# {recipe.name}

A language model ({family}), trained with sevenfold. It was evaluated only with the metrics in this
card; its outputs were not reviewed.

| | |
|-|-|
{rows}

## Data

{sources}

## Use

```python
from transformers import AutoTokenizer, {model_class.__name__}

model = {model_class.__name__}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


def _facts(recipe: Recipe, checkpoint: Checkpoint, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Returns the rows of the card's table."""
    base = None
    if recipe.model.path:
        path = recipe.model.path.rstrip("/")
        base = path if hub.is_hub(path) else PurePosixPath(path.removesuffix("/model")).name
    adapter = " with LoRA, merged" if recipe.adapter else ""
    loss, bits = metrics.get("validation/loss"), metrics.get("validation/bits_per_byte")
    held_out = "not measured at this step" if loss is None else f"{loss:.4f} nats per target token"
    if bits is not None:
        held_out = f"{held_out}, {bits:.4f} bits per byte"
    tokens = checkpoint.step * recipe.tokens_per_step
    versions = checkpoint.extra["versions"].items()
    return {
        "run": recipe.name,
        "SHA-256 of the recipe": f"`{checkpoint.extra['recipe']}`",
        "objective": f"{recipe.objective}, from {base or 'random weights'}{adapter}",
        "step": f"{checkpoint.step:,} ({tokens:,} tokens with padding)",
        "held-out loss": held_out,
        "trained with": ", ".join(f"{name} {version}" for name, version in versions),
    }


def with_metrics(text: str, measured: Mapping[str, Any]) -> str:
    """Returns a card with the metrics of an evaluation in a section at its end.

    The section replaces that of an earlier evaluation.

    Args:
        text: The card.
        measured: The metrics, with those of each baseline in `baselines`.
    """
    baselines = measured["baselines"]
    names = [name for name, value in measured.items() if not isinstance(value, dict | str)]
    lines = [
        " | ".join(["metric", "this model", *baselines]),
        " | ".join(["-"] * (2 + len(baselines))),
    ]
    for name in names:
        values = [measured[name], *(baseline.get(name) for baseline in baselines.values())]
        lines.append(" | ".join([name, *map(_cell, values)]))
    table = [f"| {line} |" for line in lines]
    signatures = [f"{name}: `{v}`" for name, v in measured.items() if isinstance(v, str)]
    return text.partition(FIGURES)[0] + "\n".join([FIGURES, *table, "", *signatures, ""])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")


def _sources(manifest: Manifest) -> list[str]:
    """Describes each source of the training data in one line."""
    lines = []
    for number, (source, span) in enumerate(zip(manifest.sources, manifest.spans, strict=True)):
        fingerprints = [s.fingerprint for s in manifest.shards if s.source == number]
        version = hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:16]
        table = manifest.table[span.start : span.stop]
        # Column 4 is the number of documents of a row group, 0 if it is not known; 5 its bytes.
        documents = f"{int(table[:, 4].sum()):,} documents, " if table[:, 4].all() else ""
        size = f"{int(table[:, 5].sum()):,} bytes of text"
        weight = f", weight {source.weight:g}" if source.weight else ""
        lines.append(
            f"{source.name}, version `{version}` (hash of the sizes and ends of its files): "
            f"{documents}{size}{weight}"
        )
    return lines
