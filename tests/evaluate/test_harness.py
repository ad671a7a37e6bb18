"""Evaluation with lm-eval, the harness of EleutherAI."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sevenfold.errors import InputError
from sevenfold.evaluate.harness import _error, harness

TASK = """task: parity
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    folder = tmp_path / "model, tiny"  # lm-eval would split a model argument at the comma
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_task_of_local_files_is_evaluated(model: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "options": ["yes", "no"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK)
    results = harness(model, tmp_path / "task.yaml", limit=4)
    assert results["samples"] == {"parity": {"original": 6, "effective": 4}}
    assert results["results"]["parity"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    (tmp_path / "task.yaml").write_text(TASK.replace("rows.jsonl", "none.jsonl"))
    with pytest.raises(InputError, match=r"task\.yaml: lm-eval could not evaluate .*none\.jsonl"):
        harness(model, tmp_path / "task.yaml")


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_missing_tasks_and_models_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected an lm-eval task"):
        harness(model, tmp_path / "none.yaml")
    (tmp_path / "task.yaml").write_text(TASK)
    with pytest.raises(InputError, match=r"found no config\.json"):
        harness(tmp_path, tmp_path / "task.yaml")


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_lm_eval_is_reported_with_its_installation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pip install 'sevenfold\[harness\]'"):
        harness(tmp_path, tmp_path / "task.yaml")


def test_the_error_is_the_end_of_a_traceback() -> None:
    trace = (
        'noise\nTraceback (most recent call):\n  File "a.py", line 1, in f\n    g()\n'
        'ValueError: no good\n  in "b.yaml"\n'
    )
    assert _error(trace) == 'ValueError: no good in "b.yaml"'
    assert _error("usage: wrong\n") == "usage: wrong"
    assert _error("") == ""
