"""What is trained, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sevenfold.recipe.data import Section


class Model(Section):
    config: dict[str, Any] | None = Field(None, description="transformers config of a new model: model_type and its fields")
    path: str | None = Field(None, description="Folder of a model to start from: a run of ours or any Hugging Face directory")
    trust_remote_code: bool = Field(False, description="Run Python code that lies in the model's folder")
    attention: Literal["auto", "sdpa", "flex_attention", "eager"] = Field(
        "auto",
        description="Kernel; auto: flex_attention for decoders on CUDA without attention dropout (packed documents as a block "
        "mask), else sdpa",
    )

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.config is None) == (self.path is None):
            raise ValueError("give either config (a new model) or path (one to start from)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama")
        return self


class Adapter(Section):
    """LoRA (arXiv 2106.09685), by peft: the base is frozen; a classifier's head is trained whole."""

    rank: int = Field(8, gt=0)
    alpha: int = Field(16, gt=0, description="Scale: the update counts alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Its masks are drawn a worker: they change with num_workers")
    target_modules: str | list[str] = Field("all-linear", description="As in peft's LoraConfig")
    dora: bool = Field(False, description="Magnitudes apart from directions (arXiv 2402.09353)")


class Corruption(Section):
    """What the objectives masked (arXiv 1810.04805) and denoise (arXiv 1910.10683) take out of the text."""

    rate: float = Field(0.15, gt=0, lt=1, description="Part of the tokens")
    mean_span: float = Field(3.0, ge=1, description="denoise: mean length of a span, tokens")


class Preference(Section):
    """dpo (arXiv 2305.18290)."""

    beta: float = Field(0.1, gt=0, description="How dear it is to leave the model that was begun from; the paper's default")


class Contrastive(Section):
    """embed."""

    temperature: float = Field(0.05, gt=0, description="That cosines are divided by (arXiv 2104.08821)")


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
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Of all the dropouts that the model's family has; default: as its config says. Masks are drawn a worker",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Part of each target spread over all tokens (arXiv 1512.00567); not in the loss shown"
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
    weight_decay: float = Field(0.1, ge=0, description="L2, decoupled (arXiv 1711.05101); not on norms, biases and embeddings")
    l1: float = Field(0.0, ge=0, description="L1, decoupled, on the same: each step draws them to 0 by learning_rate * l1")
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
    generate: int = Field(0, ge=0, description="sft, seq2seq: held-out prompts completed and scored (ROUGE, BLEU, chrF)")
    max_new_tokens: int = Field(24, gt=0)
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = Field("13a", description="As sacrebleu's; zh for Chinese")
    metric: str = Field("validation/loss", description="By which validations are compared")
    mode: Literal["min", "max"] | None = Field(
        None, description="Whether less of the metric is better; default: where its name has loss, perplexity or bits"
    )
    keep_best: bool = Field(
        False,
        description="Keep the best validation's checkpoint, whatever checkpoint.keep says: it is the run's model in the end",
    )
    patience: int | None = Field(
        None, gt=0, description="End the run after so many validations in a row without a better one; implies keep_best"
    )

    @property
    def keeps_best(self) -> bool:
        return self.keep_best or self.patience is not None

    @property
    def least(self) -> bool:
        """Whether the least of the metric is the best."""
        return self.mode == "min" if self.mode else least(self.metric)


def least(metric: str) -> bool:
    """Whether the least of it is the best, by its name."""
    return any(part in metric for part in ("loss", "perplexity", "bits"))


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
    worker_labels: dict[str, str] = Field({}, description="Ray labels of the nodes that workers run on, as {pool: train}")
    data_labels: dict[str, str] = Field(
        {}, description="Those of data tasks' nodes, as {pool: data}; default of both: wherever there is room"
    )
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
