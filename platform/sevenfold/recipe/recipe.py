"""The recipe: all sections together, the checks across sections, and reading from YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from sevenfold import storage as files
from sevenfold.errors import InputError
from sevenfold.recipe.data import Data, Section, Tokenizer, without_unset
from sevenfold.recipe.locations import STORED, WITH_SECRETS, OutputLocation
from sevenfold.recipe.plain_yaml import load_yaml, read_yaml
from sevenfold.recipe.shipped import recipe_file
from sevenfold.recipe.sweep import BUDGETS, Sweep
from sevenfold.recipe.training import (
    Adapter,
    Checkpoint,
    Cluster,
    Contrastive,
    Corruption,
    Guard,
    Model,
    Optimizer,
    Parallel,
    Preference,
    Schedule,
    Train,
    Validation,
)

# Old names of sections, in recipes that runs have stored: old name -> name today.
_RENAMED = {"search": "sweep"}
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
        "runs", description="Folder or URL that holds the folders of runs (run_folder.py)"
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

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        """Checks what concerns more than one section."""
        self._check_workers()
        self._check_length_and_validation()
        self._check_model_and_tokenizer()
        return self

    def _check_workers(self) -> None:
        fewest, most = self.workers
        if fewest < most and self.parallel != Parallel():
            raise ValueError(
                "parallel.replicate and parallel.tensor need one number in cluster.num_workers, "
                "not a range"
            )
        count, name = most, "cluster.num_workers"
        for key, size in (
            ("parallel.replicate", self.parallel.replicate),
            ("parallel.tensor", self.parallel.tensor),
        ):
            if count % size:
                raise ValueError(f"{key} ({size}) must divide {name} ({count})")
            count, name = count // size, f"{name} / {key}"
        batch, lanes = self.train.global_batch, self.lanes
        if batch % lanes:
            raise ValueError(
                f"train.global_batch ({batch}) must be a multiple of data.lanes ({lanes})"
            )
        if lanes < self.readers:
            raise ValueError(
                f"data.lanes ({lanes}) must be at least cluster.num_workers / parallel.tensor "
                f"({self.readers}); its default is the largest divisor of "
                f"train.global_batch ({batch}) up to {MAX_DEFAULT_LANES}"
            )

    def _check_length_and_validation(self) -> None:
        if (self.train.steps or self.train.tokens or self.data.epochs) is None:
            raise ValueError(
                "train: give either steps or tokens; or data.epochs, to train as long as the data "
                "lasts"
            )
        is_generated = self.objective == "sft"  # an encoder-decoder's answer needs no room
        if is_generated and self.validation.max_new_tokens >= self.data.sequence_length:
            raise ValueError(
                f"validation.max_new_tokens ({self.validation.max_new_tokens}) must be below "
                f"data.sequence_length ({self.data.sequence_length}): there is no room for a prompt"
            )
        held_out = self.data.validation or self.data.held_out
        if self.validation.keeps_best and not (self.validation.every and held_out):
            raise ValueError(
                "validation: keep_best and patience need validation.every, and held-out documents: "
                "data.validation or data.held_out"
            )

    def _check_model_and_tokenizer(self) -> None:
        tokenizer = self.tokenizer
        if self.adapter is not None and self.model.path is None:
            raise ValueError(
                "adapter needs model.path: the base model is frozen, so a new one would never "
                "learn anything"
            )
        if tokenizer.path and tokenizer.vocab_size:
            raise ValueError("tokenizer: give either path or vocab_size")
        if not (tokenizer.path or tokenizer.vocab_size or self.model.path):
            raise ValueError("tokenizer: give path (an existing one) or vocab_size (to train one)")
        if self.objective not in PRETRAINING and self.data.packing != "best_fit":
            raise ValueError(
                f"data.packing: objective {self.objective} needs best_fit, which never cuts an "
                "example in two"
            )
        languages = self.data.languages
        if languages is not None and self.objective != "seq2seq":
            raise ValueError(
                f"data.languages is for objective seq2seq, found {self.objective}: remove it"
            )
        if languages is not None and len(languages) != 2:
            raise ValueError("data.languages: give both, such as {source: en_XX, target: de_DE}")
        if self.data.classes and self.objective != "classify":
            raise ValueError(
                f"data.classes is for objective classify, found {self.objective}: remove it"
            )
        if self.objective == "dpo" and self.model.path is None:
            raise ValueError(
                "objective dpo needs model.path: the model at the start is the reference model"
            )
        if self.objective == "denoise" and tokenizer.vocab_size and tokenizer.vocab_size < 512:
            raise ValueError(
                "tokenizer.vocab_size: denoise needs at least 512, 100 of which are sentinel tokens"
            )
        if tokenizer.vocab_size and self.model.path:
            raise ValueError(
                "tokenizer.vocab_size trains a new tokenizer, but the weights in model.path were "
                "trained with another one: remove one of the two keys"
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
        for old, new in _RENAMED.items():
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
        tree = _apply_changes(self.model_dump(mode="json"), changes, where="override")
        return _validate(tree, where="override").trusting(self._trusted_code)

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


def parse(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe from a file.

    Args:
        path: The file, or the name of a recipe that comes with sevenfold.
        overrides: Changes to it, each as key.path=value.

    Raises:
        InputError: The file cannot be read or is no YAML; or the recipe has an unknown key, a value
            of a wrong type, or settings that contradict each other.
    """
    changes = {}
    for item in overrides:
        key, equals_sign, value = item.partition("=")
        if not equals_sign or not key:
            raise InputError(f"{item!r}: expected key.path=value, for example train.steps=100")
        changes[key] = load_yaml(value, item)
        _refuse_old_name(key.partition(".")[0], item)
    path = recipe_file(path)
    tree = _check_tree(read_yaml(path, "a recipe (a YAML file)"), path)
    for key in tree:
        _refuse_old_name(key, path)
    tree = _apply_changes(tree, changes, path)
    if _pop_consent(tree):
        raise InputError(
            f"{path}: model.trust_remote_code: a recipe cannot allow the code of a model to run: "
            "remove it; the command says what to add to itself instead"
        )
    return _validate(tree, path)


