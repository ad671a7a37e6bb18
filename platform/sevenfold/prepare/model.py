"""Checks of a run's model and tokenizer before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sevenfold import storage
from sevenfold.data.chat_renderer import PLAIN_TEMPLATE
from sevenfold.data.examples import ENCODERS
from sevenfold.data.pair_frames import set_languages
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.errors import InputError
from sevenfold.model import hub
from sevenfold.prepare.encoder import frames_of
from sevenfold.recipe import Recipe, loads
from sevenfold.recipe.bleu import require_modules
from sevenfold.run_folder import RunFolder


@dataclass(frozen=True)
class CheckedModel:
    """The result of the check of a recipe's model.

    Attributes:
        recipe: The recipe with absolute paths, so that it means the same in any working directory.
        parameters: The number of the model's parameters, without those of the adapter.
        support: What the model supports, an engine.objectives.Support.
    """

    recipe: Recipe
    parameters: int
    support: Any


def check_model(recipe: Recipe) -> CheckedModel:
    """Checks the model, the tokenizer and the adapter of a recipe.

    The model is tried on a tiny copy of it, see `model.probe`.

    Raises:
        InputError: The model, tokenizer or adapter does not exist, or they do not fit together.
    """
    from sevenfold.engine.objectives import SpecialTokens
    from sevenfold.model import build
    from sevenfold.model.probe import probe

    require_modules(recipe.validation.bleu_tokenize)
    _check_loss_settings(recipe)
    changes: dict[str, Any] = {}
    if recipe.model.path:
        changes["model.path"] = build.model_path(recipe.model.path)
    if recipe.tokenizer.path:
        changes["tokenizer.path"] = storage.resolve_input(recipe.tokenizer.path)
    resolved = recipe.override(changes)
    tokenizer = None
    vocab_size, template = resolved.tokenizer.vocab_size, resolved.tokenizer.chat_template
    if vocab_size is not None:
        set_chat_template(SimpleNamespace(chat_template=None), template)  # only checks the setting
    else:
        path = resolved.tokenizer.path or build.local_model(str(resolved.model.path), weights=False)
        tokenizer = load_tokenizer(path)
        set_chat_template(tokenizer, template)
        if resolved.objective == "seq2seq":
            set_languages(tokenizer, resolved.data.languages)
            frames_of(resolved, tokenizer)
        # both raise InputError if the tokenizer lacks a token that the objective needs
        encoder_class = ENCODERS[resolved.objective]
        encoder_class(tokenizer, resolved.data.sequence_length, classes=resolved.data.classes)
        SpecialTokens.from_tokenizer(tokenizer, resolved.objective)
        vocab_size = len(tokenizer)
    parameters = build.check_model(resolved, vocab_size)
    config = build.config_of(resolved, vocab_size)
    build.check_weights(resolved, config)
    support = probe(resolved, config, tokenizer)
    return CheckedModel(resolved, parameters, support)


def _check_loss_settings(recipe: Recipe) -> None:
    """Raises InputError for a setting of the loss over tokens, if the objective has another loss.

    The recipe itself may have them, so that finished runs of earlier versions can be read.
    """
    if recipe.objective not in ("dpo", "embed"):
        return
    for name in ("z_loss", "label_smoothing"):
        if getattr(recipe.train, name):
            raise InputError(
                f"train.{name}: objective {recipe.objective} compares whole texts, and the setting "
                "is for losses of single tokens: remove it"
            )


def pin_model(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Returns the recipe with the commit of a model of the hub, so that a run keeps its model.

    Args:
        recipe: The recipe.
        folder: The run's folder. If the run was started before, it keeps the commit of that time.

    Raises:
        InputError: The hub cannot say the commit.
    """
    path = recipe.model.path
    if path is None or not hub.is_hub(path):
        return recipe
    stored = None
    if storage.exists(folder.recipe):
        stored = loads(storage.read_text(folder.recipe), folder.recipe).model.path
    return recipe.override({"model.path": hub.pinned(path, stored)})


def set_chat_template(tokenizer: Any, setting: str | None) -> None:
    """Gives a tokenizer the chat template that `tokenizer.chat_template` refers to.

    Args:
        tokenizer: The tokenizer. It keeps its own template without a setting, or if the setting is
            plain; the setting may name one of several templates that it has.
        setting: A name, "plain", or the path of a file with a Jinja template.

    Raises:
        InputError: There is no such template.
    """
    own: Any = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if setting is None or (setting == "plain" and own):
        return
    if setting == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif setting in named:
        tokenizer.chat_template = {**named, "default": named[setting]}
    else:
        names = f"one of the tokenizer's own ({', '.join(sorted(named))}), " if named else ""
        try:
            tokenizer.chat_template = storage.read_text(storage.resolve_input(setting))
        except (InputError, OSError) as e:
            raise InputError(
                f"tokenizer.chat_template: expected {names}plain, or a file with a Jinja template, "
                f"found {setting}: {e}"
            ) from None
