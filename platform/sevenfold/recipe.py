"""The recipe: every setting of a run, typed. What a field means and its unit stand beside it.

A recipe is YAML, changed on the command line by `key.path=value`; an unknown key names the nearest known one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sevenfold.errors import InputError


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
    text: str = Field("text", description="Column or key that holds a document (objective causal)")
    prompt: str = Field("prompt", description="Column or key that holds what is asked (objective sft)")
    completion: str = Field("completion", description="Column or key that holds what is learnt (objective sft)")
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


class Data(Section):
    corpus: Literal["python"] | None = Field(None, description="Corpus to make first where it is not there yet")
    sources: list[Source] = Field(min_length=1)
    curriculum: list[Stage] = Field([], description="Changes of the sources' weights, in the order of their tokens")
    validation: list[Source] = Field([], description="Held-out documents, never trained on")
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
    train_mb: float = Field(16, gt=0, description="Text that it is trained on, MB")


class Model(Section):
    config: dict[str, Any] | None = Field(None, description="transformers config of a new model: model_type and its fields")
    path: str | None = Field(None, description="Folder of a model to start from: a run of ours or any Hugging Face directory")
    trust_remote_code: bool = Field(False, description="Run Python code that lies in the model's folder")
    attention: Literal["auto", "sdpa", "flex_attention", "eager"] = Field(
        "auto", description="Kernel; auto: flex_attention for decoders on CUDA (packed documents as a block mask), else sdpa"
    )

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.config is None) == (self.path is None):
            raise ValueError("give either config (a new model) or path (one to start from)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama")
        return self


class Adapter(Section):
    """LoRA (arXiv 2106.09685), by peft: the base is frozen."""

    rank: int = Field(8, gt=0)
    alpha: int = Field(16, gt=0, description="Scale: the update counts alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Its masks are drawn a worker: they change with num_workers")
    target_modules: str | list[str] = Field("all-linear", description="As in peft's LoraConfig")


class Corruption(Section):
    """What the objectives masked (arXiv 1810.04805) and denoise (arXiv 1910.10683) take out of the text."""

    rate: float = Field(0.15, gt=0, lt=1, description="Part of the tokens")
    mean_span: float = Field(3.0, ge=1, description="denoise: mean length of a span, tokens")


class Train(Section):
    global_batch: int = Field(gt=0, description="Rows an optimizer step, over all workers")
    micro_batch: int = Field(gt=0, description="Rows a worker's forward pass holds at once")
    steps: int | None = Field(None, gt=0, description="Default: as many as data.epochs last")
    tokens: int | None = Field(None, gt=0, description="Instead of steps: rounded up to whole steps")
    max_grad_norm: float = Field(1.0, gt=0)
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of log(Z)^2 of each token's logits, against their drift; not in the loss shown (PaLM: 1e-4)",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of parameters in forward and backward; shards and sums stay float32"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="What backward makes again instead of keeping: nothing, all but matrix products, whole blocks"
    )
    compile: bool = Field(False, description="torch.compile, block by block: a minute or more at the start")
    loss_chunk: int | None = Field(None, gt=0, description="Tokens whose logits stand in memory at once; default: all")
    log_every: int = Field(10, gt=0, description="Steps between log lines")

    @model_validator(mode="after")
    def _one(self) -> Train:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give either steps or tokens")
        return self


class Optimizer(Section):
    """Defaults: Llama 3 (arXiv 2407.21783) and OLMo 2 (arXiv 2501.00656)."""

    name: Literal["adamw", "muon"] = Field("adamw", description="muon: for matrices; all else by AdamW")
    learning_rate: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="L2; not on norms, biases and embeddings")
    momentum: float = Field(0.95, ge=0, lt=1, description="muon")


class Schedule(Section):
    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup_steps: int = Field(0, ge=0)
    decay_fraction: float = Field(0.1, ge=0, le=1, description="wsd: the last part of training, decayed linearly")
    min_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the end, as a part of the peak")


class Guard(Section):
    """What happens where loss or gradient norm are not finite, or jump: the step is left out and no weight changed."""

    spike_factor: float | None = Field(
        None, gt=1, description="A gradient norm above so many times its running mean is a spike; default: never"
    )
    max_skipped: int = Field(5, gt=0, description="So many left out in a row: back to the last checkpoint, past their data")
    max_rollbacks: int = Field(2, ge=0, description="One more, and the run stops")


class Validation(Section):
    every: int | None = Field(None, gt=0, description="Steps; default: only at the end")
    rows: int = Field(64, gt=0, description="Held-out rows a validation reads")
    generate: int = Field(0, ge=0, description="sft: held-out prompts completed and scored by ROUGE-L")
    max_new_tokens: int = Field(24, gt=0)


class Checkpoint(Section):
    every: int | Literal["auto"] | None = Field(
        None, description="Steps; auto: by what saves are found to cost and mtbf_hours; default: only at the end"
    )
    mtbf_hours: float = Field(
        50_700,
        gt=0,
        description="auto: a worker's mean hours between failures. Default: Llama 3's (arXiv 2407.21783, section 3.3.4), "
        "419 unexpected interruptions of 16,384 GPUs in 54 days",
    )
    keep: int = Field(2, gt=0, description="Newest checkpoints kept")
    keep_every: int | None = Field(None, gt=0, description="Those of multiples of so many steps are kept for good")

    @field_validator("every", mode="before")
    @classmethod
    def _steps(cls, given: Any) -> Any:
        if given not in (None, "auto") and (type(given) is not int or given < 1):
            raise ValueError(f"expected a number of steps above 0, or auto, found {given!r}")
        return given


class Parallel(Section):
    """How workers divide a model: each group of `tensor` workers splits its matrices, `replicate` groups hold whole copies,
    and FSDP shards over the rest. Rounding apart it changes no number."""

    replicate: int = Field(1, gt=0, description="HSDP: copies of the model; shards are gathered within one")
    tensor: int = Field(1, gt=0, description="Tensor parallelism: workers that split each matrix; they read the same rows")


class Cluster(Section):
    num_workers: int | tuple[int, int] = Field(
        1, description="Or [fewest, most]: grows and shrinks with the cluster; the global batch and the data order stay"
    )
    cpus_per_worker: float = Field(1, gt=0, description="Below 1, workers share cores; a worker computes with as many threads")
    gpus_per_worker: int = Field(0, ge=0, le=1, description="1: CUDA and nccl; 0: CPU and gloo")
    max_failures: int = Field(3, ge=0, description="Worker failures survived before the run counts as failed")
    resize_seconds: float = Field(60, gt=0, description="Between looks for room for more workers, of a range")
    wait_seconds: float = Field(300, ge=0, description="How long to wait for resources that the cluster has but others hold")
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak that MFU is stated against, a worker; default: table (GPU) or measured (CPU)"
    )

    @field_validator("num_workers", mode="before")
    @classmethod
    def _count(cls, given: Any) -> Any:
        both = given if isinstance(given, list | tuple) else (given, given)
        if len(both) != 2 or not all(type(n) is int and n > 0 for n in both) or both[0] > both[1]:
            raise ValueError(f"expected a number above 0, or [fewest, most], found {given!r}")
        return tuple(both) if both is given else given


class Space(Section):
    """One hyperparameter's space; exactly one field is given."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    choice: list[Any] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> Space:
        given = [k for k in type(self).model_fields if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, loguniform, choice")
        low_high = self.uniform or self.loguniform
        if low_high and not low_high[0] < low_high[1]:
            raise ValueError(f"the space has no point: {low_high[0]} is not below {low_high[1]}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs a lower end above 0")
        return self


class Search(Section):
    """Grace 20% and eta 3 keep the best of 1,194 published LLM curves with p 0.996 (DESIGN, section 9)."""

    space: dict[str, Space] = Field(min_length=1, description="key.path of the recipe -> its space")
    trials: int = Field(gt=0)
    metric: str = "validation/loss"
    mode: Literal["min", "max"] = "min"
    scheduler: Literal["asha", "none"] = "asha"
    grace: float = Field(0.2, gt=0, le=1, description="Part of the steps that every trial gets")
    eta: float = Field(3, gt=1, description="At each rung the best 1/eta go on")
    max_concurrent: int | None = Field(None, gt=0, description="Default: as many as the cluster holds")


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run and its folder")
    storage: str = Field("runs", description="Folder or URL that runs are kept under")
    seed: int = Field(0, ge=0, lt=2**32)
    objective: Literal["causal", "masked", "denoise", "sft"] = Field(
        "causal", description="Next token (decoder), hidden tokens (encoder), spans (encoder-decoder), completions (decoder)"
    )
    data: Data
    tokenizer: Tokenizer = Tokenizer()
    model: Model
    adapter: Adapter | None = None
    corruption: Corruption = Corruption()
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
        if self.adapter is not None and self.model.path is None:
            raise ValueError("adapter needs model.path: it freezes the base, which would never learn anything")
        tokenizer = self.tokenizer
        if tokenizer.path and tokenizer.vocab_size:
            raise ValueError("tokenizer: give either path or vocab_size")
        if not (tokenizer.path or tokenizer.vocab_size or self.model.path):
            raise ValueError("tokenizer: give path (an existing one) or vocab_size (to train one)")
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
        decided on the way (data to skip)."""
        out = self.model_dump(mode="json", exclude={"name", "storage", "cluster", "checkpoint", "parallel"})
        for key in ("executor", "cache", "skip", "on_bad_document"):
            del out["data"][key]
        for key in ("log_every", "activation_checkpointing", "compile", "loss_chunk"):
            del out["train"][key]
        del out["model"]["attention"], out["model"]["trust_remote_code"]
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
