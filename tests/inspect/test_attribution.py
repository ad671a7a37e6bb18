"""The losses, saliency and attention that `sevenfold inspect` shows for a text."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_models

from sevenfold.cli import main
from sevenfold.engine.decode import decoder_start
from sevenfold.inference.load import Loaded, load
from sevenfold.inspect import attribution, model

TEXT, ANSWER = "the quick brown café 中文 jumps", "lazy dog 🙂"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        kind: tiny_models.save(tmp_path_factory.mktemp(kind), kind)
        for kind in ("llama", "bert", "t5")
    }


def row(ids: list[int]) -> torch.Tensor:
    """A batch of one row of token ids."""
    return torch.tensor([ids])


def token_ids(text: str) -> list[int]:
    """The token ids of a text without special tokens."""
    ids: list[int] = tiny_models.tokenizer().encode(text, add_special_tokens=False)
    return ids


def test_token_losses_add_up_to_the_loss_of_the_decoder(folders: dict[str, str]) -> None:
    result, loaded = model.run(folders["llama"], TEXT), load(folders["llama"])
    ids = [loaded.tokenizer.bos_token_id, *token_ids(TEXT)]
    outputs = loaded.model(input_ids=row(ids), labels=row(ids))
    assert (
        result["scored"] == len(ids) - 1
        and [token_of_result["id"] for token_of_result in result["tokens"]] == ids
    )
    assert result["nats"] == pytest.approx(float(outputs.loss) * (len(ids) - 1), rel=1e-5)
    order = outputs.logits[0, :-1].argsort(descending=True).tolist()
    for i, token in enumerate(result["tokens"][1:]):
        assert (
            token["probability"] == pytest.approx(math.exp(-token["nats"]))
            and order[i][token["rank"] - 1] == token["id"]
        )


def test_only_the_target_of_a_decoder_is_scored(folders: dict[str, str]) -> None:
    result, loaded = model.run(folders["llama"], TEXT, ANSWER), load(folders["llama"])
    prompt, answer = [loaded.tokenizer.bos_token_id, *token_ids(TEXT)], token_ids(ANSWER)
    labels = row([-100] * len(prompt) + answer)
    loss = loaded.model(input_ids=row(prompt + answer), labels=labels).loss
    assert result["scored"] == len(answer) and result["nats_per_token"] == pytest.approx(
        float(loss), rel=1e-5
    )


def test_the_target_of_an_encoder_decoder_is_scored(folders: dict[str, str]) -> None:
    result, loaded = model.run(folders["t5"], TEXT, ANSWER), load(folders["t5"])
    source = row(loaded.framed(TEXT, tail=True))
    answer = [*token_ids(ANSWER), loaded.tokenizer.eos_token_id]
    loss = loaded.model(input_ids=source, labels=row(answer)).loss
    assert result["scored"] == len(answer) and result["nats"] == pytest.approx(
        float(loss) * len(answer), rel=1e-5
    )


def test_an_encoder_gives_the_pseudo_likelihood(folders: dict[str, str]) -> None:
    result, loaded = model.run(folders["bert"], TEXT), load(folders["bert"])
    ids = loaded.framed(TEXT, tail=True)
    for i in range(1, len(ids) - 1):
        hidden, labels = list(ids), [-100] * len(ids)
        hidden[i], labels[i] = loaded.tokenizer.mask_token_id, ids[i]
        loss = loaded.model(input_ids=row(hidden), labels=row(labels)).loss
        assert result["tokens"][i]["nats"] == pytest.approx(float(loss), rel=1e-4)
    assert (
        result["scored"] == len(ids) - 2
        and "nats" not in result["tokens"][0]
        and result["pseudo_perplexity"] > 1
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_saliency_equals_finite_differences(folders: dict[str, str], kind: str) -> None:
    loaded = load(folders[kind])
    loaded.model.double()
    ids = loaded.framed(TEXT, tail=kind == "t5")
    result = attribution.saliency(loaded, ids, 7)
    embeddings = loaded.model.get_input_embeddings()(row(ids))
    rng = np.random.default_rng(0)
    # the norms of these models compute in float32 for any weights: a smaller step would be lost
    step = 1e-3
    for position in (0, len(ids) - 2):
        direction = rng.standard_normal(embeddings.shape[-1])
        above, below = (
            _logp(loaded, _moved(embeddings, position, sign * step * direction), 7)
            for sign in (1, -1)
        )
        assert result.gradient[position] @ direction == pytest.approx(
            (above - below) / (2 * step), rel=2e-3, abs=1e-3
        )
        assert result.scores[position] == pytest.approx(
            result.gradient[position] @ embeddings[0, position].numpy()
        )
    most_likely = attribution.saliency(loaded, ids)
    assert most_likely.logp >= result.logp and most_likely.logp == pytest.approx(
        _logp(loaded, embeddings, most_likely.token)
    )


def _moved(embeddings: torch.Tensor, position: int, offset: np.ndarray) -> torch.Tensor:
    """The embeddings with one position moved by a vector."""
    moved = embeddings.clone()
    moved[0, position] += torch.from_numpy(offset)
    return moved


@torch.no_grad()
def _logp(loaded: Loaded, inputs: torch.Tensor, token: int) -> float:
    """The log-probability of a token after these embeddings."""
    decoder: dict[str, Any] = {}
    if loaded.family == "encoder-decoder":
        decoder["decoder_input_ids"] = row([decoder_start(loaded.model, loaded.tokenizer)])
    return float(loaded.model(inputs_embeds=inputs, **decoder).logits[0, -1].log_softmax(-1)[token])


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_attention_sums_to_one(folders: dict[str, str], kind: str) -> None:
    result = model.run(folders[kind], TEXT, attention=True)
    shares = [token["attention"] for token in result["tokens"]]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) >= 0


def test_all_figures_are_written_as_json(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    path = tmp_path / "out.json"
    argv = [
        "inspect",
        folders["llama"],
        "--text-file",
        str(tmp_path / "text.txt"),
        "--saliency",
        "--attention",
    ]
    assert main([*argv, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"nats", "rank", "saliency", "attention"} < result["tokens"][3].keys() and 0 < result[
        "next"
    ]["probability"] < 1
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
def test_bad_input_is_refused_in_one_line(
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    argv: list[str],
    says: str,
) -> None:
    assert main(["inspect", *([folders[kind]] if kind else []), *argv]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1, message
