"""The tokenizer of a run: trains or copies it, and chooses its encoder backend."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

from sevenfold import storage
from sevenfold.data.backends import choose_backend
from sevenfold.data.encode import TextEncoder
from sevenfold.data.examples import ENCODERS
from sevenfold.data.manifest import Manifest
from sevenfold.data.pair_frames import set_languages
from sevenfold.data.sources.documents import Selection
from sevenfold.data.tokenizer import (
    LAST_WRITTEN,
    estimate_tokens_per_byte,
    load_tokenizer,
    sample,
    save_tokenizer,
    train_tokenizer,
)
from sevenfold.prepare.data import Inputs, check_documents
from sevenfold.prepare.encoder import build_encoder, encoder_file, frames_of
from sevenfold.prepare.model import set_chat_template
from sevenfold.prepare.survey import survey_examples
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.report.console import say

# MB of text of each source on which backends are compared and tokens per byte are measured
SAMPLE_MB = 1.0


def prepare_tokenizer(recipe: Recipe, inputs: Inputs, tokenizer: str) -> Inputs:
    """Prepares the tokenizer, unless it was prepared before.

    It trains or copies the tokenizer, chooses the encoder backend, and measures the tokens per byte
    of each source. This is done in this process, which has imported the libraries already: a Ray
    task would spend more time on the imports than on the work.

    Args:
        recipe: The recipe.
        inputs: The input files.
        tokenizer: The folder for the tokenizer.

    Returns:
        The inputs, with the measured tokens per byte.
    """
    if storage.exists(encoder_file(tokenizer)) and inputs.train.tokens_per_byte:
        return inputs
    for split, manifest in inputs.all.items():
        check_documents(recipe, split, manifest)
    _save_tokenizer(recipe, inputs.train, tokenizer)
    encoder, description = _choose_encoder(recipe, inputs.train, tokenizer)
    say(description["why"])
    if recipe.objective not in PRETRAINING:
        description |= {
            "classes": recipe.data.classes,
            "examples": survey_examples(recipe, inputs, encoder),
        }
    storage.write_json(encoder_file(tokenizer), description)
    return replace(inputs, train=inputs.train.measured(description["tokens_per_byte"]))


def _save_tokenizer(recipe: Recipe, manifest: Manifest, folder: str) -> None:
    """Trains or loads the recipe's tokenizer and saves it, unless the folder has it already."""
    if storage.exists(storage.join(folder, LAST_WRITTEN)):
        return
    settings = recipe.tokenizer
    if settings.vocab_size:
        tokenizer: Any = train_tokenizer(
            manifest,
            Selection.from_data(recipe.data, ENCODERS[recipe.objective].fields),
            settings.vocab_size,
            settings.train_mb,
            recipe.seed,
            recipe.objective,
        )
    else:
        from sevenfold.model.build import local_model  # imports torch

        tokenizer = load_tokenizer(
            settings.path or local_model(str(recipe.model.path), weights=False)
        )
    set_chat_template(tokenizer, settings.chat_template)
    if recipe.objective == "seq2seq":
        set_languages(tokenizer, recipe.data.languages)
    save_tokenizer(tokenizer, folder)


def _choose_encoder(
    recipe: Recipe, manifest: Manifest, folder: str
) -> tuple[TextEncoder, dict[str, Any]]:
    """Chooses the encoder backend, and measures the tokens per byte of each source.

    Args:
        recipe: The recipe.
        manifest: The manifest of the training data.
        folder: The tokenizer's folder.

    Returns:
        The encoder; and its "backend" (with what it encodes "by_reference" and "by_line") and
        "identity", the reason for the backend ("why"), the date for chat templates ("today"), the
        "tokens_per_byte" of each source and, for pretrained encoder-decoders, the "frames" of
        pairs.
    """
    selection = Selection.from_data(recipe.data, ENCODERS[recipe.objective].fields)
    sources = range(len(manifest.sources))
    texts = [
        text
        for source in sources
        for column in sample(manifest, selection, source, SAMPLE_MB, recipe.seed)
        for text in column
    ]
    tokenizer = load_tokenizer(folder)
    backend, why = choose_backend(tokenizer, texts)
    today = date.today().isoformat()
    frames = frames_of(recipe, tokenizer)
    encoder = build_encoder(recipe, folder, backend, today, frames)
    tokens_per_byte = [
        estimate_tokens_per_byte(manifest, selection, encoder, source, SAMPLE_MB, recipe.seed)
        for source in sources
    ]
    return encoder, {
        "backend": backend.name,
        "by_reference": backend.by_reference,
        "by_line": backend.by_line,
        "why": why,
        "today": today,
        "identity": encoder.identity(),
        "tokens_per_byte": tokens_per_byte,
        **({} if frames is None else {"frames": frames.to_json()}),
    }
