"""Bits per byte and perplexity: every token once, and the same as by transformers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from sevenfold.data.encode import TextEncoder
from sevenfold.data.order import DataOrder
from sevenfold.data.rows import IGNORE, labels
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.stream import Stream
from sevenfold.data.tokenizer import load_tokenizer, token_bytes
from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
from sevenfold.errors import InputError
from sevenfold.evaluate.held_out_text import overlapping_rows
from sevenfold.recipe import Source

LENGTH = 32


def held_out(folder: Path, texts: list[str], model: str) -> Stream:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    manifest = scan([Source(path=str(folder / "a.jsonl"))], "causal")
    encoder = TextEncoder(load_tokenizer(model), LENGTH)
    return Stream(DataOrder(manifest, 0, 1), Selection(), encoder, LENGTH, "inline")


def strided_losses(model: Any, ids: list[int]) -> torch.Tensor:
    """Returns the loss of each token but the first, by the strided windows of transformers' guide.

    huggingface.co/docs/transformers/perplexity, with a stride of three quarters.
    """
    losses: list[torch.Tensor] = []
    previous_end, stride = 1, 3 * LENGTH // 4
    for begin in range(0, len(ids), stride):
        end = min(begin + LENGTH, len(ids))
        window = torch.tensor([ids[begin:end]])
        with torch.no_grad():
            logits = model(input_ids=window).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        losses.append(loss[len(loss) - (end - previous_end) :])
        previous_end = end
        if end == len(ids):
            break
    return torch.cat(losses)


@pytest.mark.parametrize("words", [[1, 2], [200], [3, 60, 1, 400, 25]])
def test_it_equals_transformers_on_long_documents(words: list[int], tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "model", "llama")
    texts = [" ".join(["fox jumps quick dog"] * n)[: 9 * n] for n in words]
    stream = held_out(tmp_path, texts, folder)
    rows = overlapping_rows(stream)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    objective = Causal(SpecialTokens.from_tokenizer(tokenizer, "causal"), 0, 0.5, 1)
    token_losses = attach_losses(model, objective)
    with torch.no_grad():
        losses, _ = token_losses(objective.collate(rows, 0), with_predictions=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [
        [stream.encoder.head, *stream.encoder.ids([text])[0], stream.encoder.tail] for text in texts
    ]
    expected = torch.cat(
        [strided_losses(reference, [i for i in one if i is not None]) for one in ids]
    )
    targets = labels(rows)
    assert (targets != IGNORE).sum() == len(expected)
    assert float(losses.sum()) == pytest.approx(float(expected.sum()), rel=1e-5)
    # per byte: the bytes of all targets are those of the texts
    sizes = token_bytes(tokenizer)[targets[targets != IGNORE]]
    assert int(sizes.sum()) == sum(len(t.encode()) for t in texts)
    assert math.isfinite(float(losses.sum()))


def test_documents_without_a_target(tmp_path: Path) -> None:
    """A tokenizer without BOS leaves a document of one token nothing to predict but its end."""
    folder = tiny_models.save(tmp_path / "model", "llama")
    stream = held_out(tmp_path, ["a", "b"], folder)
    assert (labels(overlapping_rows(stream)) != IGNORE).sum() == 4  # each letter, and its end
    stream.encoder.head = stream.encoder.tail = None
    with pytest.raises(InputError, match="fewer than two tokens each"):
        overlapping_rows(stream)
