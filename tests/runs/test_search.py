import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from transformers import AutoModel, T5EncoderModel

from sevenfold.cli import main
from sevenfold.errors import InputError
from sevenfold.evaluate.embed import Embedder

TEXTS = [*tiny_models.WORDS, "the", "a dog over a fox " * 30]  # the last one is longer than the positions


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("bert"), "bert")


def test_vectors_are_those_made_one_by_one(encoder: str) -> None:
    made = Embedder(encoder, batch_size=3)(TEXTS)
    words, model = tiny_models.tokenizer(), AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    assert made.dtype == np.float32 and made.shape == (len(TEXTS), 32)
    for text, vector in zip(TEXTS, made, strict=True):
        ids = [words.bos_token_id, *words.encode(text, add_special_tokens=False)[:126], words.eos_token_id]
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert Embedder(encoder)([]).shape == (0, 32)


def test_max_length_cuts(encoder: str) -> None:
    short = Embedder(encoder, max_length=6)
    assert np.allclose(short(["the quick brown fox jumps"]), short(["the quick brown fox jumps over"]), atol=1e-6)
    with pytest.raises(InputError, match="more than the 2 tokens"):
        Embedder(encoder, max_length=2)


def test_the_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path, "t5")
    words, model = tiny_models.tokenizer(), T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [words.bos_token_id, *words.encode(TEXTS[0], add_special_tokens=False), words.eos_token_id]
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
    assert np.allclose(Embedder(folder)(TEXTS)[0], (mean / mean.norm()).numpy(), atol=1e-5)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "txt"])
def test_the_text_itself_ranks_first(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    texts = [t.replace("\n", " ") for t in TEXTS]
    corpus, names = tmp_path / f"corpus.{form}", [f"n{i}" for i in range(len(texts))]
    if form == "parquet":
        pq.write_table(pa.table({"name": names, "document": texts}), corpus)
    elif form == "jsonl":
        corpus.write_text("".join(json.dumps({"name": n, "content": t}) + "\n" for n, t in zip(names, texts, strict=True)))
    else:
        corpus.write_text("\n".join(texts) + "\n")
    key = [] if form == "txt" else ["--id", "name"]
    asked = ["--query", texts[1], "--query", texts[3], "--top", "2"]
    assert main(["search", encoder, "--corpus", str(corpus), *key, *asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["texts"] == len(texts)
    for at, one in zip((1, 3), told["queries"], strict=True):
        first, second = one["results"]
        assert first["text"] == texts[at] and first["score"] == pytest.approx(1, abs=1e-5) and second["score"] < first["score"]
        assert first["id"] == (f"{corpus}: row {at + 1}" if form == "txt" else f"n{at}")
    assert main(["search", encoder, "--corpus", str(corpus), *asked]) == 0
    assert texts[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "argv", "says"),
    [
        ({"body": "x"}, [], "row 1: expected one of the columns text, document, content, found body"),
        ({"text": "x"}, ["--text", "words"], "row 1: expected a column 'words', found text"),
        ({"text": "x"}, ["--id", "key"], "row 1: expected a column 'key', found text"),
        ({"text": " "}, [], "row 1: no text"),
        ({"text": "x"}, ["--top", "0"], "--top: expected 1 or more"),
        ({"text": "x"}, ["--query", " "], "--query: expected text"),
    ],
)
def test_bad_input(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], argv: list[str], says: str
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["search", encoder, "--corpus", str(tmp_path / "c.jsonl"), "--query", "q", *argv]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
