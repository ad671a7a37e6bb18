"""What settings of other tools are called here, and what replaces those that do not exist here.

The names are those of transformers' TrainingArguments and TRL, LLaMA-Factory, axolotl, Ludwig,
torchtune and DeepSpeed. A recipe does not take them; the message about one says what to write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

_REFUSED = object()


class Answer(NamedTuple):
    """What to write instead of a setting of another tool.

    Attributes:
        settings: Values by `key.path`; empty if there is nothing to write.
        note: What the user should know besides; empty if nothing.
        is_same: Whether the settings do the same; else they are only the nearest that there is.
    """

    settings: dict[str, Any]
    note: str = ""
    is_same: bool = True


class Given:
    """What the recipe says elsewhere, from which some answers are computed."""

    def __init__(self, tree: Mapping[str, Any]):
        self._tree = tree

    def at(self, path: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Returns the value of a key of a recipe if it has this type, else the default."""
        node: Any = self._tree
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node if isinstance(node, kind) and not isinstance(node, bool) else default

    def named(self, *names: str) -> Any:
        """Returns the number that the recipe gives under one of the names, anywhere; else None."""
        values = (
            value
            for mapping in _mappings(self._tree)
            for name, value in mapping.items()
            if plain_name(name) in names and _is_number(value)
        )
        return next(values, None)

    @property
    def workers(self) -> int:
        """The number of workers that read different sequences."""
        count = self.at("cluster.num_workers", (int, list), 1)
        count = count[-1] if isinstance(count, list) and count else count
        tensor = self.at("parallel.tensor", int, 1)
        return max(1, count // max(1, tensor)) if isinstance(count, int) else 1

    @property
    def steps(self) -> int | None:
        """The number of steps of the run, if the recipe says it."""
        if (steps := self.at("train.steps", int) or self.named("max_steps")) and steps > 0:
            return int(steps)
        tokens = self.at("train.tokens", int)
        per_step = self.at("train.global_batch", int, 0) * self.at("data.sequence_length", int, 0)
        return math.ceil(tokens / per_step) if tokens and per_step > 0 else None


def _mappings(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
        for value in node.values():
            yield from _mappings(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain_name(name: object) -> str:
    """Returns a name in lower case, with underscores."""
    return str(name).strip("-").lower().replace("-", "_")


Rule = Callable[[Any, Given], Answer]


def _same(path: str, note: str = "") -> Rule:
    """The setting has another name here."""
    return lambda value, given: Answer({path: value}, note)


def _none(note: str, **settings: Any) -> Rule:
    """There is no such setting; `settings` (a double underscore is a dot) are the nearest."""
    return lambda value, given: Answer(
        {key.replace("__", "."): v for key, v in settings.items()}, note, is_same=False
    )


def _choice(path: str, values: Mapping[str, Any], note: str) -> Rule:
    """The setting has other values here: a table, whose keys may be beginnings of the values."""

    def rule(value: Any, given: Given) -> Answer:
        text = str(value).lower()
        found = next((v for k, v in values.items() if text == k), _REFUSED)
        if found is _REFUSED:
            found = next((v for k, v in values.items() if k and text.startswith(k)), _REFUSED)
        return Answer({}, f"{note}: see {path}") if found is _REFUSED else Answer({path: found})

    return rule


def _whole(path: str, note: str) -> Rule:
    """A whole number above 0; others need no setting, or have no counterpart."""

    def rule(value: Any, given: Given) -> Answer:
        if _is_number(value) and value > 0 and float(value).is_integer():
            return Answer({path: int(value)})
        return Answer({}, note)

    return rule


def _every(path: str) -> Rule:
    """A number of steps; below 1 it is a fraction of all steps."""

    def rule(value: Any, given: Given) -> Answer:
        if _is_number(value) and 0 < value < 1:
            return _of_steps(path, value, given)
        return _whole(path, f"remove it: {path} is a number of steps above 0")(value, given)

    return rule


def _of_steps(path: str, fraction: float, given: Given) -> Answer:
    if given.steps is None:
        return Answer({}, f"write {path}=N, where N is {fraction} times the number of steps")
    return Answer({path: math.ceil(fraction * given.steps)})


def _warmup(value: Any, given: Given) -> Answer:
    if _is_number(value) and (0 < value < 1 or (isinstance(value, float) and value == 1)):
        return _of_steps("schedule.warmup_steps", value, given)
    if _is_number(value) and value >= 0 and float(value).is_integer():
        return Answer({"schedule.warmup_steps": int(value)})
    return Answer({}, "write schedule.warmup_steps=N, a number of steps")


_PER_DEVICE = (
    "per_device_train_batch_size",
    "per_gpu_train_batch_size",
    "train_micro_batch_size_per_gpu",
    "micro_batch_size",
    "device_batch_size",
)
_ACCUMULATION = ("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches")


def _batches(value: Any, given: Given) -> Answer:
    """Batch size of a worker, and steps of accumulation: micro batch and global batch."""
    micro = given.named(*_PER_DEVICE) or given.at("train.micro_batch", int)
    steps = given.named(*_ACCUMULATION) or 1
    counts = (micro, steps)
    if not all(_is_number(n) and n >= 1 and float(n).is_integer() for n in counts):
        return Answer(
            {},
            "write train.micro_batch=N, the sequences per forward pass, and train.global_batch=M, "
            "those per step; gradients are accumulated as these numbers need it",
        )
    total = int(micro) * int(steps) * given.workers
    return Answer(
        {"train.global_batch": total, "train.micro_batch": int(micro)},
        f"{int(micro)} x {int(steps)} accumulated x {given.workers} worker"
        f"{'' if given.workers == 1 else 's'}",
    )


def _dtype(value: Any, given: Given) -> Answer:
    if value in (False, "false", "no", "32", 32, "fp32", "float32"):
        return Answer({"train.dtype": "float32"})
    if "16" in str(value) and "bf" not in str(value):
        return _float16(True, given)
    return Answer({"train.dtype": "bfloat16"})


def _float16(value: Any, given: Given) -> Answer:
    if value is False:
        return Answer({}, "remove it: there is no float16")
    return Answer(
        {"train.dtype": "bfloat16"}, "there is no float16; nearest: bfloat16", is_same=False
    )


def _recompute(value: Any, given: Given) -> Answer:
    kind = "none" if value in (False, None) else "full"
    return Answer(
        {"train.activation_checkpointing": kind}, "" if value is False else "or selective"
    )


def _betas(value: Any, given: Given) -> Answer:
    first = given.named("adam_beta1", "beta1")
    second = given.named("adam_beta2", "beta2")
    return Answer(
        {"optimizer.betas": [0.9 if first is None else first, 0.95 if second is None else second]}
    )


def _min_ratio(value: Any, given: Given) -> Answer:
    peak = given.named("lr", "learning_rate")
    if _is_number(value) and peak:
        return Answer({"schedule.min_ratio": round(value / peak, 6)}, "a fraction of the peak")
    return Answer({}, "write schedule.min_ratio=F, a fraction of optimizer.learning_rate")


def _target_modules(value: Any, given: Given) -> Answer:
    if value in ("all", True, "all-linear"):
        return Answer({"adapter.target_modules": "all-linear"})
    if isinstance(value, str):
        return Answer({"adapter.target_modules": [v.strip() for v in value.split(",")]})
    return Answer({"adapter.target_modules": value})


def _base(value: Any, given: Given) -> Answer:
    note = "a folder, or hf://ORGANIZATION/NAME for a model of the Hugging Face hub"
    if isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
        return Answer({"model.path": f"hf://{value}"}, f"or model.path={value} if it is a folder")
    return Answer({"model.path": value} if isinstance(value, str) else {}, note)


def _sources(path: str) -> Rule:
    """Files or data sets: a name, a list of names, or axolotl's list of mappings with `path`."""

    def rule(value: Any, given: Given) -> Answer:
        entries = value if isinstance(value, list) else [value]
        paths = [e.get("path") if isinstance(e, Mapping) else e for e in entries]
        if not paths or not all(isinstance(p, str) and p for p in paths):
            return Answer({}, f"write {path}=[{{path: FILE_OR_FOLDER}}]")
        is_path = any("/" in str(p) or "." in str(p) for p in paths)
        note = "" if is_path else "a file, folder, glob or URL: data sets have no names here"
        return Answer({path: [{"path": p} for p in paths]}, note)

    return rule


def _held_out(value: Any, given: Given) -> Answer:
    note = "write data.held_out=F, a fraction of the documents of at most 0.5"
    if _is_number(value) and 1 < value <= 50 and float(value).is_integer():
        return Answer({}, f"{note}; {value}% is {value / 100}")
    if _is_number(value) and 0 <= value <= 0.5:
        return Answer({"data.held_out": value})
    return Answer({}, note)


def _packing(value: Any, given: Given) -> Answer:
    if value in (False, None):
        return Answer(
            {}, "remove it: sequences are always packed, and no document sees another one"
        )
    return Answer({"data.packing": "best_fit"}, "no document sees another one")


def _name(value: Any, given: Given) -> Answer:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)[:200]).strip("-._")
    return Answer({"name": name} if name else {}, "" if name else "write name=NAME")


def _tuning(value: Any, given: Given) -> Answer:
    if str(value).lower() in ("lora", "qlora", "dora"):
        return Answer({"adapter.rank": 8}, "LoRA is on if the recipe has a section adapter")
    return Answer({}, "remove it: all weights are trained unless there is a section adapter")


def _best_metric(value: Any, given: Given) -> Answer:
    name = str(value).removeprefix("eval_").removeprefix("validation/")
    return Answer({"validation.metric": f"validation/{name}"})


_OBJECTIVES = {
    "sft": "sft",
    "dpo": "dpo",
    "pt": "causal",
    "pretrain": "causal",
    "clm": "causal",
    "causal_lm": "causal",
    "mlm": "masked",
    "seq_cls": "classify",
    "text-classification": "classify",
}
_SCHEDULES = {
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_restarts": _REFUSED,
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "wsd": "wsd",
}
_ATTENTION = {
    "flash": "auto",
    "true": "auto",
    "auto": "auto",
    "fa2": "auto",
    "sdpa": "sdpa",
    "flex": "flex_attention",
    "eager": "eager",
    "disabled": "sdpa",
    "false": "sdpa",
}
_RESUMES = _none("remove it: the same command resumes from the latest valid checkpoint")
_QUANTIZED = _none(
    "weights are not quantized for training; nearest: LoRA with bfloat16",
    adapter__rank=8,
    train__dtype="bfloat16",
)
_SHARDED = _none(
    "remove it: FSDP2 shards the model over all workers; nearest: the number of copies (HSDP)",
    parallel__replicate=1,
)
_REPORTS = _none(
    "remove it: curves for TensorBoard and metrics.jsonl are always written to the run's folder; "
    "nearest: steps between two lines",
    train__log_every=10,
)
_LENGTH = _same("data.sequence_length")
_OTHER_LENGTH = _none(
    "there is one limit for the whole sequence, prompt and reply: see data.sequence_length"
)
_AUTOMATIC = _none("remove it: nothing replaces it, as it is not needed here")
_EPOCHS = _whole("data.epochs", "data.epochs is a whole number above 0; or write train.steps=N")
_STEPS = _whole("train.steps", "remove it, and write data.epochs=N or train.steps=N")
_SMOOTHING = _same("train.label_smoothing")

# name -> what to write instead. A name with a dot is a whole path.
SYNONYMS: dict[str, Rule] = {
    # length and batches
    **dict.fromkeys(
        ("epochs", "num_train_epochs", "num_epochs", "train_epochs", "max_epochs"), _EPOCHS
    ),
    **dict.fromkeys(
        ("max_steps", "num_steps", "train_steps", "total_steps", "max_train_steps"), _STEPS
    ),
    **dict.fromkeys(("train_tokens", "total_tokens"), _same("train.tokens")),
    **dict.fromkeys(
        ("batch_size", "train_batch_size", "global_batch_size"),
        _same("train.global_batch", "sequences per step, over all workers"),
    ),
    **dict.fromkeys((*_PER_DEVICE, *_ACCUMULATION), _batches),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size"),
        _none("remove it: validations take batches of train.micro_batch"),
    ),
    **dict.fromkeys(
        (
            "max_seq_length",
            "max_length",
            "cutoff_len",
            "sequence_len",
            "block_size",
            "seq_length",
            "seq_len",
            "max_seq_len",
            "max_sequence_length",
            "model_max_length",
            "context_length",
        ),
        _LENGTH,
    ),
    **dict.fromkeys(
        (
            "max_prompt_length",
            "max_completion_length",
            "max_source_length",
            "max_target_length",
        ),
        _OTHER_LENGTH,
    ),
    # optimizer and schedule
    **dict.fromkeys(("lr", "base_lr", "peak_lr"), _same("optimizer.learning_rate")),
    **dict.fromkeys(
        ("optim", "optimizer_type", "optimizer.type"),
        _choice("optimizer.name", {"adam": "adamw", "muon": "muon"}, "there is adamw and muon"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2"), _betas),
    **dict.fromkeys(("adam_epsilon", "adam_eps", "epsilon"), _same("optimizer.eps")),
    **dict.fromkeys(("wd", "l2"), _same("optimizer.weight_decay")),
    **dict.fromkeys(
        ("lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler_type", "schedule.type"),
        _choice("schedule.name", _SCHEDULES, "there is wsd, cosine, linear and constant"),
    ),
    **dict.fromkeys(("warmup_ratio", "warmup_fraction", "num_warmup_steps", "warmup"), _warmup),
    **dict.fromkeys(("min_lr", "lr_min"), _min_ratio),
    **dict.fromkeys(
        ("min_lr_ratio", "min_lr_rate", "cosine_min_lr_ratio"), _same("schedule.min_ratio")
    ),
    **dict.fromkeys(
        ("gradient_clipping", "grad_clip", "gradient_clip_val", "clip_grad_norm"),
        _same("train.max_grad_norm"),
    ),
    # precision and memory
    **dict.fromkeys(("bf16", "torch_dtype", "precision", "mixed_precision", "pure_bf16"), _dtype),
    **dict.fromkeys(("fp16", "float16"), _float16),
    "tf32": _AUTOMATIC,
    **dict.fromkeys(
        ("gradient_checkpointing", "use_gradient_checkpointing", "enable_gradient_checkpointing"),
        _recompute,
    ),
    "gradient_checkpointing_kwargs": _AUTOMATIC,
    "torch_compile": _same("train.compile"),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "flash_attention_2"),
        _choice("model.attention", _ATTENTION, "there is auto, sdpa, flex_attention and eager"),
    ),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization", "bnb_4bit_quant_type"),
        _QUANTIZED,
    ),
    # LoRA
    **dict.fromkeys(("lora_r", "lora_rank", "adapter.r"), _same("adapter.rank")),
    "lora_alpha": _same("adapter.alpha"),
    "adapter.lora_alpha": _same("adapter.alpha"),
    "lora_dropout": _same("adapter.dropout"),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), _target_modules),
    **dict.fromkeys(("use_dora", "peft_use_dora"), _same("adapter.dora")),
    **dict.fromkeys(("use_peft", "finetuning_type", "train_type"), _tuning),
    # objective
    **dict.fromkeys(
        ("stage", "task", "rl", "task_type"),
        _choice("objective", _OBJECTIVES, "the objectives have other names"),
    ),
    **dict.fromkeys(("dpo_beta", "pref_beta", "rl_beta"), _same("preference.beta")),
    **dict.fromkeys(("label_smoothing_factor", "label_smoothing_eps"), _SMOOTHING),
    **dict.fromkeys(("mlm_probability", "noise_density"), _same("corruption.rate")),
    "mean_noise_span_length": _same("corruption.mean_span"),
    **dict.fromkeys(
        ("neftune_noise_alpha", "neftune_alpha"),
        _none("there is no noise on embeddings; nearest: dropout", train__dropout=0.1),
    ),
    # saving, validating and logging
    **dict.fromkeys(
        ("save_steps", "checkpoint_interval", "save_interval"), _every("checkpoint.every")
    ),
    **dict.fromkeys(
        ("eval_steps", "eval_interval", "val_check_interval"), _every("validation.every")
    ),
    **dict.fromkeys(
        ("logging_steps", "log_interval", "log_every_n_steps"), _every("train.log_every")
    ),
    **dict.fromkeys(
        ("save_total_limit", "max_checkpoints"),
        _whole("checkpoint.keep", "checkpoint.keep is a number above 0"),
    ),
    **dict.fromkeys(
        ("save_strategy", "saves_per_epoch"),
        _none("remove it: checkpoints are saved by steps, see checkpoint.every"),
    ),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "evals_per_epoch", "do_eval"),
        _none("remove it: validations are made by steps, see validation.every"),
    ),
    **dict.fromkeys(("logging_strategy", "logging_dir", "log_level", "do_train"), _AUTOMATIC),
    "load_best_model_at_end": _same("validation.keep_best"),
    "metric_for_best_model": _best_metric,
    "greater_is_better": lambda value, given: Answer(
        {"validation.mode": "max" if value is True else "min"}
    ),
    **dict.fromkeys(
        ("early_stopping_patience", "early_stop"),
        _whole("validation.patience", "remove it: without validation.patience no run stops early"),
    ),
    **dict.fromkeys(("report_to", "log_with", "use_wandb", "wandb_project"), _REPORTS),
    # names and folders
    **dict.fromkeys(
        ("output_dir", "out_dir", "output_path"), _same("storage", "a run's folder is STORAGE/NAME")
    ),
    **dict.fromkeys(("run_name", "experiment_name", "wandb_name", "wandb_run_name"), _name),
    **dict.fromkeys(
        (
            "resume_from_checkpoint",
            "auto_resume_from_checkpoints",
            "resume",
            "ckpt_path",
        ),
        _RESUMES,
    ),
    "overwrite_output_dir": _none(
        "remove it: a run's folder is not overwritten; take another name"
    ),
    **dict.fromkeys(("random_seed", "manual_seed", "data_seed"), _same("seed")),
    # model and tokenizer
    **dict.fromkeys(
        (
            "model_name_or_path",
            "base_model",
            "model_name",
            "pretrained_model_name_or_path",
            "model_path",
            "model_id",
        ),
        _base,
    ),
    **dict.fromkeys(
        ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"), _same("tokenizer.path")
    ),
    "model_type": _same("model.config.model_type"),
    **{
        name: _same(f"model.config.{name}")
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "tie_word_embeddings",
            "n_layer",
            "n_head",
            "n_embd",
        )
    },
    "template": _none(
        "remove it: the tokenizer's own chat template is the default; another one is "
        "tokenizer.chat_template=FILE"
    ),
    "chat_template_path": _same("tokenizer.chat_template"),
    "num_labels": _none("remove it: the classes are the labels in the data, or data.classes"),
    # data
    **dict.fromkeys(
        (
            "dataset",
            "datasets",
            "dataset_name",
            "dataset_path",
            "train_file",
            "train_files",
            "train_data",
            "train_dataset",
            "data_path",
        ),
        _sources("data.sources"),
    ),
    **dict.fromkeys(
        ("validation_file", "eval_file", "eval_dataset", "test_datasets", "val_file", "val_data"),
        _sources("data.validation"),
    ),
    "test_file": _sources("data.test"),
    **dict.fromkeys(
        (
            "val_size",
            "val_set_size",
            "validation_split_percentage",
            "validation_split",
            "eval_size",
        ),
        _held_out,
    ),
    **dict.fromkeys(
        ("dataset_text_field", "text_column", "text_field"), _same("data.sources.0.text")
    ),
    **dict.fromkeys(("sample_packing", "neat_packing", "eval_sample_packing"), _packing),
    **dict.fromkeys(
        ("group_by_length", "pad_to_sequence_len", "dataloader_drop_last", "remove_unused_columns"),
        _AUTOMATIC,
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "preprocessing_num_workers", "dataset_num_proc"),
        _none("remove it: Ray Data's tasks take the free CPUs", data__executor="ray"),
    ),
    **dict.fromkeys(("dataset_prepared_path", "tokenized_path"), _same("data.cache")),
    **dict.fromkeys(("overwrite_cache", "streaming"), _AUTOMATIC),
    "max_samples": _none("there is no limit on documents; nearest: train.steps or data.epochs"),
    # workers
    **dict.fromkeys(
        (
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "ddp",
            "fsdp_version",
            "zero_stage",
            "ddp_find_unused_parameters",
            "ddp_timeout",
            "ddp_backend",
        ),
        _SHARDED,
    ),
    **dict.fromkeys(
        ("num_gpus", "n_gpus", "n_gpu", "nproc_per_node", "num_processes", "world_size"),
        lambda value, given: Answer({"cluster.num_workers": value, "cluster.gpus_per_worker": 1}),
    ),
    **dict.fromkeys(
        ("tensor_parallel_size", "tensor_parallel", "tp_size", "tensor_parallel_degree"),
        _same("parallel.tensor"),
    ),
    **dict.fromkeys(
        ("pipeline_parallel_size", "pp_size", "context_parallel_size", "sequence_parallel_size"),
        _none("there is no such parallelism; nearest: tensor parallelism", parallel__tensor=1),
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token"),
        _none("remove it: the run's folder has the model, in model/; upload that"),
    ),
}

