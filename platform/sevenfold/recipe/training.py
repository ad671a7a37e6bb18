"""The sections of a recipe about the model and its training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sevenfold.recipe.bleu import BleuTokenizer
from sevenfold.recipe.locations import Location
from sevenfold.recipe.section import OrAuto, Problem, Section


class Model(Section):
    """The model: a new one from a transformers config, or an existing one to start from."""

    config: dict[str, Any] | None = Field(
        None,
        description="transformers config of a new model: model_type and its fields. Default: none, "
        "which needs path",
    )
    path: Location | None = Field(
        None,
        description="Model to start from: a run, a Hugging Face directory, a GGUF file (.gguf), "
        "or a model of the hub (hf://ORGANIZATION/NAME@REVISION). Default: none, which needs "
        "config",
    )
    attention: Literal["auto", "sdpa", "flex_attention", "eager"] = Field(
        "auto",
        description="Attention implementation. auto: flex_attention (packed documents as a block "
        "mask) for decoders on CUDA without attention dropout, else sdpa; eager for a model that "
        "has no other",
    )

    def problems(self) -> Iterator[Problem]:
        """Yields settings that contradict each other."""
        if (self.config is None) == (self.path is None):
            yield Problem(
                "give either config (a new model) or path (a model to start from)",
                ("path", "config"),
            )
        if self.config is not None and "model_type" not in self.config:
            yield Problem("config needs model_type, for example llama", ("config",))


class Adapter(Section):
    """LoRA (arXiv 2106.09685), by peft. The base model is frozen; a classifier's head is not."""

    rank: int = Field(8, gt=0, description="Rank of the two matrices whose product is the update")
    alpha: int = Field(16, gt=0, description="The update is multiplied by alpha / rank")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the adapter's input. Each worker draws its own masks, so they "
        "change with cluster.num_workers",
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Names of the modules that are adapted, as in peft's LoraConfig; all-linear: "
        "all linear layers but the output layer",
    )
    dora: bool = Field(
        False, description="DoRA: magnitude and direction are trained apart (arXiv 2402.09353)"
    )


class Corruption(Section, allow_inf_nan=False):
    """Which tokens are removed from the text by masked and denoise.

    masked: arXiv 1810.04805 (BERT). denoise: arXiv 1910.10683 (T5).
    """

    rate: float = Field(0.15, gt=0, lt=1, description="Fraction of the tokens")
    mean_span: float = Field(
        3.0, ge=1, description="denoise: mean length of a removed span, in tokens"
    )


class Preference(Section, allow_inf_nan=False):
    """Settings of objective dpo (arXiv 2305.18290)."""

    beta: float = Field(
        0.1,
        gt=0,
        description="Strength of the penalty for drifting from the reference model, which is the "
        "model at the start of training. Default: the paper's",
    )


class Contrastive(Section, allow_inf_nan=False):
    """Settings of objective embed.

    The negatives of a query are the documents of all other queries of the optimizer step. Their
    number depends on train.global_batch, not on train.micro_batch or the number of workers. In a
    validation they are those of a group of train.global_batch held-out sequences.
    """

    temperature: float = Field(
        0.05, gt=0, description="Cosine similarities are divided by it (arXiv 2104.08821)"
    )


class Train(Section):
    """How long training takes, in which batches, and how the loss is computed."""

    global_batch: int = Field(
        gt=0, lt=2**31, description="Sequences per optimizer step, over all workers"
    )
    micro_batch: Annotated[int, OrAuto()] = Field(
        gt=0,
        description="Sequences per forward pass of a worker; gradients are accumulated. classify "
        "and embed: the maximum size of a padded forward pass, times data.sequence_length tokens. "
        "auto: about 16,384 tokens on a GPU with 80 GB, fewer on a smaller one, 4,096 on CPUs",
    )
    steps: int | None = Field(
        None, gt=0, description="Optimizer steps. Default: as many as data.epochs gives"
    )
    tokens: int | None = Field(
        None,
        gt=0,
        description="Instead of steps: training tokens, rounded up to whole steps. Default: as "
        "many as steps gives",
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradients are clipped to this global L2 norm"
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of log(Z)^2 of each token's logits, which keeps them from drifting; "
        "not part of the loss that is shown (PaLM: 1e-4)",
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Sets all dropout probabilities of the model's config. Default: as the config "
        "says. Each worker draws its own masks, so they change with cluster.num_workers",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of each label's probability that is spread over all tokens "
        "(arXiv 1512.00567); not part of the loss that is shown",
    )
    dtype: Annotated[Literal["float32", "bfloat16"], OrAuto()] = Field(
        "float32",
        description="Data type of the parameters in the forward and backward pass. The sharded "
        "parameters and reductions stay in float32. auto: bfloat16 on GPUs that compute in it, "
        "else float32",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What is recomputed in the backward pass instead of being kept in memory. "
        "none: nothing; selective: everything but matrix products; full: whole blocks",
    )
    compile: bool = Field(
        False,
        description="torch.compile each block, which takes a minute or more when a run starts",
    )
    loss_chunk: int | None = Field(
        None,
        gt=0,
        description="Number of tokens whose logits are in memory at once. Default: all",
    )
    log_every: int = Field(10, gt=0, description="Steps between two log lines")

    def problems(self) -> Iterator[Problem]:
        """Yields settings that contradict each other."""
        if self.steps is not None and self.tokens is not None:
            yield Problem("give either steps or tokens", ("steps", "tokens"))


