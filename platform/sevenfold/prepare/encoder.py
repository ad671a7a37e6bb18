"""The encoder that belongs to a prepared tokenizer."""

from __future__ import annotations

from typing import Any

from sevenfold import storage
from sevenfold.data.backends import Backend
from sevenfold.data.encode import TextEncoder
from sevenfold.data.examples import ENCODERS
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.recipe import Recipe


def load_encoder(recipe: Recipe, tokenizer: str) -> TextEncoder:
    """Loads the encoder of a tokenizer's folder that `prepare_tokenizer` has prepared.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer's folder.

    Raises:
        InputError: The tokenizer or its description is missing or damaged.
    """

    def parse(description: Any) -> tuple[Backend, str | None]:
        storage.json_object(description)
        # runs of earlier versions have no date, and the same backend for all documents
        backend = Backend(
            description["backend"],
            description.get("by_reference", ""),
            description.get("by_line", False),
        )
        return backend, description.get("today")

    backend, today = storage.read_json(encoder_file(tokenizer), parse)
    return build_encoder(recipe, tokenizer, backend, today)


def build_encoder(
    recipe: Recipe, tokenizer: str, backend: Backend, today: str | None
) -> TextEncoder:
    """Returns the encoder of the recipe's objective.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer's folder.
        backend: The tokenizer backend, see `sevenfold.data.backends`.
        today: The date (ISO 8601) of the run's start, for chat templates that write it.
    """
    data = recipe.data
    encoder_class = ENCODERS[recipe.objective]
    return encoder_class(
        load_tokenizer(tokenizer), data.sequence_length, backend, data.classes, today
    )


def encoder_file(tokenizer: str) -> str:
    """Returns the file in a tokenizer's folder that describes the encoder."""
    return storage.join(tokenizer, "encoder.json")
