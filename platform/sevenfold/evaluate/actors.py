"""Ray Data actors that hold a model and apply it to held-out rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch

from sevenfold.cluster import connect
from sevenfold.data.examples import ENCODERS, ClassEncoder, ConversationEncoder, PairEncoder
from sevenfold.data.rows import IGNORE, Rows
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.engine.decode import Sampling, generate, generation_config
from sevenfold.engine.objectives import (
    Preference,
    attach_losses,
    build_objective,
    padded_batch,
)
from sevenfold.inference.embed import Embedder
from sevenfold.model import build, remote_code
from sevenfold.model.config import local_folder
from sevenfold.model.probe import probe
from sevenfold.recipe import Recipe
from sevenfold.run_folder import RunFolder

BATCH = 32  # maximum number of rows or prompts per call of an actor


class ActorPool(NamedTuple):
    """The processes that hold the model during an evaluation.

    Attributes:
        size: The number of actors.
        gpus_per_actor: The number of GPUs of each actor.
    """

    size: int
    gpus_per_actor: int


def map_rows(
    rows: pa.Table, actor: type, arguments: dict[str, Any], pool: ActorPool, batch: int = BATCH
) -> list[dict[str, Any]]:
    """Applies a model to all rows and returns its outputs in the order of the rows.

    Args:
        rows: The rows.
        actor: The class of the actors.
        arguments: The keyword arguments with which each actor is created.
        pool: The number of actors, and their resources.
        batch: Rows per call of an actor.
    """
    blocks = max(1, min(len(rows), 4 * pool.size))
    data = ray.data.from_arrow(rows).repartition(blocks)
    data.context.enable_progress_bars = False
    data.context.execution_options.preserve_order = True
    outputs = data.map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=batch,
        batch_format="numpy",
        num_cpus=1,
        num_gpus=pool.gpus_per_actor,
        compute=ray.data.ActorPoolStrategy(size=pool.size),
    )
    with connect.unwrapped_errors():
        return list(outputs.take_all())


class Scorer:
    """An actor that computes the objective's losses on packed rows.

    Args:
        folder: The run.
        recipe: Its recipe, with an absolute `model.path`.
        base: Whether to use the model that the run began with.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, base: bool = False):
        torch.set_num_threads(1)
        self._model = _load_model(folder, recipe, base)
        support = probe(recipe, self._model.config)
        self._objective = build_objective(
            recipe, load_tokenizer(folder.tokenizer), self._model.config, support
        )
        if isinstance(self._objective, Preference):
            reference = _load_model(folder, recipe, base=True)
            causal = self._objective.reference_objective()
            attach_losses(reference, causal, recipe.train.loss_chunk)
            self._objective.reference = reference
        self._losses = attach_losses(self._model, self._objective, recipe.train.loss_chunk)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns one row per batch.

        Args:
            batch: The fields of `Rows` as columns, with a row's `starts` in one value.

        Returns:
            `nats`, the sum of the losses; `targets`, the number of labels; `right`, the number of
            labels that the model predicts correctly (0 if the objective makes no predictions).
        """
        targets = np.stack(list(batch["targets"])) if "targets" in batch else None
        rows = Rows(
            np.stack(list(batch["tokens"])),
            np.concatenate(list(batch["starts"])),
            batch["used"],
            targets,
        )
        inputs = self._objective.collate(rows, 0).to(self._model.device)
        losses, predictions = self._losses(inputs, with_predictions=True)
        is_target = inputs.labels != IGNORE
        nats = float(losses.double().sum())
        right = 0
        if predictions is not None:
            right = int((predictions == inputs.labels)[is_target].sum())
        return {
            "nats": np.array([nats]),
            "targets": np.array([int(is_target.sum())]),
            "right": np.array([right]),
        }


class Completer:
    """An actor that generates completions of prompts.

    Args:
        folder: The run.
        recipe: Its recipe, with an absolute `model.path`.
        sampling: How tokens are chosen.
        base: Whether to use the model that the run began with.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, sampling: Sampling, base: bool = False):
        torch.set_num_threads(1)
        self._model = _load_model(folder, recipe, base)
        self._tokenizer = load_tokenizer(folder.tokenizer)
        self._encoder = ENCODERS[recipe.objective](self._tokenizer, recipe.data.sequence_length)
        self._sampling = sampling
        # An encoder-decoder reads the prompt in its encoder, where the completion needs no room.
        encoder_decoder = isinstance(self._encoder, PairEncoder)
        reserved = 0 if encoder_decoder else sampling.max_new_tokens
        self._max_prompt_tokens = recipe.data.sequence_length - reserved

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds the columns `completion` and `ended` to the rows.

        Args:
            batch: Rows with the prompt in the column `model_input`: a text, or a conversation as in
                the field of a document. Other columns are passed on.

        Returns:
            `ended` is False where the maximum number of new tokens cut the completion.
        """
        torch.manual_seed(self._sampling.seed)
        config = generation_config(self._model, self._tokenizer, self._sampling, plain=True)
        prompts = [self._prompt(text) for text in batch["model_input"]]
        completions = generate(self._model, self._tokenizer, prompts, config)
        texts = np.array([c.text for c in completions], dtype=object)
        return {**batch, "completion": texts, "ended": np.array([c.ended for c in completions])}

    def _prompt(self, text: str) -> list[int]:
        if isinstance(self._encoder, ConversationEncoder | PairEncoder):
            return self._encoder.prompt(text, self._max_prompt_tokens)
        head = [] if self._encoder.head is None else [self._encoder.head]
        ids = [*head, *self._encoder.ids([text])[0]]
        return ids[: self._max_prompt_tokens]


class Classifier:
    """An actor that classifies texts."""

    def __init__(self, folder: RunFolder, recipe: Recipe):
        torch.set_num_threads(1)
        self._model = _load_model(folder, recipe)
        self._pad = self._model.config.pad_token_id or 0
        self._encoder = ClassEncoder(load_tokenizer(folder.tokenizer), recipe.data.sequence_length)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds the column `class`, the index of the predicted class, to rows with a `text`."""
        token_ids = self._encoder.ids(list(batch["text"]))
        texts = [np.array(self._encoder.framed(ids)) for ids in token_ids]
        inputs = padded_batch(texts, self._pad).to(self._model.device)
        outputs = self._model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return {**batch, "class": outputs.logits.argmax(-1).cpu().numpy()}


class Embedding:
    """An actor that embeds texts."""

    def __init__(self, model: str, length: int):
        torch.set_num_threads(1)
        self._embed = Embedder(model, batch_size=BATCH, max_length=length)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the embedding of each `text` in the column `vector`."""
        return {"vector": self._embed(list(batch["text"]))}


def _load_model(folder: RunFolder, recipe: Recipe, base: bool = False) -> Any:
    """Loads a run's model, or its base, in float32.

    It is on the actor's GPU if the actor has one; Ray hides the other GPUs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_class, _ = build.MODEL_CLASSES[recipe.objective]
    path = build.local_model(str(recipe.model.path)) if base else local_folder(folder.model)
    model = model_class.from_pretrained(
        path,
        dtype=torch.float32,
        trust_remote_code=remote_code.is_allowed(recipe, path),
        local_files_only=True,
    )
    return model.eval().to(device)
