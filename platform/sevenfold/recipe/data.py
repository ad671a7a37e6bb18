"""The sections `data` and `tokenizer`: which documents are read, and how they become tokens."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sevenfold import storage
from sevenfold.recipe.locations import (
    WITH_SECRETS,
    Location,
    default_name,
    last_part,
    with_short_names,
)
from sevenfold.recipe.section import Problem, Section


def without_unset(tree: dict[str, Any], later: tuple[str, ...]) -> dict[str, Any]:
    """Returns a section's fields without those of later versions that are unset.

    Hashes of recipes and manifests thus stay those that earlier versions have stored.
    """
    return {key: value for key, value in tree.items() if key not in later or value}


class Filter(Section):
    """Keeps the documents whose value in `column` meets all the conditions that are given here.

    A document without a value in the column meets none of them.
    """

    column: str = Field(description="Name of the column (Parquet) or key (JSON lines)")
    min: float | None = Field(None, description="Smallest value that is kept. Default: no limit")
    max: float | None = Field(None, description="Largest value that is kept. Default: no limit")
    one_of: list[str | int | float | bool] | None = Field(
        None, min_length=1, description="Values that are kept. Default: all"
    )
    min_chars: int | None = Field(
        None, ge=0, description="Minimum length of a string, in characters. Default: no limit"
    )
    max_chars: int | None = Field(
        None, ge=0, description="Maximum length of a string, in characters. Default: no limit"
    )

    def problems(self) -> Iterator[Problem]:
        """Yields that the filter has no condition."""
        conditions = tuple(key for key in type(self).model_fields if key != "column")
        if all(getattr(self, key) is None for key in conditions):
            yield Problem(f"give at least one of {', '.join(conditions)}", conditions)


class Source(Section):
    """Documents in one file, in the files (shards) of a folder, or in those that match a glob.

    Local, or behind a URL that fsspec can open (s3, gs, http, ...), also a dataset of the Hugging
    Face Hub.
    """

    path: Location = Field(
        description="File, folder, glob or URL; a folder that `datasets` wrote with save_to_disk; "
        "or a dataset of the hub, hf://datasets/ORGANIZATION/NAME:train. A relative path starts at "
        "the current folder; in a submitted Ray job, at the job's working directory if it exists "
        "there"
    )
    name: str = Field(
        "",
        description="Name in data.curriculum and in the ledger. Default: the last part of path",
    )
    format: Literal["parquet", "jsonl", "txt", "csv", "tsv", "arrow"] | None = Field(
        None,
        description="File format. Default: by the file name's suffix, also before .gz and .zst. "
        "csv, tsv: with a header; cells are text as it is written, and an empty cell is a missing "
        "value. arrow: Arrow IPC files and streams, and Feather",
    )
    text: str = Field("text", description="Pretraining: the column or key that holds the document")
    shape: str | None = Field(
        None,
        description="Fine-tuning: the form of the rows. sft: messages, sharegpt, alpaca, pair; "
        "dpo: preference, preference-messages; classify: label; seq2seq: source-target; embed: "
        "query-document. Default: recognised by the names of the columns",
    )
    columns: dict[str, str] = Field(
        {},
        description="Fine-tuning: role -> column, for columns with other names than the usual: "
        "{source: en, target: de}",
    )
    separator: str | None = Field(
        None,
        description='txt: the string between two documents. "\\n": each line is one; "": each file '
        "is one. Default: a single file has one document per line; of several files (a folder or "
        "glob), each is one document, but one larger than data.max_document_mb has one per line",
    )
    encoding: str | None = Field(
        None,
        description="txt, jsonl, csv, tsv: the encoding of the files, such as gb18030, shift_jis, "
        "utf-16 or latin-1; or auto: it is guessed for each file. Default: utf-8",
    )
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Relative share of this source in the tokens of training. Give every source a "
        "weight, or none. Default: the sources are mixed in proportion to their sizes",
    )
    filters: list[Filter] = Field(
        [], description="A document is read if it passes all of these filters"
    )

    @field_validator("format", mode="before")
    @classmethod
    def _rename_format(cls, name: Any) -> Any:
        return "arrow" if name == "feather" else name

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, name: str | None) -> str | None:
        if name not in (None, "auto"):
            try:
                codecs.getincrementaldecoder(str(name))
            except LookupError:
                raise ValueError(
                    f"expected the name of an encoding, such as gb18030, or auto, found {name!r}"
                ) from None
        return name

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for role, column in columns.items():
            first = next(r for r, c in columns.items() if c == column)
            if first != role:
                raise ValueError(
                    f"expected a column of its own for each role, found {column!r} for {first} and "
                    f"{role}"
                )
        return columns

    @property
    def lines(self) -> str:
        """The separator; without one, that of the lines, as it was the default of versions."""
        return "\n" if self.separator is None else self.separator

    def to_json(self) -> dict[str, Any]:
        """Returns the fields; one that earlier versions do not have only if it is set."""
        return without_unset(self.model_dump(mode="json"), ("encoding",))

    @model_validator(mode="before")
    @classmethod
    def _add_name(cls, tree: Any, info: ValidationInfo) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("path"), str):
            return tree
        path, name = tree["path"], tree.get("name")
        # earlier versions made the name of the URL with its secrets
        if not name or (name == last_part(path) and WITH_SECRETS not in (info.context or {})):
            tree = tree | {"name": default_name(path)}
        return tree


class Stage(Section):
    """A change of the mixture of sources (data.curriculum), in force until the next stage."""

    at_tokens: int = Field(
        gt=0,
        description="Training tokens after which the stage begins. The change happens between two "
        "rounds of chunks, so up to half a round earlier or later; --dry-run prints where",
    )
    weights: dict[str, float] = Field(
        min_length=1,
        description="Source name -> relative share. A source that is not named is not read",
    )


Scalar = bool | int | float | str
_SOURCE_LISTS = ("sources", "validation", "test")  # fields of Data that are lists of sources


def number_text(value: bool | int | float) -> str:
    """Returns a number or boolean as its JSON text; 1.0 is the same number as 1, and so its text.

    Programs that store whole numbers beside missing ones make floating-point numbers of them.
    """
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return json.dumps(int(value) if whole else value)


def _label_text(value: Any) -> Any:
    """Returns a label as it is read from a data file: numbers and booleans as their JSON text."""
    return number_text(value) if isinstance(value, bool | int | float) else value


class Data(Section):
    """What is trained on, validated on and tested on, and in which order it is read."""

    path: Location | None = Field(
        None,
        description="Folder, file or URL that the paths of sources, validation and test are "
        "relative to. Default: each of them has a whole path of its own",
    )
    corpus: Literal["python"] | None = Field(
        None,
        description="Built-in corpus that is written before the run if it does not exist yet. "
        "python: the source code of this Python installation. Default: none",
    )
    sources: list[Source] = Field(min_length=1, description="The training documents")
    curriculum: list[Stage] = Field(
        [], description="Later mixtures of the sources, in ascending order of at_tokens"
    )
    validation: list[Source] = Field(
        [], description="Documents to validate on during training; never trained on"
    )
    test: list[Source] = Field(
        [],
        description="Documents that `sevenfold evaluate` measures on. Default: the documents of "
        "validation or held_out",
    )
    classes: list[Annotated[str, BeforeValidator(_label_text, json_schema_input_type=Scalar)]] = (
        Field(
            [],
            description="classify: the labels, in the order of the classes. Default: all labels in "
            "the sources, sorted",
        )
    )
    split_column: str | None = Field(
        None,
        min_length=1,
        description="Column that says which part a row belongs to: train (or training), validation "
        "(or valid, val, dev), test. The rows of each part then take the place of validation and "
        "test. Default: held_out divides the data, as it does if there is no such column",
    )
    held_out: float = Field(
        0,
        ge=0,
        le=0.5,
        description="Instead of validation: the fraction of the sources' documents to hold out "
        "from training. Chosen by a hash of the text, so that copies fall on the same side",
    )
    epochs: int | None = Field(
        None,
        gt=0,
        description="Maximum number of times that a document is read; then the data ends. "
        "Default: endless",
    )
    languages: dict[Literal["source", "target"], str] | None = Field(
        None,
        description="seq2seq with a multilingual tokenizer, such as mBART-50's or NLLB's: the "
        "codes of both languages, {source: en_XX, target: de_DE}. The target's is learnt, and the "
        "decoder begins with it when it generates. Default: none",
    )
    sequence_length: int = Field(
        gt=1,
        lt=2**31,
        description="Tokens per sequence, which is the model's context length in training",
    )
    packing: Literal["best_fit", "concatenate"] = Field(
        "best_fit",
        description="How documents are put into sequences. best_fit: no document is cut that fits "
        "into one sequence (arXiv 2404.10830); concatenate: end to end, without padding",
    )
    lanes: int | None = Field(
        None,
        gt=0,
        description="Number of lanes: the parallel streams into which the data order is divided. "
        "A step takes the same number of sequences from each, and each worker reads some of "
        "them; so the order does not depend on the number of workers. "
        "Default: the largest divisor of train.global_batch up to 256",
    )
    skip: list[tuple[int, int]] = Field(
        [],
        description="Ranges [first, last] of data steps that are not trained on; the first data "
        "step is 1",
    )
    ignore_columns: list[str] = Field(
        [],
        description="Columns of fine-tuning data, and keys of messages, that are not to be read, "
        "although they may have a meaning, such as system or weight. Columns and keys that are "
        "neither read nor listed here are reported",
    )
    on_bad_document: Literal["error", "skip"] = Field(
        "error",
        description="What to do about a document or file that cannot be read. error: stop; "
        "skip: leave it out, count it and report it",
    )
    max_document_mb: float = Field(
        64, gt=0, le=1024, description="A document longer than this number of MB is a bad document"
    )
    cache: Location | None = Field(
        None,
        description="Folder of a token cache, written by jobs/tokenize.py: tokens are read from "
        "it instead of encoding the text. Default: the text is encoded while it is read",
    )
    executor: Literal["ray", "inline"] = Field(
        "ray",
        description="Where text is tokenized and packed. ray: in Ray Data tasks beside the "
        "training workers; inline: in each training worker",
    )

    @model_validator(mode="before")
    @classmethod
    def _join_paths(cls, tree: Any, info: ValidationInfo) -> Any:
        """Joins `path` with the paths of all sources, and then removes it."""
        if not isinstance(tree, dict):
            return tree
        if WITH_SECRETS not in (info.context or {}):
            tree = with_short_names(tree, _SOURCE_LISTS)
        if not isinstance(tree.get("path"), str):
            return tree
        root = storage.keep_secrets(tree["path"]).rstrip("/")

        def join(source: Any) -> Any:
            if not isinstance(source, dict):
                return source
            parts = (root, source.get("path"))
            return source | {"path": "/".join(p for p in parts if p)}

        joined = {
            key: [join(source) for source in tree[key]]
            for key in _SOURCE_LISTS
            if isinstance(tree.get(key), list)
        }
        return tree | joined | {"path": None}

    def problems(self) -> Iterator[Problem]:
        """Yields settings that contradict each other."""
        if self.validation and self.held_out:
            yield Problem(
                "give either validation (separate sources) or held_out (a fraction of the sources)",
                ("held_out", "validation"),
            )
        if self.split_column and (self.validation or self.test):
            yield Problem(
                "give either split_column (its rows are divided by it) or validation and test",
                ("split_column", "validation", "test"),
            )
        yield from self._problems_of_weights()
        yield from self._problems_of_curriculum()
        for i, (first, last) in enumerate(self.skip):
            if not 1 <= first <= last:
                yield Problem(
                    "skip: expected ranges [first, last] with 1 <= first <= last, found "
                    f"[{first}, {last}]",
                    (f"skip.{i}",),
                )

    def _problems_of_weights(self) -> Iterator[Problem]:
        names = [s.name for s in self.sources]
        unweighted = [i for i, s in enumerate(self.sources) if s.weight is None]
        if 0 < len(unweighted) < len(self.sources):
            i = unweighted[0]
            yield Problem(
                f"sources: give every source a weight or none: {names[i]!r} has none",
                (f"sources.{i}",),
            )
        if not unweighted and len(set(names)) < len(names):
            i = next(i for i, n in enumerate(names) if n in names[:i])
            yield Problem(
                f"sources: two sources have the name {names[i]!r}: set `name` of each source",
                (f"sources.{i}",),
            )

    def _problems_of_curriculum(self) -> Iterator[Problem]:
        if self.curriculum and self.sources[0].weight is None:
            yield Problem(
                "curriculum: every source needs a weight, which holds before the first stage",
                ("sources.0", "curriculum"),
            )
        names, before = [s.name for s in self.sources], 0
        for i, stage in enumerate(self.curriculum):
            place = f"curriculum.{i}"
            if stage.at_tokens <= before:
                yield Problem(
                    "curriculum: at_tokens must increase from stage to stage, found "
                    f"{stage.at_tokens} after {before}",
                    (f"{place}.at_tokens",),
                )
            before = stage.at_tokens
            for name, weight in stage.weights.items():
                if name not in names:
                    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                    yield Problem(
                        f"curriculum: no source has the name {name!r}; did you mean {nearest!r}?",
                        (f"{place}.weights", "sources"),
                    )
                elif not 0 <= weight < float("inf"):
                    yield Problem(
                        f"curriculum: the weight of {name!r} must be 0 or more, found {weight}",
                        (f"{place}.weights",),
                    )
            if not sum(stage.weights.values()):
                yield Problem(
                    "curriculum: each stage needs a source with a weight above 0",
                    (f"{place}.weights",),
                )


class Tokenizer(Section):
    """Where the tokenizer comes from: a folder, the model's folder, or training on the sources."""

    path: Location | None = Field(
        None,
        description="Folder of a Hugging Face tokenizer. Default: the tokenizer in model.path",
    )
    vocab_size: int | None = Field(
        None,
        ge=300,
        le=2**24,
        description="Train a byte-level BPE tokenizer of this size on a sample of the sources. "
        "Default: none is trained",
    )
    chat_template: Location | None = Field(
        None,
        description="Chat template for conversations: the name of one that the tokenizer has; a "
        "file with a Jinja template; or plain, which gives a simple one to a tokenizer that has "
        "none. Default: the tokenizer's own, of several the one named default",
    )
    train_mb: float = Field(
        16, gt=0, description="Text that a new tokenizer is trained on, in MB, from all sources"
    )
