import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sevenfold.cli import main
from sevenfold.errors import InputError
from sevenfold.evaluate.stream import Sampling, settings
from sevenfold.model.load import load
from sevenfold.runs import use

PROMPT = "the quick"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("llama") / "model", "llama", tiny_models.TEMPLATE)


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("t5"), "t5")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("bert"), "bert")


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_text_is_transformers_own(decoder: str, capsys: pytest.CaptureFixture[str], beams: int) -> None:
    words = tiny_models.tokenizer()
    ids = [words.bos_token_id, *words.encode(PROMPT, add_special_tokens=False)]
    model: Any = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    made = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=40,
        do_sample=False,
        num_beams=beams,
    )
    expected = words.decode(made[0, len(ids) :], skip_special_tokens=True)
    run = str(Path(decoder).parent)  # a run of ours keeps its model in model/
    assert use.generate(run, PROMPT, Sampling(40, 0.0, beams=beams)) == expected
    assert capsys.readouterr().out == expected + "\n" and len(expected) > 10


def test_an_encoder_decoder_reads_the_framed_source(seq2seq: str) -> None:
    words = tiny_models.tokenizer()
    ids = [words.bos_token_id, *words.encode(PROMPT, add_special_tokens=False), words.eos_token_id]
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(seq2seq, dtype=torch.float32)
    made = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, do_sample=False
    )
    expected = words.decode(made[0], skip_special_tokens=True)
    assert use.generate(seq2seq, PROMPT, Sampling(20, 0.0)) == expected
    assert use.generate(seq2seq, PROMPT, Sampling(20, beams=2))


def test_same_seed_same_sample(decoder: str) -> None:
    one, again, other = (use.generate(decoder, PROMPT, Sampling(40, 1.0, 0.95, 0, seed=s)) for s in (1, 1, 2))
    assert one == again != other


def test_positions_bound_what_is_made(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(decoder)
    chosen = settings(loaded, Sampling(), 5)
    assert chosen.eos_token_id == [loaded.tokenizer.eos_token_id] and chosen.max_new_tokens == 5
    use.generate(decoder, PROMPT, Sampling(1000, 0.0))
    assert "positions leave no more" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"at most 127 tokens .* found \d+: shorten"):
        use.generate(decoder, "x y" * 200, Sampling())


def test_every_end_token_ends(decoder: str) -> None:
    loaded = load(decoder)
    loaded.model.generation_config.eos_token_id = [5, 9]
    assert settings(loaded, Sampling(), 5).eos_token_id == sorted({5, 9, loaded.tokenizer.eos_token_id})


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"beams": 0}, {"max_new_tokens": 0}, {"seed": -1}]
)
def test_bad_sampling(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(bad)).replace('_', '-')}: expected"):
        Sampling(**bad)


def test_chat_keeps_the_history(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = use.chat(decoder, "be brief", ["one", "two"], Sampling(8, 0.0))
    assert [m["role"] for m in made] == ["system", "user", "assistant", "user", "assistant"]
    assert capsys.readouterr().out == f"> one\n{made[2]['content']}\n\n> two\n{made[4]['content']}\n\n"
    words = tiny_models.tokenizer()
    asked = f"<|bos|>[system]be brief[user]one[assistant]{made[2]['content']}<|eos|>[user]two[assistant]"
    ids = torch.tensor([words.encode(asked, add_special_tokens=False)])
    model: Any = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert words.decode(answer[0, ids.shape[1] :], skip_special_tokens=True) == made[4]["content"]


def test_a_conversation_in_the_terminal(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "talk.jsonl"
    lines = ["first", "/new", "hello", f"/save {to}", "/what", "again", f"/save {to}", "/exit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", decoder, "--max-new-tokens", "8", "--temperature", "0"]) == 0
    one, two = (json.loads(line)["messages"] for line in to.read_text().splitlines())
    assert [m["content"] for m in one if m["role"] == "user"] == ["hello"] and two[: len(one)] == one
    assert [m["role"] for m in two] == ["user", "assistant"] * 2
    out = capsys.readouterr().out
    assert f"{to}: row 2" in out and "/what: expected /new" in out and "never" not in out


def test_end_of_input_leaves(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", decoder]) == 0


def test_the_oldest_turns_make_room(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = use.chat(decoder, "sys", ["the lazy dog " * 6, "five dozen " * 5, "the quick brown " * 6], Sampling(20, 0.0))
    assert len(made) == 7  # nothing is lost of what is kept
    assert "no longer sees the first" in capsys.readouterr().out
    with pytest.raises(InputError, match="the message: expected at most"):
        use.chat(decoder, None, ["x" * 500], Sampling(20, 0.0))


def test_fitted() -> None:
    def render(messages: list[use.Message]) -> list[int]:
        return [0] * sum(len(m["content"]) for m in messages)

    talk = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "aaaa"), ("assistant", "bb"), ("user", "cc"))]
    assert use.fitted(render, talk, None) == ([0] * 9, 0)
    assert use.fitted(render, talk, 9) == ([0] * 9, 0)
    assert use.fitted(render, talk, 8) == ([0] * 3, 1)
    with pytest.raises(InputError, match="expected at most 2 tokens"):
        use.fitted(render, talk, 2)


@pytest.mark.parametrize(
    ("model", "argv", "says"),
    [
        ("decoder", ["generate"], "required"),
        ("decoder", ["generate", "--prompt-file", "none.txt"], "none.txt: expected a file"),
        ("decoder", ["generate", "--prompt", "a", "--top-p", "2"], "--top-p: expected above 0, at most 1, found 2.0"),
        ("encoder", ["generate", "--prompt", "a"], "found an encoder (bert)"),
        ("seq2seq", ["chat", "--prompt", "a"], "found an encoder-decoder"),
        ("none", ["chat", "--prompt", "a"], "expected a run or a Hugging Face directory"),
        ("plain", ["chat", "--prompt", "a"], "tokenizer.chat_template=plain"),
    ],
)
def test_bad_input(
    model: str, argv: list[str], says: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model == "plain":
        path = tiny_models.save(tmp_path, "llama")
    else:
        path = str(tmp_path) if model == "none" else request.getfixturevalue(model)
    try:
        code = main([argv[0], path, *argv[1:]])
    except SystemExit as e:
        code = int(e.code or 0)
    said = capsys.readouterr().err
    assert code == 2 and says in said and said.count("\n") == 1, said


def test_interrupted_in_the_middle(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path, "llama", positions=10**6)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"suppress_tokens": [config["eos_token_id"]]}))
    command = [sys.executable, "-m", "sevenfold.cli", "generate", folder, "--prompt", PROMPT, "--max-new-tokens", "900000"]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{os.environ.get('PYTHONPATH', '')}", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    assert len(first) == 20 and rest.endswith(b"\n")
