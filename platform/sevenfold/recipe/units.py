"""The units of a recipe's numbers, and an example of each key that has no default."""

from __future__ import annotations

import re

# Unit -> the keys of numbers with it, separated by spaces. "number of ..." is a count.
_UNITS = {
    "tokens": "data.sequence_length train.tokens train.loss_chunk data.curriculum.0.at_tokens "
    "corruption.mean_span validation.max_new_tokens",
    "steps": "train.steps train.log_every schedule.warmup_steps validation.every checkpoint.every "
    "checkpoint.keep_every",
    "number of sequences": "train.global_batch train.micro_batch validation.rows",
    "number of data steps": "data.skip",
    "number of times": "data.epochs",
    "number of lanes": "data.lanes",
    "number of token types": "tokenizer.vocab_size",
    "number of prompts": "validation.generate",
    "number of validations": "validation.patience",
    "number of checkpoints": "checkpoint.keep",
    "number of skipped steps": "guard.max_skipped",
    "number of rollbacks": "guard.max_rollbacks",
    "number of failures": "cluster.max_failures",
    "number of retries": "sweep.max_failures",
    "number of trials": "sweep.trials sweep.max_concurrent sweep.keep",
    "number of copies": "parallel.replicate",
    "number of workers": "parallel.tensor cluster.num_workers",
    "number of CPUs": "cluster.cpus_per_worker",
    "number of GPUs": "cluster.gpus_per_worker",
    "number of dimensions": "adapter.rank",
    "characters": "data.sources.0.filters.0.min_chars data.sources.0.filters.0.max_chars",
    "MB": "data.max_document_mb tokenizer.train_mb",
    "seconds": "cluster.resize_seconds cluster.wait_seconds",
    "hours": "checkpoint.mtbf_hours sweep.max_hours",
    "worker hours": "sweep.max_worker_hours",
    "any currency": "sweep.max_cost sweep.worker_hour_cost",
    "TFLOP/s": "cluster.peak_tflops",
    "fraction": "data.held_out corruption.rate train.dropout adapter.dropout "
    "train.label_smoothing schedule.decay_fraction schedule.min_ratio sweep.grace sweep.quantile",
    "relative share": "data.sources.0.weight data.curriculum.0.weights",
    "factor": "adapter.alpha preference.beta contrastive.temperature train.z_loss "
    "optimizer.learning_rate optimizer.betas optimizer.eps optimizer.weight_decay optimizer.l1 "
    "optimizer.momentum guard.spike_factor sweep.eta",
    "L2 norm": "train.max_grad_norm",
    "no unit": "seed",
    "as in the column": "data.sources.0.filters.0.min data.sources.0.filters.0.max "
    "data.sources.0.filters.0.one_of",
    "as of the key": "sweep.space.KEY.uniform sweep.space.KEY.loguniform sweep.space.KEY.integer "
    "sweep.space.KEY.choice sweep.space.KEY.when",
}
_UNIT_OF = {key: unit for unit, keys in _UNITS.items() for key in keys.split()}

# Key -> a value as it is written after `key=`.
EXAMPLES = {
    "name": "my-run",
    "data.path": "/data/text",
    "data.corpus": "python",
    "data.sources": "[{path: /data/text}]",
    "data.sources.0.path": "s3://bucket/text/*.jsonl.zst",
    "data.sources.0.name": "web",
    "data.sources.0.format": "jsonl",
    "data.sources.0.shape": "alpaca",
    "data.sources.0.columns": "{source: en, target: de}",
    "data.sources.0.encoding": "gb18030",
    "data.sources.0.weight": "0.8",
    "data.sources.0.filters": "[{column: score, min: 3}]",
    "data.sources.0.filters.0.column": "score",
    "data.sources.0.filters.0.min": "3",
    "data.sources.0.filters.0.max": "5",
    "data.sources.0.filters.0.one_of": "[train, val]",
    "data.sources.0.filters.0.min_chars": "200",
    "data.sources.0.filters.0.max_chars": "100000",
    "data.curriculum": "[{at_tokens: 8000000000, weights: {web: 0.5, math: 0.5}}]",
    "data.curriculum.0.at_tokens": "8000000000",
    "data.curriculum.0.weights": "{web: 0.5, math: 0.5}",
    "data.validation": "[{path: /data/heldout}]",
    "data.test": "[{path: /data/test}]",
    "data.classes": "[spam, ham]",
    "data.held_out": "0.001",
    "data.epochs": "2",
    "data.languages": "{source: en_XX, target: de_DE}",
    "data.sequence_length": "2048",
    "data.lanes": "64",
    "data.skip": "[[5000, 5010]]",
    "data.ignore_columns": "[id]",
    "data.cache": "/data/tokens",
    "tokenizer.path": "/models/tokenizer",
    "tokenizer.vocab_size": "32000",
    "tokenizer.chat_template": "plain",
    "model.config": "{model_type: llama, hidden_size: 768}",
    "model.path": "hf://HuggingFaceTB/SmolLM2-135M",
    "train.global_batch": "512",
    "train.micro_batch": "8",
    "train.steps": "10000",
    "train.tokens": "10000000000",
    "train.dropout": "0.1",
    "train.loss_chunk": "2048",
    "guard.spike_factor": "8",
    "validation.every": "100",
    "validation.bleu_tokenize": "zh",
    "validation.mode": "max",
    "validation.patience": "5",
    "checkpoint.every": "auto",
    "checkpoint.keep_every": "10000",
    "cluster.num_workers": "[4, 16]",
    "cluster.worker_labels": "{pool: train}",
    "cluster.data_labels": "{pool: data}",
    "cluster.peak_tflops": "989",
    "sweep.space": "{optimizer.learning_rate: {loguniform: [1e-4, 1e-2]}}",
    "sweep.space.KEY.uniform": "[0.0, 0.2]",
    "sweep.space.KEY.loguniform": "[1e-4, 1e-2]",
    "sweep.space.KEY.integer": "[4, 32]",
    "sweep.space.KEY.choice": "[4, 16, 32]",
    "sweep.space.KEY.when": "{optimizer.name: muon}",
    "sweep.trials": "20",
    "sweep.mode": "max",
    "sweep.max_concurrent": "4",
    "sweep.max_hours": "12",
    "sweep.max_worker_hours": "96",
    "sweep.max_cost": "500",
    "sweep.worker_hour_cost": "2.5",
}


def unit_of(path: str) -> str:
    """Returns the unit of a key's number; empty if it is no number.

    Args:
        path: The key's path, as in `keys.Key`.
    """
    return _UNIT_OF.get(re.sub(r"^data\.(validation|test)\.", "data.sources.", path), "")
