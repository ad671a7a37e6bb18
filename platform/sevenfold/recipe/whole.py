"""A recipe as a whole, and its reading from YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from sevenfold.errors import InputError
from sevenfold.recipe.data import Data, Section, Tokenizer
from sevenfold.recipe.search import BUDGETS, Search
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

PRETRAINING = ("causal", "masked", "denoise")  # objectives of text as it is; the others are fine-tuning


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run and its folder")
    storage: str = Field("runs", description="Folder or URL that runs are kept under")
    seed: int = Field(0, ge=0, lt=2**32)
    objective: Literal["causal", "masked", "denoise", "sft", "dpo", "classify", "seq2seq", "embed"] = Field(
        "causal",
        description="Pretraining: next token (decoder), hidden tokens (encoder), spans (encoder-decoder). Fine-tuning: replies "
        "(decoder), preferred replies (decoder), classes (any), source to target (encoder-decoder), search (encoder)",
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
    search: Search | None = None

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        batch, lanes, ranks = self.train.global_batch, self.lanes, self.workers[1]
        if self.workers[0] < self.workers[1] and self.parallel != Parallel():
            raise ValueError("parallel.replicate and parallel.tensor need one number of cluster.num_workers, not a range")
        for name, ways in (("replicate", self.parallel.replicate), ("tensor", self.parallel.tensor)):
            if ranks % ways:
                raise ValueError(f"parallel.{name} {ways} must divide cluster.num_workers: {ranks} are left")
            ranks //= ways
        if batch % lanes:
            raise ValueError(f"train.global_batch {batch} cannot be dealt out to data.lanes {lanes}: it must be a multiple")
        if lanes < self.readers:
            raise ValueError(
                f"train.global_batch {batch} cannot be dealt out: {lanes} lanes for {self.readers} workers; "
                f"data.lanes must be at least cluster.num_workers (over parallel.tensor)"
            )
        if (self.train.steps or self.train.tokens or self.data.epochs) is None:
            raise ValueError("train: give either steps or tokens, or data.epochs for as many steps as the data lasts")
        if self.validation.max_new_tokens >= self.data.sequence_length:
            raise ValueError("validation.max_new_tokens must be below data.sequence_length: there is no room for a prompt")
        if self.validation.keeps_best and not (self.validation.every and (self.data.validation or self.data.held_out)):
            raise ValueError(
                "validation: keep_best and patience need validation.every, and held-out documents: data.validation "
                "or data.held_out"
            )
        if self.adapter is not None and self.model.path is None:
            raise ValueError("adapter needs model.path: it freezes the base, which would never learn anything")
        tokenizer = self.tokenizer
        if tokenizer.path and tokenizer.vocab_size:
            raise ValueError("tokenizer: give either path or vocab_size")
        if not (tokenizer.path or tokenizer.vocab_size or self.model.path):
            raise ValueError("tokenizer: give path (an existing one) or vocab_size (to train one)")
        if self.objective not in PRETRAINING and self.data.packing != "best_fit":
            raise ValueError(f"data.packing: objective {self.objective} needs best_fit, which cuts no example in two")
        if self.objective == "dpo" and self.model.path is None:
            raise ValueError("objective dpo needs model.path: it is measured from the model that it begins with")
        if self.objective == "denoise" and tokenizer.vocab_size and tokenizer.vocab_size < 512:
            raise ValueError("tokenizer.vocab_size: denoise needs at least 512: 100 of them stand for spans")
        if tokenizer.vocab_size and self.model.path:
            raise ValueError("tokenizer.vocab_size trains a new tokenizer, which model.path's weights do not know")
        return self

    @property
    def lanes(self) -> int:
        return self.data.lanes or min(64, self.train.global_batch)

    @property
    def readers(self) -> int:
        """Workers, at most, that read rows of their own; tensor parallel neighbours read the same."""
        return self.workers[1] // self.parallel.tensor

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most."""
        given = self.cluster.num_workers
        return given if isinstance(given, tuple) else (given, given)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps; 0 where they follow from data.epochs (runs.prepare counts them)."""
        return self.train.steps or -(-(self.train.tokens or 0) // self.tokens_per_step)

    def identity(self) -> dict[str, Any]:
        """What decides the run's numbers: all but where it runs, where it is kept, how often it speaks, and what is
        decided on the way (data to skip, a sweep's budgets)."""
        out = self.model_dump(mode="json", exclude={"name", "storage", "cluster", "checkpoint", "parallel"})
        for key in ("executor", "cache", "skip", "on_bad_document"):
            del out["data"][key]
        for key in ("log_every", "activation_checkpointing", "compile", "loss_chunk"):
            del out["train"][key]
        del out["model"]["attention"], out["model"]["trust_remote_code"]
        for key in BUDGETS if out["search"] else ():
            del out["search"][key]
        return out

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def override(self, changes: dict[str, Any]) -> Recipe:
        """A recipe with `{"key.path": value}` put in. Raises InputError as `load` does."""
        return _validate(_put(self.model_dump(mode="json"), changes, where="override"), where="override")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads 1e-3 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe and puts `key.path=value` overrides in.

    Raises:
        InputError: no such file, no YAML, an unknown key, a wrong type, settings that do not fit together.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: expected a recipe (YAML), found none: {getattr(e, 'strerror', None) or e}") from None
    changes = {}
    for item in overrides:
        key, sep, value = item.partition("=")
        if not sep or not key:
            raise InputError(f"{item!r}: expected key.path=value, for example train.steps=100")
        changes[key] = _yaml(value, item)
    return loads(text, path, changes)


def loads(text: str, where: str, changes: dict[str, Any] | None = None) -> Recipe:
    """A recipe from YAML text with `{"key.path": value}` put in; `where` names it in errors. Raises as `parse`."""
    tree = _yaml(text, where)
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected a recipe (keys and values), found {type(tree).__name__}")
    return _validate(_put(tree, changes or {}, where), where)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: expected YAML, found {getattr(e, 'problem', e)}") from None


def _put(tree: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    tree = json.loads(json.dumps(tree, default=str))
    for path, value in changes.items():
        at: Any = tree
        *parents, last = path.split(".")
        try:
            for part in parents:
                at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
                if not isinstance(at, dict | list):
                    raise KeyError(part)
            at[int(last) if isinstance(at, list) else last] = value
        except (KeyError, IndexError, ValueError, TypeError):
            raise InputError(f"{where}: {path}: no such place in the recipe") from None
    return tree


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        first = errors[0]
        path = ".".join(str(p) for p in first["loc"])
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _keys(first["loc"][:-1]), n=1, cutoff=0.0)
            raise InputError(f"{where}: unknown key {path!r}; did you mean {near[0]!r}?{more}") from None
        if first["type"] == "missing":
            raise InputError(f"{where}: {path}: expected a value, found none{more}") from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
        raise InputError(f"{where}: {path + ': ' if path else ''}{message}{found}{more}") from None


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the recipe knows at a place."""
    model: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)
