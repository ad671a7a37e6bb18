"""Settings of other tools: each is told with what to write instead, which is then valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sevenfold.errors import InputError
from sevenfold.recipe import parse
from sevenfold.recipe.conversions import Given
from sevenfold.recipe.keys import is_key_path
from sevenfold.recipe.synonyms import SECTIONS, SYNONYMS, VALUES, answer

TREE: dict[str, Any] = {
    "name": "x",
    "data": {"sources": [{"path": "a"}], "sequence_length": 64},
    "model": {"path": "m"},
    "train": {"global_batch": 8, "micro_batch": 4, "steps": 100},
    "cluster": {"num_workers": 2},
}

# name -> the value in the other tool; the settings of TREE's recipe that are told
TOLD: dict[str, tuple[Any, dict[str, Any]]] = {
    "lr": (2e-5, {"optimizer.learning_rate": 2e-5}),
    "num_train_epochs": (3.0, {"data.epochs": 3}),
    "max_steps": (500, {"train.steps": 500}),
    "batch_size": (16, {"train.global_batch": 16}),
    "max_seq_length": (4096, {"data.sequence_length": 4096}),
    "warmup_ratio": (0.03, {"schedule.warmup_steps": 3}),
    "warmup_fraction": (0.07, {"schedule.warmup_steps": 7}),
    "num_warmup_steps": (7, {"schedule.warmup_steps": 7}),
    "lr_scheduler_type": ("constant_with_warmup", {"schedule.name": "constant"}),
    "optim": ("adamw_8bit", {"optimizer.name": "adamw"}),
    "adam_beta1": (0.8, {"optimizer.betas": [0.8, 0.95]}),
    "adam_epsilon": (1e-7, {"optimizer.eps": 1e-7}),
    "gradient_clipping": (0.5, {"train.max_grad_norm": 0.5}),
    "min_lr_ratio": (0.1, {"schedule.min_ratio": 0.1}),
    "bf16": (True, {"train.dtype": "bfloat16"}),
    "torch_dtype": ("float32", {"train.dtype": "float32"}),
    "gradient_checkpointing": (True, {"train.activation_checkpointing": "full"}),
    "attn_implementation": ("flash_attention_2", {"model.attention": "auto"}),
    "lora_r": (16, {"adapter.rank": 16}),
    "lora_alpha": (32, {"adapter.alpha": 32}),
    "lora_dropout": (0.05, {"adapter.dropout": 0.05}),
    "lora_target": ("q_proj, v_proj", {"adapter.target_modules": ["q_proj", "v_proj"]}),
    "lora_target_linear": (True, {"adapter.target_modules": "all-linear"}),
    "finetuning_type": ("lora", {"adapter.rank": 8}),
    "stage": ("dpo", {"objective": "dpo"}),
    "dpo_beta": (0.2, {"preference.beta": 0.2}),
    "label_smoothing_factor": (0.1, {"train.label_smoothing": 0.1}),
    "save_steps": (50, {"checkpoint.every": 50}),
    "eval_steps": (0.1, {"validation.every": 10}),
    "logging_steps": (5, {"train.log_every": 5}),
    "save_total_limit": (3, {"checkpoint.keep": 3}),
    "metric_for_best_model": ("eval_loss", {"validation.metric": "validation/loss"}),
    "greater_is_better": (False, {"validation.mode": "min"}),
    "output_dir": ("out: here", {"storage": "out: here"}),
    "run_name": ("my run #3", {"name": "my-run-3"}),
    "random_seed": (42, {"seed": 42}),
    "model_name_or_path": ("org/model", {"model.path": "hf://org/model"}),
    "base_model": ("./model", {"model.path": "./model"}),
    "tokenizer_name_or_path": ("/t", {"tokenizer.path": "/t"}),
    "datasets": (
        [{"path": "b.jsonl", "type": "alpaca"}, {"path": "c, d"}],
        {"data.sources": [{"path": "b.jsonl"}, {"path": "c, d"}]},
    ),
    "train_file": ("b.jsonl", {"data.sources": [{"path": "b.jsonl"}]}),
    "validation_file": ("v.jsonl", {"data.validation": [{"path": "v.jsonl"}]}),
    "val_set_size": (0.05, {"data.held_out": 0.05}),
    "dataset_text_field": ("body", {"data.sources.0.text": "body"}),
    "sample_packing": (True, {"data.packing": "best_fit"}),
    "num_gpus": (4, {"cluster.num_workers": 4, "cluster.gpus_per_worker": 1}),
    "tensor_parallel_size": (2, {"parallel.tensor": 2}),
    "mlm_probability": (0.2, {"corruption.rate": 0.2}),
}
# name -> what is said about it, as nothing does the same here
NOT_HERE = {
    "load_in_4bit": "weights are not quantized for training; nearest: LoRA with bfloat16: "
    "adapter.rank=8 and train.dtype=bfloat16",
    "load_in_8bit": "weights are not quantized",
    "deepspeed": "remove it: FSDP2 shards the model over all workers; nearest: ",
    "fsdp": "remove it: FSDP2 shards",
    "ddp": "remove it: FSDP2 shards",
    "resume_from_checkpoint": "remove it: the same command resumes from the latest valid",
    "report_to": "remove it: curves for TensorBoard",
    "fp16": "there is no float16; nearest: bfloat16: train.dtype=bfloat16",
    "neftune_noise_alpha": "no noise is added to embeddings; nearest: dropout: train.dropout=0.1",
    "template": "remove it: the tokenizer's own chat template is the default",
    "save_strategy": "remove it: checkpoints are saved by steps, see checkpoint.every",
    "per_device_eval_batch_size": "remove it: validations take batches of train.micro_batch",
}
# Values of any kind, some of which each setting may have in other tools.
SAMPLES: tuple[Any, ...] = (1, 0.1, 8, 4096, True, False, "auto", "a/b", "cosine", "adamw_torch")


def told(path: Path, tree: dict[str, Any]) -> list[str]:
    (path / "r.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError) as e:
        parse(str(path / "r.yaml"))
    return [message.partition(": ")[2] for message in e.value.messages]


def applied(path: Path, message: str, *other: str) -> list[str]:
    """Applies the settings that a message says to write; returns their keys."""
    (path / "r.yaml").write_text(yaml.safe_dump(TREE))
    text = message.partition(": write ")[2] or message.partition("nearest: ")[2]
    text = re.sub(r" \([^)]*\)", "", text)
    settings = re.findall(r"[a-z_0-9.]+=(?:\[.*\]|\{.*\}|\".*?\"|[^\s(]+)", text)
    parse(str(path / "r.yaml"), [*settings, *other])
    return [setting.partition("=")[0] for setting in settings]


@pytest.mark.parametrize("name", TOLD)
def test_a_setting_is_told_with_the_users_value(name: str, tmp_path: Path) -> None:
    value, settings = TOLD[name]
    result = answer(name, value, TREE | {name: value})
    assert result is not None and result.is_same and result.settings == settings
    for tree in ({name: value}, {"train": TREE["train"] | {name: value}}):
        [message] = told(tmp_path, TREE | tree)
        place = name if name in tree else f"train.{name}"
        assert message.startswith(f"unknown key {place!r}: write ")
        assert applied(tmp_path, message) == list(settings)
    recipe = parse(
        str(tmp_path / "r.yaml"),
        [
            f"{key}={yaml.safe_dump(v, default_flow_style=True).removesuffix('...' + chr(10))}"
            for key, v in settings.items()
        ],
    )
    tree = recipe.model_dump(mode="json")
    for key, expected in settings.items():
        node: Any = tree
        for part in key.split("."):
            node = node[int(part)] if isinstance(node, list) else node[part]
        if isinstance(expected, list) and isinstance(expected[0], dict):
            node = [{"path": source["path"]} for source in node]
        assert node == expected


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_does_not_exist_here_is_told_with_the_nearest(name: str, tmp_path: Path) -> None:
    [message] = told(tmp_path, TREE | {name: True})
    assert message.startswith(f"unknown key {name!r}: {NOT_HERE[name]}")
    if "nearest" in message:
        assert applied(tmp_path, message)


def test_batches_are_computed_from_all_that_is_given(tmp_path: Path) -> None:
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    messages = told(tmp_path, TREE | {"train": {"steps": 100}} | batches)
    assert len(messages) == 2
    for message in messages:
        assert (
            "write train.global_batch=64 and train.micro_batch=4 (4 x 8 accumulated x 2 workers)"
            in (message)
        )
        assert applied(tmp_path, message) == ["train.global_batch", "train.micro_batch"]


@pytest.mark.parametrize("name", [*SYNONYMS, *VALUES])
def test_what_is_told_is_valid_and_exists(name: str, tmp_path: Path) -> None:
    """Each key in an answer to any value exists, and settings that are told make a valid recipe."""
    told_any = False
    rule = SYNONYMS.get(name) or VALUES[name]
    for value in SAMPLES:
        result = rule(value, Given(TREE))
        assert result.settings or result.note
        named = re.findall(r"\b[a-z_]+\.[a-z_]+(?:\.[a-z_0-9]+)*", result.note)
        keys = [*result.settings, *(k for k in named if not k.endswith((".json", ".jsonl")))]
        assert all(is_key_path(key) for key in keys if key != "metrics.jsonl"), keys
        told_any |= bool(keys) or "remove it" in result.note or "see objective" in result.note
        if result.settings and not result.is_same:
            (tmp_path / "r.yaml").write_text(yaml.safe_dump(TREE))
            parse(str(tmp_path / "r.yaml"), [f"{k}={v}" for k, v in result.settings.items()])
    assert told_any, name


def test_sections_of_other_tools_are_those_of_a_recipe(tmp_path: Path) -> None:
    for name, section in SECTIONS.items():
        assert is_key_path(section) and not is_key_path(name), name
        message = told(tmp_path, TREE | {name: {}})[0]
        assert message == f"unknown key {name!r}; did you mean {section!r}?"
    for name in SYNONYMS:
        assert not is_key_path(name), f"{name} is a key of a recipe"
