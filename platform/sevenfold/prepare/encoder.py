"""The encoder that belongs to a prepared tokenizer."""

from __future__ import annotations

from datetime import date
from typing import Any

from sevenfold import storage
from sevenfold.data.backends import Backend
from sevenfold.data.encode import TextEncoder
from sevenfold.data.examples import ENCODERS, PairEncoder
from sevenfold.data.pair_frames import PairFrames, pair_frames
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

    def parse(description: Any) -> tuple[Backend, str | None, PairFrames | None]:
        storage.json_object(description)
        # runs of earlier versions have no date, and the same backend for all documents
        backend = Backend(
            description["backend"],
            description.get("by_reference", ""),
            description.get("by_line", False),
        )
        tree = description.get("frames")
        frames = None if tree is None else PairFrames.from_json(tree)
        today = description.get("today")
        if today is not None:
            date.fromisoformat(today)  # raises
        return backend, today, frames

    backend, today, frames = storage.read_json(encoder_file(tokenizer), parse)
    return build_encoder(recipe, tokenizer, backend, today, frames)


def build_encoder(
    recipe: Recipe,
    tokenizer: str,
    backend: Backend,
    today: str | None,
    frames: PairFrames | None = None,
) -> TextEncoder:
    """Returns the encoder of the recipe's objective.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer's folder.
        backend: The tokenizer backend, see `sevenfold.data.backends`.
        today: The date (ISO 8601) of the run's start, for chat templates that write it.
        frames: The frames of pairs. None: BOS source EOS and target EOS, or no pairs.
    """
    data = recipe.data
    encoder_class = ENCODERS[recipe.objective]
    options: dict[str, Any] = {} if frames is None else {"frames": frames}
    return encoder_class(
        load_tokenizer(tokenizer), data.sequence_length, backend, data.classes, today, **options
    )


def frames_of(recipe: Recipe, tokenizer: Any) -> PairFrames | None:
    """Returns the frames of pairs in a new run.

    A pretrained model gets those that it was trained with, which its tokenizer knows. A new model
    gets simpler ones, as does a run of another objective, which has no pairs: None.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer, with its languages set.

    Raises:
        InputError: The tokenizer has no usable ones.
    """
    if recipe.objective != "seq2seq" or recipe.model.path is None:
        return None
    return pair_frames(tokenizer)


def set_first_token(model: Any, encoder: TextEncoder) -> None:
    """Sets the token that the decoder has to begin with when it generates, as in training.

    This is, for example, the language of the target.
    """
    if isinstance(encoder, PairEncoder) and encoder.frames.target.before:
        model.generation_config.forced_bos_token_id = encoder.frames.target.before[0]


def encoder_file(tokenizer: str) -> str:
    """Returns the file in a tokenizer's folder that describes the encoder."""
    return storage.join(tokenizer, "encoder.json")
