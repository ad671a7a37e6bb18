"""What settings of other tools are called here, and what replaces those that do not exist here.

The names are those of transformers' TrainingArguments and TRL, LLaMA-Factory, axolotl, Ludwig,
torchtune and DeepSpeed. A recipe does not take them; the message about one says what to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sevenfold.recipe import conversions as to
from sevenfold.recipe.conversions import Answer, Given, Rule, plain_name

_OPTIMIZERS = {"adam": "adamw", "muon": "muon"}
_SCHEDULES = {
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_restarts": to.REFUSED,
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
_CONFIG = (
    "model_type",
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
_optimizer = to.choice("optimizer.name", _OPTIMIZERS, "there are adamw and muon")
_schedule = to.choice("schedule.name", _SCHEDULES, "there are wsd, cosine, linear and constant")
_attention = to.choice(
    "model.attention", _ATTENTION, "there are auto, sdpa, flex_attention and eager"
)
_objective = to.choice("objective", _OBJECTIVES, "the objectives have other names")
_not_needed = to.nothing("remove it: it is not needed here")

# Names, separated by spaces -> what to write instead. A name with a dot is a whole path.
_TABLE: tuple[tuple[str, Rule], ...] = (
    # length of training, of sequences, and batches
    (
        "epochs num_train_epochs num_epochs train_epochs max_epochs",
        to.whole("data.epochs", "data.epochs is a whole number above 0; or write train.steps=N"),
    ),
    (
        "max_steps num_steps train_steps total_steps max_train_steps",
        to.whole("train.steps", "remove it, and write data.epochs=N or train.steps=N"),
    ),
    ("train_tokens total_tokens", to.same("train.tokens")),
    (
        "batch_size train_batch_size global_batch_size",
        to.same("train.global_batch", "sequences per step, over all workers"),
    ),
    (" ".join((*to.PER_DEVICE, *to.ACCUMULATION)), to.batches),
    (
        "per_device_eval_batch_size eval_batch_size",
        to.nothing("remove it: validations take batches of train.micro_batch"),
    ),
    (
        "max_seq_length max_length cutoff_len sequence_len block_size seq_length seq_len "
        "max_seq_len max_sequence_length model_max_length context_length",
        to.same("data.sequence_length"),
    ),
    (
        "max_prompt_length max_completion_length max_source_length max_target_length",
        to.nothing(
            "there is one limit for the whole sequence, prompt and reply: data.sequence_length"
        ),
    ),
    # optimizer and schedule
    ("lr base_lr peak_lr", to.same("optimizer.learning_rate")),
    ("optim optimizer_type optimizer.type", _optimizer),
    ("adam_beta1 adam_beta2 beta1 beta2", to.betas),
    ("adam_epsilon adam_eps epsilon", to.same("optimizer.eps")),
    ("wd l2", to.same("optimizer.weight_decay")),
    ("lr_scheduler_type lr_scheduler lr_schedule scheduler_type schedule.type", _schedule),
    ("warmup_ratio warmup_fraction num_warmup_steps warmup", to.warmup),
    ("min_lr lr_min", to.min_ratio),
    ("min_lr_ratio min_lr_rate cosine_min_lr_ratio", to.same("schedule.min_ratio")),
    (
        "gradient_clipping grad_clip gradient_clip_val clip_grad_norm",
        to.same("train.max_grad_norm"),
    ),
    # precision and memory
    ("bf16 torch_dtype precision mixed_precision pure_bf16", to.dtype),
    ("fp16 float16", to.float16),
    (
        "gradient_checkpointing use_gradient_checkpointing enable_gradient_checkpointing",
        to.recomputed,
    ),
    ("tf32 gradient_checkpointing_kwargs", _not_needed),
    ("torch_compile", to.same("train.compile")),
    ("flash_attention flash_attn attn_implementation flash_attention_2", _attention),
    (
        "load_in_4bit load_in_8bit quantization_bit quantization bnb_4bit_quant_type",
        to.nothing(
            "weights are not quantized for training; nearest: LoRA with bfloat16",
            adapter__rank=8,
            train__dtype="bfloat16",
        ),
    ),
    # LoRA
    ("lora_r lora_rank adapter.r", to.same("adapter.rank")),
    ("lora_alpha", to.same("adapter.alpha")),
    ("lora_dropout", to.same("adapter.dropout")),
    ("lora_target lora_target_modules lora_target_linear", to.target_modules),
    ("use_dora peft_use_dora", to.same("adapter.dora")),
    ("use_peft finetuning_type train_type", to.tuning),
    # objective
    ("stage task rl task_type", _objective),
    ("dpo_beta pref_beta rl_beta", to.same("preference.beta")),
    ("label_smoothing_factor label_smoothing_eps", to.same("train.label_smoothing")),
    ("mlm_probability noise_density", to.same("corruption.rate")),
    ("mean_noise_span_length", to.same("corruption.mean_span")),
    (
        "neftune_noise_alpha neftune_alpha",
        to.nothing("no noise is added to embeddings; nearest: dropout", train__dropout=0.1),
    ),
    # saving, validating and logging
    ("save_steps checkpoint_interval save_interval", to.every("checkpoint.every")),
    ("eval_steps eval_interval val_check_interval", to.every("validation.every")),
    ("logging_steps log_interval log_every_n_steps", to.every("train.log_every")),
    (
        "save_total_limit max_checkpoints",
        to.whole("checkpoint.keep", "checkpoint.keep is a number above 0"),
    ),
    (
        "save_strategy saves_per_epoch",
        to.nothing("remove it: checkpoints are saved by steps, see checkpoint.every"),
    ),
    (
        "eval_strategy evaluation_strategy evals_per_epoch do_eval",
        to.nothing("remove it: validations are made by steps, see validation.every"),
    ),
    ("logging_strategy logging_dir log_level do_train", _not_needed),
    ("load_best_model_at_end", to.same("validation.keep_best")),
    ("metric_for_best_model", to.best_metric),
    ("greater_is_better", to.mode),
    (
        "early_stopping_patience early_stop",
        to.whole("validation.patience", "remove it: no run stops early without patience"),
    ),
    (
        "report_to log_with use_wandb wandb_project",
        to.nothing(
            "remove it: curves for TensorBoard and metrics.jsonl are always written to the run's "
            "folder; nearest: steps between two lines",
            train__log_every=10,
        ),
    ),
    # names and folders
    ("output_dir out_dir output_path", to.same("storage", "a run's folder is STORAGE/NAME")),
    ("run_name experiment_name wandb_name wandb_run_name", to.run_name),
    (
        "resume_from_checkpoint auto_resume_from_checkpoints resume ckpt_path",
        to.nothing("remove it: the same command resumes from the latest valid checkpoint"),
    ),
    (
        "overwrite_output_dir",
        to.nothing("remove it: no run overwrites another one; take a new name"),
    ),
    ("random_seed manual_seed data_seed", to.same("seed")),
    # model and tokenizer
    (
        "model_name_or_path base_model model_name pretrained_model_name_or_path model_path "
        "model_id",
        to.base,
    ),
    ("tokenizer_name tokenizer_name_or_path tokenizer_path", to.same("tokenizer.path")),
    *((name, to.same(f"model.config.{name}")) for name in _CONFIG),
    (
        "template",
        to.nothing(
            "remove it: the tokenizer's own chat template is the default; another one is "
            "tokenizer.chat_template=FILE"
        ),
    ),
    ("chat_template_path", to.same("tokenizer.chat_template")),
    ("num_labels", to.nothing("remove it: the classes are the labels in the data")),
    # data
    (
        "dataset datasets dataset_name dataset_path train_file train_files train_data "
        "train_dataset data_path",
        to.sources("data.sources"),
    ),
    (
        "validation_file eval_file eval_dataset test_datasets val_file val_data",
        to.sources("data.validation"),
    ),
    ("test_file", to.sources("data.test")),
    (
        "val_size val_set_size validation_split_percentage validation_split eval_size",
        to.held_out,
    ),
    ("dataset_text_field text_column text_field", to.same("data.sources.0.text")),
    ("sample_packing neat_packing eval_sample_packing", to.packing),
    (
        "group_by_length pad_to_sequence_len dataloader_drop_last remove_unused_columns "
        "overwrite_cache streaming",
        _not_needed,
    ),
    (
        "dataloader_num_workers preprocessing_num_workers dataset_num_proc",
        to.nothing("remove it: Ray Data's tasks take the free CPUs", data__executor="ray"),
    ),
    ("dataset_prepared_path tokenized_path", to.same("data.cache")),
    (
        "max_samples",
        to.nothing("the number of documents has no limit; nearest: train.steps or data.epochs"),
    ),
    # workers
    (
        "deepspeed fsdp fsdp_config fsdp_version zero_stage ddp ddp_find_unused_parameters "
        "ddp_timeout ddp_backend",
        to.nothing(
            "remove it: FSDP2 shards the model over all workers; nearest: the number of copies "
            "(HSDP)",
            parallel__replicate=1,
        ),
    ),
    ("num_gpus n_gpus n_gpu nproc_per_node num_processes world_size", to.gpus),
    (
        "tensor_parallel_size tensor_parallel tp_size tensor_parallel_degree",
        to.same("parallel.tensor"),
    ),
    (
        "pipeline_parallel_size pp_size context_parallel_size sequence_parallel_size",
        to.nothing("there is no such parallelism; nearest: tensor", parallel__tensor=1),
    ),
    (
        "push_to_hub hub_model_id hub_token",
        to.nothing("remove it: the run's folder has the model, in model/, to upload"),
    ),
)
SYNONYMS: dict[str, Rule] = {name: rule for names, rule in _TABLE for name in names.split()}

# Sections of other tools, separated by spaces -> the section here.
_SECTIONS = {
    "trainer training training_args training_arguments": "train",
    "lora peft peft_config lora_config": "adapter",
    "lr_scheduler scheduler": "schedule",
    "eval evaluation early_stopping": "validation",
    "checkpointing checkpoints save": "checkpoint",
    "resources scaling backend": "cluster",
    "hyperopt tune": "sweep",
    "dpo": "preference",
}
SECTIONS = {name: section for names, section in _SECTIONS.items() for name in names.split()}

# Keys of ours with a value as another tool has it, such as `optimizer: adamw_torch`.
VALUES: dict[str, Rule] = {
    "optimizer": _optimizer,
    "optimizer.name": _optimizer,
    "schedule": _schedule,
    "schedule.name": _schedule,
    "model": to.base,
    "model.attention": _attention,
    "adapter": to.tuning,
    "tokenizer": to.same("tokenizer.path"),
    "train.dtype": to.dtype,
    "train.activation_checkpointing": to.recomputed,
    "data.packing": to.packing,
    "schedule.warmup_steps": to.warmup,
    **{key: to.every(key) for key in ("checkpoint.every", "validation.every", "train.log_every")},
    "data": to.sources("data.sources"),
    **{f"data.{key}": to.sources(f"data.{key}") for key in ("sources", "validation", "test")},
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
