"""What is read, and by which tokenizer."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Filter(Section):
    """Keeps a document where its column passes every bound given; a value that is missing passes none."""

    column: str
    min: float | None = Field(None, description="Least value")
    max: float | None = Field(None, description="Greatest value")
    one_of: list[str | int | float | bool] | None = Field(None, min_length=1)
    min_chars: int | None = Field(None, ge=0, description="Fewest characters of a string")
    max_chars: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _any(self) -> Filter:
        if all(getattr(self, k) is None for k in type(self).model_fields if k != "column"):
            raise ValueError("give at least one of min, max, one_of, min_chars, max_chars")
        return self


class Source(Section):
    """Documents in shards: a file, a folder of shards or a glob, local or a URL (s3, gs, http and what fsspec knows)."""

    path: str = Field(description="File, folder or glob; relative paths: see storage.locate")
    name: str = Field("", description="What curriculum and ledger call it; default: the last part of path")
    format: Literal["parquet", "jsonl", "txt"] | None = Field(None, description="Default: by suffix; .gz and .zst are seen")
    text: str = Field("text", description="Column or key that holds a document (pretraining)")
    shape: str | None = Field(None, description="Fine-tuning: form of its rows (data/formats.py); default: by its columns")
    columns: dict[str, str] = Field(
        {}, description="Fine-tuning: role -> column, for columns of other names: {source: en, target: de}"
    )
    separator: str = Field("\n", description="txt: what parts documents; '' makes each file one document")
    weight: float | None = Field(None, gt=0, description="Share of the tokens; give all sources one, or none: by size")
    filters: list[Filter] = []

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and not tree.get("name") and isinstance(tree.get("path"), str):
            tree = tree | {"name": tree["path"].rstrip("/").rsplit("/", 1)[-1]}
        return tree


class Stage(Section):
    """A mixture that holds from a given token of the training on."""

    at_tokens: int = Field(gt=0, description="Begins here, to within half a round of windows (--dry-run says where)")
    weights: dict[str, float] = Field(min_length=1, description="Source name -> share; a source that is left out rests")


LISTS = ("sources", "validation", "test")  # of documents


def _label(given: Any) -> Any:
    """As labels of a source are read: a number or a truth value by its JSON."""
    return json.dumps(given) if isinstance(given, bool | int | float) else given


class Data(Section):
    path: str | None = Field(None, description="Folder, file or URL that the paths of sources, validation and test are under")
    corpus: Literal["python"] | None = Field(None, description="Corpus to make first where it is not there yet")
    sources: list[Source] = Field(min_length=1)
    curriculum: list[Stage] = Field([], description="Changes of the sources' weights, in the order of their tokens")
    validation: list[Source] = Field([], description="Held-out documents, never trained on")
    test: list[Source] = Field([], description="What `evaluate` measures on; default: the documents of validation or held_out")
    classes: list[Annotated[str, BeforeValidator(_label)]] = Field(
        [], description="classify: the labels; default: those of the sources, sorted"
    )
    held_out: float = Field(0, ge=0, le=0.5, description="Or: this part of the sources' documents, chosen by their hash")
    epochs: int | None = Field(None, gt=0, description="No document is read more often; the data then ends. Default: endless")
    sequence_length: int = Field(gt=1, description="Tokens a row, and the model's context in training")
    packing: Literal["best_fit", "concatenate"] = Field(
        "best_fit", description="best_fit cuts no document that fits into a row (arXiv 2404.10830); concatenate pads nothing"
    )
    lanes: int | None = Field(
        None, gt=0, description="Streams that the data order is dealt into; default min(64, global_batch)"
    )
    skip: list[tuple[int, int]] = Field([], description="Ranges [first, last] of data steps to pass over (1 is the first)")
    on_bad_document: Literal["error", "skip"] = Field("error", description="skip: leave it out, count and report it")
    max_document_mb: float = Field(64, gt=0, le=1024, description="A longer document is a bad one")
    cache: str | None = Field(None, description="Folder of tokens made by jobs/tokenize.py: read instead of the text")
    executor: Literal["ray", "inline"] = Field(
        "ray", description="Who makes the rows: Ray Data tasks beside the workers, or each worker itself"
    )

    @model_validator(mode="before")
    @classmethod
    def _under(cls, tree: Any) -> Any:
        """Once put together, the paths say it all."""
        if not isinstance(tree, dict):
            return tree
        if not isinstance(tree.get("path"), str):
            named = [s for k in LISTS for s in tree.get(k) or () if isinstance(s, dict)]
            if any("path" not in s for s in named):
                raise ValueError("a recipe that leaves open what it reads: give data.path=FILE_OR_FOLDER")
            return tree
        root = tree["path"].rstrip("/")

        def under(source: Any) -> Any:
            return (
                source | {"path": "/".join(p for p in (root, source.get("path")) if p)} if isinstance(source, dict) else source
            )

        lists = {k: [under(s) for s in tree[k]] for k in LISTS if isinstance(tree.get(k), list)}
        return tree | lists | {"path": None}

    @model_validator(mode="after")
    def _mixes(self) -> Data:
        if self.validation and self.held_out:
            raise ValueError("give either validation (sources of their own) or held_out (a part of the sources)")
        weighted = [s for s in self.sources if s.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            missing = next(s.name for s in self.sources if s.weight is None)
            raise ValueError(f"sources: give every source a weight or none: {missing!r} has none")
        names = [s.name for s in self.sources]
        if weighted and len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"sources: two are called {twice!r}: give each a name of its own (name)")
        if self.curriculum and not weighted:
            raise ValueError("curriculum: the sources need weights to begin with")
        begins = [stage.at_tokens for stage in self.curriculum]
        if begins != sorted(set(begins)):
            raise ValueError("curriculum: at_tokens must rise from stage to stage")
        for stage in self.curriculum:
            for name, weight in stage.weights.items():
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                    raise ValueError(f"curriculum: no source is called {name!r}; did you mean {near!r}?")
                if not 0 <= weight < float("inf"):
                    raise ValueError(f"curriculum: the weight of {name!r} must be 0 or more, found {weight}")
            if not sum(stage.weights.values()):
                raise ValueError("curriculum: a stage needs a source with a weight above 0")
        if any(not 1 <= first <= last for first, last in self.skip):
            raise ValueError("skip: give ranges [first, last] with 1 <= first <= last")
        return self


class Tokenizer(Section):
    path: str | None = Field(None, description="Folder of a Hugging Face tokenizer; default: the one beside model.path")
    vocab_size: int | None = Field(None, ge=300, description="Train a byte-level BPE of this size on the sources")
    chat_template: str | None = Field(
        None, description="For conversations: a file (Jinja), or plain, which is taken where there is none"
    )
    train_mb: float = Field(16, gt=0, description="Text that it is trained on, MB")