class Optimizer(Section, allow_inf_nan=False):
    """The optimizer. Defaults: Llama 3 (arXiv 2407.21783) and OLMo 2 (arXiv 2501.00656)."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for matrices, AdamW for all other parameters"
    )
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="Decoupled weight decay (arXiv 1711.05101), on matrices: not on norms, biases "
        "and embeddings",
    )
    l1: float = Field(
        0.0,
        ge=0,
        description="Decoupled L1 regularization of the same parameters: each step moves them "
        "towards 0 by learning_rate * l1",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")


class Schedule(Section):
    """The learning rate over the steps: linear warmup, then the schedule."""

    name: Literal["wsd", "cosine", "linear", "constant"] = Field(
        "wsd", description="wsd: warmup, stable, decay (arXiv 2404.06395)"
    )
    warmup_steps: int = Field(
        0, ge=0, description="Steps in which the learning rate rises linearly to its peak"
    )
    decay_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="wsd: fraction of the steps, at the end, in which the learning rate decays "
        "linearly",
    )
    min_ratio: float = Field(
        0.0, ge=0, le=1, description="Learning rate at the end, as a fraction of its peak"
    )


class Guard(Section):
    """The guard against bad steps: those whose loss or gradient norm is not finite, or spikes.

    A bad step is skipped: it changes no weight.
    """

    spike_factor: float | None = Field(
        None,
        gt=1,
        description="A gradient norm above this multiple of its running mean is a spike. "
        "Default: only values that are not finite count",
    )
    max_skipped: int = Field(
        5,
        gt=0,
        description="After this number of skipped steps in a row, the run goes back to its last "
        "checkpoint and leaves out the data of these steps",
    )
    max_rollbacks: int = Field(
        2, ge=0, description="Maximum number of returns to a checkpoint; then the run fails"
    )


class Validation(Section):
    """When the model is validated, on what, and what follows from the result."""

    every: int | None = Field(
        None, gt=0, description="Steps between two validations. Default: only at the end"
    )
    rows: int = Field(64, gt=0, description="Number of held-out sequences per validation")
    generate: int = Field(
        0,
        ge=0,
        description="sft, seq2seq: number of held-out prompts that are also answered, and the "
        "answers scored by ROUGE, BLEU and chrF",
    )
    max_new_tokens: int = Field(
        24, gt=0, description="Maximum number of new tokens of a generated answer"
    )
    bleu_tokenize: BleuTokenizer | None = Field(
        None,
        description="sacrebleu's tokenizer for BLEU. Default: that of the references' script (zh, "
        "ja-mecab or char, ko-mecab or char, char, 13a)",
    )
    metric: str = Field(
        "validation/loss", description="The metric that validations are compared by"
    )
    mode: Literal["min", "max"] | None = Field(
        None,
        description="Whether the lowest or the highest value of the metric is the best. Default: "
        "min if its name contains loss, perplexity or bits, else max",
    )
    keep_best: bool = Field(
        False,
        description="Keep the checkpoint of the best validation, whatever checkpoint.keep says; "
        "it is saved as the final model",
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="End the run after this number of validations in a row without a new best "
        "one; implies keep_best. Default: it goes through all steps",
    )

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint of the best validation is kept."""
        return self.keep_best or self.patience is not None

    @property
    def lower_is_better(self) -> bool:
        """Whether the lowest value of the metric is the best."""
        return self.mode == "min" if self.mode else is_lower_better(self.metric)


def is_lower_better(metric: str) -> bool:
    """Returns whether the lowest value of a metric is the best, judging by the metric's name."""
    return any(part in metric for part in ("loss", "perplexity", "bits"))


class Checkpoint(Section):
    """When checkpoints are saved, and how long they are kept."""

    every: int | Literal["auto"] | None = Field(
        None,
        description="Steps between two checkpoints. auto: computed from the measured cost of a "
        "save and mtbf_hours. Default: only at the end",
    )
    mtbf_hours: float = Field(
        50_700,
        gt=0,
        description="auto: mean time between failures of one worker, in hours. Default: Llama 3's "
        "419 unexpected interruptions of 16,384 GPUs in 54 days (arXiv 2407.21783, section 3.3.4)",
    )
    keep: int = Field(2, gt=0, description="Number of newest checkpoints to keep")
    keep_every: int | None = Field(
        None,
        gt=0,
        description="Never delete the checkpoints of multiples of this number of steps. "
        "Default: only the newest are kept",
    )

    @field_validator("every", mode="before")
    @classmethod
    def _check_every(cls, value: Any) -> Any:
        if value not in (None, "auto") and (type(value) is not int or value < 1):
            raise ValueError(f"expected a number of steps above 0, or auto, found {value!r}")
        return value
