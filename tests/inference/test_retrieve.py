"""Embeddings of texts, and retrieval from a corpus."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_models
from transformers import AutoModel, T5EncoderModel

from sevenfold.cli import main
from sevenfold.errors import InputError
from sevenfold.inference.embed import Embedder

# the last text is longer than the model's positions
TEXTS = [*tiny_models.TEXTS, "the", "a dog over a fox " * 30]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("bert"), "bert")


def test_vectors_in_batches_equal_single_ones(encoder: str) -> None:
    vectors = Embedder(encoder, batch_size=3)(TEXTS)
    tokenizer = tiny_models.tokenizer()
    model = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 32)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = [
            tokenizer.bos_token_id,
            *tokenizer.encode(text, add_special_tokens=False)[:126],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert Embedder(encoder)([]).shape == (0, 32)


def test_max_length_cuts_texts(encoder: str) -> None:
    short = Embedder(encoder, max_length=6)
    assert np.allclose(
        short(["the quick brown fox jumps"]), short(["the quick brown fox jumps over"]), atol=1e-6
    )
    with pytest.raises(InputError, match="more than the 2 tokens"):
        Embedder(encoder, max_length=2)


def test_an_encoder_decoder_embeds_with_its_encoder(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path, "t5")
    tokenizer = tiny_models.tokenizer()
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [
        tokenizer.bos_token_id,
        *tokenizer.encode(TEXTS[0], add_special_tokens=False),
        tokenizer.eos_token_id,
    ]
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
    assert np.allclose(Embedder(folder)(TEXTS)[0], (mean / mean.norm()).numpy(), atol=1e-5)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "txt"])
def test_a_text_of_the_corpus_ranks_first_for_itself(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    texts = [text.replace("\n", " ") for text in TEXTS]
    corpus, names = tmp_path / f"corpus.{form}", [f"n{i}" for i in range(len(texts))]
    if form == "parquet":
        pq.write_table(pa.table({"name": names, "document": texts}), corpus)
    elif form == "jsonl":
        corpus.write_text(
            "".join(
                json.dumps({"name": name, "content": text}) + "\n"
                for name, text in zip(names, texts, strict=True)
            )
        )
    else:
        corpus.write_text("\n".join(texts) + "\n")
    id_option = [] if form == "txt" else ["--id", "name"]
    queries = ["--query", texts[1], "--query", texts[3], "--top", "2"]
    assert main(["retrieve", encoder, "--corpus", str(corpus), *id_option, *queries, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["texts"] == len(texts)
    for index, query in zip((1, 3), output["queries"], strict=True):
        first, second = query["results"]
        assert (
            first["text"] == texts[index]
            and first["score"] == pytest.approx(1, abs=1e-5)
            and second["score"] < first["score"]
        )
        assert first["id"] == (f"{corpus}: row {index + 1}" if form == "txt" else f"n{index}")
    assert main(["retrieve", encoder, "--corpus", str(corpus), *queries]) == 0
    assert texts[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "argv", "says"),
    [
        (
            {"body": "x"},
            [],
            "row 1: expected one of the columns text, document, content, found body",
        ),
        ({"text": "x"}, ["--text", "words"], "row 1: expected a column 'words', found text"),
        ({"text": "x"}, ["--id", "key"], "row 1: expected a column 'key', found text"),
        ({"text": " "}, [], "row 1: no text"),
        ({"text": "x"}, ["--top", "0"], "--top: expected 1 or more"),
        ({"text": "x"}, ["--query", " "], "--query: expected text"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    encoder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, str],
    argv: list[str],
    says: str,
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    assert (
        main(["retrieve", encoder, "--corpus", str(tmp_path / "c.jsonl"), "--query", "q", *argv])
        == 2
    )
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1, message