# Sections of other tools -> the section here.
SECTIONS = {
    "trainer": "train",
    "training": "train",
    "training_args": "train",
    "training_arguments": "train",
    "lora": "adapter",
    "peft": "adapter",
    "peft_config": "adapter",
    "lora_config": "adapter",
    "lr_scheduler": "schedule",
    "scheduler": "schedule",
    "eval": "validation",
    "evaluation": "validation",
    "early_stopping": "validation",
    "checkpointing": "checkpoint",
    "checkpoints": "checkpoint",
    "save": "checkpoint",
    "resources": "cluster",
    "scaling": "cluster",
    "backend": "cluster",
    "hyperopt": "sweep",
    "tune": "sweep",
    "dpo": "preference",
}

# A section of ours that another tool gives as one value, such as `optimizer: adamw_torch`.
VALUES: dict[str, Rule] = {
    "optimizer": SYNONYMS["optim"],
    "schedule": SYNONYMS["lr_scheduler_type"],
    "model": _base,
    "adapter": _tuning,
    "tokenizer": _same("tokenizer.path"),
    "optimizer.name": SYNONYMS["optim"],
    "schedule.name": SYNONYMS["lr_scheduler_type"],
    "train.dtype": _dtype,
    "train.activation_checkpointing": _recompute,
    "model.attention": SYNONYMS["attn_implementation"],
    "data.packing": _packing,
    "data": _sources("data.sources"),
    "data.sources": _sources("data.sources"),
    "data.validation": _sources("data.validation"),
    "data.test": _sources("data.test"),
}


def answer(path: str, value: Any, tree: Mapping[str, Any]) -> Answer | None:
    """Returns what to write instead of a setting of another tool; None if it is not known.

    Args:
        path: The key's path in the recipe.
        value: Its value.
        tree: The recipe.
    """
    name = plain_name(path.rpartition(".")[2])
    rule = SYNONYMS.get(".".join(map(plain_name, path.split("."))), SYNONYMS.get(name))
    return None if rule is None else rule(value, Given(tree))
