"""The recipe: all sections together, and the checks across sections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr

from sevenfold import storage as files
from sevenfold.recipe.data import Data, Tokenizer, without_unset
from sevenfold.recipe.locations import OutputLocation
from sevenfold.recipe.section import Problem, Section
from sevenfold.recipe.sweep import BUDGETS, Sweep
from sevenfold.recipe.training import (
    Adapter,
    Checkpoint,
    Contrastive,
    Corruption,
    Guard,
    Model,
    Optimizer,
    Preference,
    Schedule,
    Train,
    Validation,
)
from sevenfold.recipe.workers import Cluster, Parallel

# Old names of sections, in recipes that runs have stored: old name -> name today.
RENAMED = {"search": "sweep"}
# Objectives that train on plain text; the others are fine-tuning, on rows of examples.
PRETRAINING = ("causal", "masked", "denoise")
# More lanes divide well among more numbers of workers, but each has a chunk in memory, and a small
# corpus is divided into smaller chunks, which have more padding.
MAX_DEFAULT_LANES = 256


class Recipe(files.CarriesSecrets, Section):
    """All settings of a run. `parse` reads one from a file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run, and of its folder in storage",
    )
    storage: OutputLocation = Field(
        "runs", description="Folder or URL that holds the folders of runs"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of everything random: initial weights, data order, masks, sampling",
    )
    objective: Literal[
        "causal", "masked", "denoise", "sft", "dpo", "classify", "seq2seq", "embed"
    ] = Field(
        "causal",
        description="What is learned. Pretraining: causal, the next token (decoder); masked, "
        "hidden tokens (encoder); denoise, removed spans (encoder-decoder). Fine-tuning: sft, "
        "replies (decoder); dpo, preferred replies (decoder); classify, classes (any); seq2seq, "
        "source to target (encoder-decoder); embed, retrieval (encoder)",
    )
    data: Data
    tokenizer: Tokenizer = Tokenizer()
    model: Model
    adapter: Adapter | None = None
    corruption: Corruption = Corruption()
    preference: Preference = Preference()
    contrastive: Contrastive = Contrastive()
    train: Train
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    guard: Guard = Guard()
    parallel: Parallel = Parallel()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    sweep: Sweep | None = None

    # No file can set it, and it is not written to any.
    _trusted_code: frozenset[str] = PrivateAttr(frozenset())

    def problems(self) -> Iterator[Problem]:
        """Yields what concerns more than one section."""
        yield from self._problems_of_workers()
        yield from self._problems_of_length_and_validation()
        yield from self._problems_of_model_and_tokenizer()
        yield from self._problems_of_data()

    def _problems_of_workers(self) -> Iterator[Problem]:
        fewest, most = self.workers
        layout = ("parallel.replicate", "parallel.tensor")
        if fewest < most and self.parallel != Parallel():
            yield Problem(
                "parallel.replicate and parallel.tensor need one number in cluster.num_workers, "
                "not a range",
                ("cluster.num_workers", *layout),
            )
        batch, lanes = self.train.global_batch, self.lanes
        if batch % lanes:
            yield Problem(
                f"train.global_batch ({batch}) must be a multiple of data.lanes ({lanes})",
                ("data.lanes", "train.global_batch"),
            )
        count, name = most, "cluster.num_workers"
        for key, size in zip(layout, (self.parallel.replicate, self.parallel.tensor), strict=True):
            if count % size:
                yield Problem(
                    f"{key} ({size}) must divide {name} ({count})", (key, "cluster.num_workers")
                )
                return  # the workers have no layout, so nothing can be said about their lanes
            count, name = count // size, f"{name} / {key}"
        if lanes < self.readers:
            yield Problem(
                f"data.lanes ({lanes}) must be at least cluster.num_workers / parallel.tensor "
                f"({self.readers}); its default is the largest divisor of "
                f"train.global_batch ({batch}) up to {MAX_DEFAULT_LANES}",
                ("cluster.num_workers", "parallel.tensor", "data.lanes", "train.global_batch"),
            )

    def _problems_of_length_and_validation(self) -> Iterator[Problem]:
        if (self.train.steps or self.train.tokens or self.data.epochs) is None:
            yield Problem(
                "train: give either steps or tokens; or data.epochs, to train as long as the data "
                "lasts",
                ("train.steps", "train.tokens", "data.epochs"),
            )
        is_generated = self.objective == "sft"  # an encoder-decoder's answer needs no room
        if is_generated and self.validation.max_new_tokens >= self.data.sequence_length:
            yield Problem(
                f"validation.max_new_tokens ({self.validation.max_new_tokens}) must be below "
                f"data.sequence_length ({self.data.sequence_length}): there is no room for a "
                "prompt",
                ("validation.max_new_tokens", "data.sequence_length", "objective"),
            )
        held_out = self.data.validation or self.data.held_out
        if self.validation.keeps_best and not (self.validation.every and held_out):
            yield Problem(
                "validation: keep_best and patience need validation.every, and held-out documents: "
                "data.validation or data.held_out",
                (
                    *(("validation.patience",) if self.validation.patience else ()),
                    "validation.keep_best",
                    *(() if self.validation.every else ("validation.every",)),
                    *(() if held_out else ("data.validation", "data.held_out")),
                ),
            )

    def _problems_of_model_and_tokenizer(self) -> Iterator[Problem]:
        tokenizer = self.tokenizer
        if self.adapter is not None and self.model.path is None:
            yield Problem(
                "adapter needs model.path: the base model is frozen, so a new one would never "
                "learn anything",
                ("adapter", "model.path"),
            )
        if tokenizer.path and tokenizer.vocab_size:
            yield Problem(
                "tokenizer: give either path or vocab_size",
                ("tokenizer.vocab_size", "tokenizer.path"),
            )
        if not (tokenizer.path or tokenizer.vocab_size or self.model.path):
            yield Problem(
                "tokenizer: give path (an existing one) or vocab_size (to train one)",
                ("tokenizer.path", "tokenizer.vocab_size", "model.path"),
            )
        if self.objective == "dpo" and self.model.path is None:
            yield Problem(
                "objective dpo needs model.path: the model at the start is the reference model",
                ("objective", "model.path"),
            )
        if self.objective == "denoise" and tokenizer.vocab_size and tokenizer.vocab_size < 512:
            yield Problem(
                "tokenizer.vocab_size: denoise needs at least 512, 100 of which are sentinel "
                "tokens",
                ("tokenizer.vocab_size", "objective"),
            )
        if tokenizer.vocab_size and self.model.path:
            yield Problem(
                "tokenizer.vocab_size trains a new tokenizer, but the weights in model.path were "
                "trained with another one: remove one of the two keys",
                ("tokenizer.vocab_size", "model.path"),
            )

    def _problems_of_data(self) -> Iterator[Problem]:
        if self.objective not in PRETRAINING and self.data.packing != "best_fit":
            yield Problem(
                f"data.packing: objective {self.objective} needs best_fit, which never cuts an "
                "example in two",
                ("data.packing", "objective"),
            )
        languages = self.data.languages
        if languages is not None and self.objective != "seq2seq":
            yield Problem(
                f"data.languages is for objective seq2seq, found {self.objective}: remove it",
                ("data.languages", "objective"),
            )
        if languages is not None and len(languages) != 2:
            yield Problem(
                "data.languages: give both, such as {source: en_XX, target: de_DE}",
                ("data.languages",),
            )
        if self.data.classes and self.objective != "classify":
            yield Problem(
                f"data.classes is for objective classify, found {self.objective}: remove it",
                ("data.classes", "objective"),
            )

    @property
    def lanes(self) -> int:
        """The number of lanes of the data order of a run that is started now."""
        batch = self.train.global_batch
        most = min(MAX_DEFAULT_LANES, batch)
        return self.data.lanes or next(n for n in range(most, 0, -1) if batch % n == 0)

    @property
    def earlier_lanes(self) -> int:
        """The number of lanes of a run that was started by an earlier version."""
        return self.data.lanes or min(64, self.train.global_batch)

    @property
    def readers(self) -> int:
        """The largest number of workers that read different sequences.

        The workers of one tensor parallel group read the same ones.
        """
        return self.workers[1] // self.parallel.tensor

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        count = self.cluster.num_workers
        return count if isinstance(count, tuple) else (count, count)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all workers; padding counts."""
        return self.train.global_batch * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps; 0 if data.epochs decides, until prepare.job.prepare_job has counted."""
        return self.train.steps or -(-(self.train.tokens or 0) // self.tokens_per_step)

    def identity(self) -> dict[str, Any]:
        """Returns the settings that decide a run's numbers: they must be the same to resume it.

        Left out are settings about where a run computes and where it is stored, how often it logs,
        and those that may be decided while it runs (data to skip, a sweep's budget).
        """
        tree = self.model_dump(
            mode="json", exclude={"name", "storage", "cluster", "checkpoint", "parallel"}
        )
        for key in ("executor", "cache", "skip", "on_bad_document"):
            del tree["data"][key]
        # settings that recipes of earlier versions do not have change no hash while they are unset
        tree["data"] = without_unset(tree["data"], ("ignore_columns", "languages", "split_column"))
        for key in ("sources", "validation", "test"):
            # a separator that is unset had this value in earlier versions, which runs have stored;
            # that it is not set later is checked where a run's recipes are compared
            tree["data"][key] = [
                without_unset(s, ("encoding",)) | {"separator": source.lines}
                for s, source in zip(tree["data"][key], getattr(self.data, key), strict=True)
            ]
        for key in ("log_every", "activation_checkpointing", "compile", "loss_chunk"):
            del tree["train"][key]
        del tree["model"]["attention"]
        for key in BUDGETS if tree["sweep"] else ():
            del tree["sweep"][key]
        # how answers are measured; the default of earlier versions, whose hashes runs have stored
        tree["validation"]["bleu_tokenize"] = "13a"
        # a new name changes no number: the hash stays that of the old name, which runs have stored
        for old, new in RENAMED.items():
            tree[old] = tree.pop(new)
        return tree

    def hash(self) -> str:
        """Returns the SHA-256 of the identity, by which a run's folder and checkpoints know it."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Returns the recipe as YAML, defaults included."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
        )

    def override(self, changes: dict[str, Any]) -> Recipe:
        """Returns a recipe with other values.

        Args:
            changes: The values, as {"key.path": value}.

        Raises:
            InputError: As `parse`.
        """
        from sevenfold.recipe.reading import changed  # which reads recipes, and imports them

        return changed(self, changes).trusting(self._trusted_code)

    @property
    def trusted_code(self) -> frozenset[str]:
        """The hashes of the Python code of models that the user has agreed to run."""
        return self._trusted_code

    def trusting(self, hashes: Iterable[str] | None) -> Recipe:
        """Returns the recipe of a user who agrees to run Python code of models.

        Args:
            hashes: The hash of each model's code, see `model.remote_code`.
        """
        recipe = self.model_copy()
        recipe._trusted_code = frozenset(hashes or ())
        return recipe