def _refuse_old_name(key: str, where: str) -> None:
    if key in _RENAMED:
        raise InputError(f"{where}: unknown key {key!r}: it was renamed to {_RENAMED[key]!r}")


def loads(text: str, where: str, changes: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe that a run has stored. Unlike in `parse`, sections may have their old names.

    Args:
        text: The recipe, in YAML.
        where: The place that errors name, such as the file's path.
        changes: Values to replace, as {"key.path": value}.

    Raises:
        InputError: As `parse`.
    """
    return _validate(_apply_changes(_stored_tree(text, where), changes or {}, where), where, STORED)


def stored_hash(text: str, where: str) -> str:
    """Returns the hash of a recipe that a run has stored, as the version that stored it did.

    Earlier versions kept the secrets of URLs in recipes.

    Args:
        text: The recipe, in YAML.
        where: As in `loads`.
    """
    return _validate(_stored_tree(text, where), where, WITH_SECRETS).hash()


def _stored_tree(text: str, where: str) -> dict[str, Any]:
    stored = _check_tree(load_yaml(text, where), where)
    tree = {_RENAMED.get(key, key): value for key, value in stored.items()}
    _pop_consent(tree)
    return tree


def _pop_consent(tree: dict[str, Any]) -> bool:
    """Removes model.trust_remote_code, which earlier versions had, and returns its value."""
    model = tree.get("model")
    return bool(model.pop("trust_remote_code", False)) if isinstance(model, dict) else False


def _check_tree(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise InputError(
            f"{where}: expected a recipe (keys and values), found {type(tree).__name__}"
        )
    return tree


def _apply_changes(tree: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a copy of the tree with the changes; a number in a key path is an index of a list."""
    tree = json.loads(json.dumps(tree, default=str))
    for path, value in changes.items():
        node: Any = tree
        *parents, last = path.split(".")
        try:
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
                if not isinstance(node, dict | list):
                    raise KeyError(part)
            node[int(last) if isinstance(node, list) else last] = value
        except (KeyError, IndexError, ValueError, TypeError):
            raise InputError(f"{where}: unknown key {path!r}") from None
    return tree


def _validate(tree: dict[str, Any], where: str, *context: str) -> Recipe:
    """Builds the recipe; the first of pydantic's errors becomes one line.

    Args:
        tree: The recipe.
        where: The place that errors name.
        *context: How its URLs are read: locations.STORED or WITH_SECRETS.
    """
    try:
        return Recipe.model_validate(tree, context=dict.fromkeys(context))
    except ValidationError as e:
        errors = e.errors(include_url=False)
        first = errors[0]
        path = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        if first["type"] == "extra_forbidden":
            *parents, key = first["loc"]
            nearest = difflib.get_close_matches(str(key), _known_keys(parents), n=1, cutoff=0.0)[0]
            raise InputError(
                f"{where}: unknown key {path!r}; did you mean {nearest!r}?{more}"
            ) from None
        if first["type"] == "missing":
            raise InputError(f"{where}: required key {path!r} is missing{more}") from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        found = (
            ""
            if first["type"] == "value_error"
            else f", found {files.hide_secrets(repr(first['input']))[:200]}"
        )
        raise InputError(f"{where}: {path + ': ' if path else ''}{message}{found}{more}") from None


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Returns the keys that a recipe can have at a place, such as ("data", "sources", 0)."""
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the section in a field's type, such as Source in list[Source]; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = (_section_of(inner) for inner in get_args(annotation))
    return next((section for section in sections if section is not None), None)
