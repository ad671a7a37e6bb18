"""Text generation and chat with small models of each family."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import tiny_models
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sevenfold.cli import main
from sevenfold.engine.decode import Sampling, generation_config
from sevenfold.errors import InputError
from sevenfold.inference import chat
from sevenfold.inference.load import load
from sevenfold.report.console import escape

PROMPT = "the quick"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(
        tmp_path_factory.mktemp("llama") / "model", "llama", tiny_models.TEMPLATE
    )


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("t5"), "t5")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("bert"), "bert")


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_text_equals_that_of_transformers(
    decoder: str, capsys: pytest.CaptureFixture[str], beams: int
) -> None:
    tokenizer = tiny_models.tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer.encode(PROMPT, add_special_tokens=False)]
    model: Any = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    generated = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=40,
        do_sample=False,
        num_beams=beams,
    )
    expected = tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)
    run = str(Path(decoder).parent)  # the folder of a run has its model in model/
    assert chat.generate(run, PROMPT, Sampling(40, 0.0, beams=beams)) == expected
    shown = escape(expected, lines=True)
    assert capsys.readouterr().out == shown + "\n" and len(expected) > 10


def test_an_encoder_decoder_reads_the_framed_source(seq2seq: str) -> None:
    tokenizer = tiny_models.tokenizer()
    ids = [
        tokenizer.bos_token_id,
        *tokenizer.encode(PROMPT, add_special_tokens=False),
        tokenizer.eos_token_id,
    ]
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(seq2seq, dtype=torch.float32)
    generated = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=20,
        do_sample=False,
    )
    expected = tokenizer.decode(generated[0], skip_special_tokens=True)
    assert chat.generate(seq2seq, PROMPT, Sampling(20, 0.0)) == expected
    assert chat.generate(seq2seq, PROMPT, Sampling(20, beams=2))


def test_the_seed_decides_the_sample(decoder: str) -> None:
    first, repeated, other = (
        chat.generate(decoder, PROMPT, Sampling(40, 1.0, 0.95, 0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == repeated != other


def test_generation_is_limited_by_the_positions_of_the_model(
    decoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(decoder)
    config = generation_config(loaded.model, loaded.tokenizer, Sampling(5))
    assert config.eos_token_id == [loaded.tokenizer.eos_token_id] and config.max_new_tokens == 5
    chat.generate(decoder, PROMPT, Sampling(1000, 0.0))
    assert "the model has only 128 positions" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"at most 127 tokens .* found \d+: shorten"):
        chat.generate(decoder, "x y" * 200, Sampling())


def test_every_end_token_of_the_model_is_used(decoder: str) -> None:
    loaded = load(decoder)
    loaded.model.generation_config.eos_token_id = [5, 9]
    assert generation_config(loaded.model, loaded.tokenizer, Sampling(5)).eos_token_id == sorted(
        {5, 9, loaded.tokenizer.eos_token_id}
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"beams": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_bad_sampling_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(bad)).replace('_', '-')}: expected"):
        Sampling(**bad)


def test_chat_keeps_the_history(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    messages = chat.chat(decoder, "be brief", ["one", "two"], Sampling(8, 0.0))
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    printed = f"> one\n{messages[2]['content']}\n\n> two\n{messages[4]['content']}\n\n"
    assert capsys.readouterr().out == escape(printed, lines=True)
    tokenizer = tiny_models.tokenizer()
    prompt = (
        f"<|bos|>[system]be brief[user]one[assistant]{messages[2]['content']}<|eos|>"
        "[user]two[assistant]"
    )
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    model: Any = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert (
        tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        == messages[4]["content"]
    )


def test_a_conversation_in_the_terminal(
    decoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "talk.jsonl"
    lines = [
        "first",
        "/new",
        "hello",
        f"/save {path}",
        "/what",
        "again",
        f"/save {path}",
        "/exit",
        "never",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", decoder, "--max-new-tokens", "8", "--temperature", "0"]) == 0
    first, second = (json.loads(line)["messages"] for line in path.read_text().splitlines())
    assert [message["content"] for message in first if message["role"] == "user"] == [
        "hello"
    ] and second[: len(first)] == first
    assert [message["role"] for message in second] == ["user", "assistant"] * 2
    output = capsys.readouterr().out
    assert f"{path}: row 2" in output and "/what: expected /new" in output and "never" not in output


def test_end_of_input_ends_the_chat(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", decoder]) == 0


def test_the_oldest_turns_are_dropped_when_the_chat_is_too_long(
    decoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = chat.chat(
        decoder,
        "sys",
        ["the lazy dog " * 6, "five dozen " * 5, "the quick brown " * 6],
        Sampling(20, 0.0),
    )
    assert len(messages) == 7  # the returned history is complete
    assert "no longer sees the first" in capsys.readouterr().out
    with pytest.raises(InputError, match="the message: expected at most"):
        chat.chat(decoder, None, ["x" * 500], Sampling(20, 0.0))


def test_fitted_drops_the_oldest_turns() -> None:
    def render(messages: list[chat.Message]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)

    conversation = [
        {"role": role, "content": content}
        for role, content in (
            ("system", "s"),
            ("user", "aaaa"),
            ("assistant", "bb"),
            ("user", "cc"),
        )
    ]
    assert chat.fitted(render, conversation, None) == ([0] * 9, 0)
    assert chat.fitted(render, conversation, 9) == ([0] * 9, 0)
    assert chat.fitted(render, conversation, 8) == ([0] * 3, 1)
    with pytest.raises(InputError, match="expected at most 2 tokens"):
        chat.fitted(render, conversation, 2)


@pytest.mark.parametrize(
    ("model", "argv", "says"),
    [
        ("decoder", ["generate"], "--prompt and --prompt-file"),
        ("decoder", ["generate", "--prompt-file", "none.txt"], "none.txt: expected a file"),
        (
            "decoder",
            ["generate", "--prompt", "a", "--top-p", "2"],
            "--top-p: expected above 0, at most 1, found 2.0",
        ),
        ("encoder", ["generate", "--prompt", "a"], "found an encoder (bert)"),
        ("seq2seq", ["chat", "--prompt", "a"], "found an encoder-decoder"),
        ("none", ["chat", "--prompt", "a"], "expected a run, a Hugging Face directory"),
        ("plain", ["chat", "--prompt", "a"], "tokenizer.chat_template=plain"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    model: str,
    argv: list[str],
    says: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if model == "plain":
        path = tiny_models.save(tmp_path, "llama")
    else:
        path = str(tmp_path) if model == "none" else request.getfixturevalue(model)
    try:
        code = main([argv[0], path, *argv[1:]])
    except SystemExit as error:
        code = int(error.code or 0)
    message = capsys.readouterr().err
    assert code == 2 and says in message and message.count("\n") == 1, message


def test_an_interrupt_ends_the_text_cleanly(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path, "llama", positions=10**6)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(
        json.dumps(config | {"suppress_tokens": [config["eos_token_id"]]})
    )
    command = [
        sys.executable,
        "-m",
        "sevenfold.cli",
        "generate",
        folder,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "900000",
    ]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'platform'}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONIOENCODING": "utf-8",
    }
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 0 and not error, error
    assert len(first) == 20 and rest.endswith(b"\n")
