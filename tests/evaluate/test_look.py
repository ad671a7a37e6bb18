import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from sevenfold.cli import main
from sevenfold.evaluate import look
from sevenfold.model.load import Loaded, load
from sevenfold.runs import inspect

TEXT, ANSWER = "the quick brown café 中文 jumps", "lazy dog 🙂"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: tiny_models.save(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "bert", "t5")}


def row(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids])


def own(text: str) -> list[int]:
    made: list[int] = tiny_models.tokenizer().encode(text, add_special_tokens=False)
    return made


def test_a_decoders_losses_add_up_to_its_own(folders: dict[str, str]) -> None:
    made, loaded = inspect.run(folders["llama"], TEXT), load(folders["llama"])
    ids = [loaded.tokenizer.bos_token_id, *own(TEXT)]
    whole = loaded.model(input_ids=row(ids), labels=row(ids))
    assert made["scored"] == len(ids) - 1 and [r["id"] for r in made["tokens"]] == ids
    assert made["nats"] == pytest.approx(float(whole.loss) * (len(ids) - 1), rel=1e-5)
    order = whole.logits[0, :-1].argsort(descending=True).tolist()
    for i, told in enumerate(made["tokens"][1:]):
        assert told["probability"] == pytest.approx(math.exp(-told["nats"])) and order[i][told["rank"] - 1] == told["id"]


def test_a_decoders_target(folders: dict[str, str]) -> None:
    made, loaded = inspect.run(folders["llama"], TEXT, ANSWER), load(folders["llama"])
    given, answer = [loaded.tokenizer.bos_token_id, *own(TEXT)], own(ANSWER)
    labels = row([-100] * len(given) + answer)
    loss = loaded.model(input_ids=row(given + answer), labels=labels).loss
    assert made["scored"] == len(answer) and made["nats_per_token"] == pytest.approx(float(loss), rel=1e-5)


def test_an_encoder_decoders_target(folders: dict[str, str]) -> None:
    made, loaded = inspect.run(folders["t5"], TEXT, ANSWER), load(folders["t5"])
    source = row(loaded.framed(TEXT, tail=True))
    answer = [*own(ANSWER), loaded.tokenizer.eos_token_id]
    loss = loaded.model(input_ids=source, labels=row(answer)).loss
    assert made["scored"] == len(answer) and made["nats"] == pytest.approx(float(loss) * len(answer), rel=1e-5)


def test_an_encoders_pseudo_likelihood(folders: dict[str, str]) -> None:
    made, loaded = inspect.run(folders["bert"], TEXT), load(folders["bert"])
    ids = loaded.framed(TEXT, tail=True)
    for i in range(1, len(ids) - 1):
        hidden, labels = list(ids), [-100] * len(ids)
        hidden[i], labels[i] = loaded.tokenizer.mask_token_id, ids[i]
        loss = loaded.model(input_ids=row(hidden), labels=row(labels)).loss
        assert made["tokens"][i]["nats"] == pytest.approx(float(loss), rel=1e-4)
    assert made["scored"] == len(ids) - 2 and "nats" not in made["tokens"][0] and made["pseudo_perplexity"] > 1


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_saliency_against_finite_differences(folders: dict[str, str], kind: str) -> None:
    loaded = load(folders[kind])
    loaded.model.double()
    ids = loaded.framed(TEXT, tail=kind == "t5")
    found = look.saliency(loaded, ids, 7)
    table = loaded.model.get_input_embeddings()(row(ids))
    rng, step = np.random.default_rng(0), 1e-3  # these models' norms are float32, whatever the weights: a smaller step drowns
    for at in (0, len(ids) - 2):
        direction = rng.standard_normal(table.shape[-1])
        up, down = (_logp(loaded, _moved(table, at, sign * step * direction), 7) for sign in (1, -1))
        assert found.gradient[at] @ direction == pytest.approx((up - down) / (2 * step), rel=2e-3, abs=1e-3)
        assert found.scores[at] == pytest.approx(found.gradient[at] @ table[0, at].numpy())
    likeliest = look.saliency(loaded, ids)
    assert likeliest.logp >= found.logp and likeliest.logp == pytest.approx(_logp(loaded, table, likeliest.token))


def _moved(table: torch.Tensor, at: int, by: np.ndarray) -> torch.Tensor:
    moved = table.clone()
    moved[0, at] += torch.from_numpy(by)
    return moved


@torch.no_grad()
def _logp(loaded: Loaded, inputs: torch.Tensor, token: int) -> float:
    more: dict[str, Any] = {"decoder_input_ids": row([loaded.start])} if loaded.family == "encoder-decoder" else {}
    return float(loaded.model(inputs_embeds=inputs, **more).logits[0, -1].log_softmax(-1)[token])


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_attention_sums_to_one(folders: dict[str, str], kind: str) -> None:
    made = inspect.run(folders[kind], TEXT, attention=True)
    shares = [r["attention"] for r in made["tokens"]]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) >= 0


def test_all_figures_as_json(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    to = tmp_path / "out.json"
    argv = ["inspect", folders["llama"], "--text-file", str(tmp_path / "text.txt"), "--saliency", "--attention"]
    assert main([*argv, "--json", str(to)]) == 0
    told = json.loads(to.read_text())
    assert {"nats", "rank", "saliency", "attention"} < told["tokens"][3].keys() and 0 < told["next"]["probability"] < 1
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "argv", "says"),
    [
        ("t5", ["--text", "a"], "expected --target TEXT too"),
        ("bert", ["--text", "a", "--saliency"], "leave out --saliency"),
        ("bert", ["--text", "a", "--target", "b"], "leave out --target"),
        ("llama", ["--text", " "], "--text: expected text, found none"),
        ("llama", ["--text", "x" * 500], "the text: expected at most 128 tokens, found 501"),
        ("llama", ["--data", "somewhere"], "expected either RUN with --text"),
        ("", ["--text", "a"], "expected either RUN with --text"),
    ],
)
def test_bad_input(folders: dict[str, str], capsys: pytest.CaptureFixture[str], kind: str, argv: list[str], says: str) -> None:
    assert main(["inspect", *([folders[kind]] if kind else []), *argv]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
