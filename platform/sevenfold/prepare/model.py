"""Checks of a run's model and tokenizer before anything is started."""

from __future__ import annotations

from typing import Any

from sevenfold import storage
from sevenfold.data.examples import ENCODERS, PLAIN_TEMPLATE
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.errors import InputError
from sevenfold.recipe import Recipe


def check_model(recipe: Recipe) -> tuple[Recipe, int]:
    """Checks the model, the tokenizer and the adapter of a recipe.

    Returns:
        The recipe with absolute paths, so that it means the same in any working directory, and the
        model's number of parameters.

    Raises:
        InputError: The model, tokenizer or adapter does not exist, or they do not fit together.
    """
    from sevenfold.engine.objectives import SpecialTokens
    from sevenfold.model import build

    changes: dict[str, Any] = {}
    if recipe.model.path:
        changes["model.path"] = build.model_path(recipe.model.path)
    if recipe.tokenizer.path:
        changes["tokenizer.path"] = storage.resolve_input(recipe.tokenizer.path)
    resolved = recipe.override(changes)
    if resolved.tokenizer.chat_template:
        load_chat_template(resolved.tokenizer.chat_template)
    vocab_size = resolved.tokenizer.vocab_size
    if vocab_size is None:
        tokenizer = load_tokenizer(resolved.tokenizer.path or str(resolved.model.path))
        # both raise InputError if the tokenizer lacks a token that the objective needs
        encoder_class = ENCODERS[resolved.objective]
        encoder_class(tokenizer, resolved.data.sequence_length, classes=resolved.data.classes)
        SpecialTokens.from_tokenizer(tokenizer, resolved.objective)
        vocab_size = len(tokenizer)
    return resolved, build.check_model(resolved, vocab_size)


def load_chat_template(setting: str) -> str:
    """Returns the chat template that `tokenizer.chat_template` refers to.

    Args:
        setting: "plain", or the path of a file with a Jinja template.

    Raises:
        InputError: The file cannot be read.
    """
    if setting == "plain":
        return PLAIN_TEMPLATE
    try:
        return storage.read_text(storage.resolve_input(setting))
    except (InputError, OSError) as e:
        raise InputError(
            "tokenizer.chat_template: expected plain, or a file with a Jinja template, "
            f"found {setting}: {e}"
        ) from None
