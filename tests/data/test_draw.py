"""Held-out rows are drawn from all over the held-out documents."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sevenfold.data import draw
from sevenfold.data.encode import TextEncoder
from sevenfold.data.examples import PairEncoder
from sevenfold.data.order import DataOrder
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.stream import Stream
from sevenfold.data.tokenizer import train_tokenizer
from sevenfold.recipe import Source

LENGTH, CLASSES, DOCUMENTS = 64, 5, 2000


class Sorted(NamedTuple):
    """Documents that are sorted by class, each of which names its class and number."""

    folder: Path
    stream: Stream
    tokenizer: Any


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Sorted:
    folder = tmp_path_factory.mktemp("sorted")
    texts = [
        f"class{i * CLASSES // DOCUMENTS} number{i} " + "word " * (i % 40) for i in range(DOCUMENTS)
    ]
    pq.write_table(pa.table({"text": texts[:1000]}), folder / "a.parquet", row_group_size=100)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[1000:])
    (folder / "b.jsonl").write_text(lines)
    manifest = scan([Source(path=str(folder))], "causal", most=5000)
    assert len(manifest) > 10
    tokenizer = train_tokenizer(manifest, Selection(), 400, 0.5, 0)
    encoder = TextEncoder(tokenizer, LENGTH)
    order = DataOrder(manifest, 0, 1)
    return Sorted(folder, Stream(order, Selection(), encoder, LENGTH, "inline"), tokenizer)


def drawn(data: Sorted, limit: int, **changes: Any) -> list[tuple[str, str]]:
    """Returns the class and the number of each document that begins in the drawn rows."""
    rows = draw.draw_rows(replace(data.stream, **changes), limit)
    texts = [
        data.tokenizer.decode(tokens[:used].tolist())
        for tokens, used in zip(rows.tokens, rows.used, strict=True)
    ]
    return re.findall(r"(class\d) (number\d+)", " ".join(texts))


@pytest.mark.parametrize("limit", [16, 64])
def test_rows_come_from_all_over_the_documents(data: Sorted, limit: int) -> None:
    found = drawn(data, limit)
    share = Counter(name for name, _ in found)
    assert len(share) == CLASSES
    assert limit < 64 or min(share.values()) > 0.4 * max(share.values())
    assert drawn(data, limit) == found and len(set(found)) == len(found)
    assert drawn(data, limit, order=replace(data.stream.order, seed=1)) != found


def test_all_rows_if_there_are_fewer(data: Sorted) -> None:
    found = drawn(data, 10_000)
    assert sorted(set(found)) == sorted(found) and len(found) == DOCUMENTS


def test_a_small_share_is_looked_for_in_as_much_as_it_takes(
    data: Sorted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "DRAWN_MB", 0.001)
    held_out = Selection(held_out=0.1, split="held_out")
    assert len(draw.draw_rows(replace(data.stream, selection=held_out), 30)) > 20
    # of much data only some row groups are read
    read = []

    class Watched(Selection):
        def read(self, manifest: Any, index: int) -> Any:
            read.append(index)
            return super().read(manifest, index)

    draw.draw_rows(replace(data.stream, selection=Watched()), 2)
    assert 0 < len(set(read)) == len(read) < len(data.stream.order.manifest) / 2


def test_prompts_are_drawn_too(data: Sorted, tmp_path: Path) -> None:
    lines = [{"source": f"question {i}", "target": f"answer {i}"} for i in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = scan([Source(path=str(tmp_path))], "seq2seq", most=1000)
    encoder = PairEncoder(data.tokenizer, LENGTH)
    stream = Stream(DataOrder(manifest, 0, 1), Selection(encoder.fields), encoder, LENGTH, "inline")
    pairs = draw.draw_documents(stream, 20, encoder.prompts)
    numbers = [int(prompt.split()[-1]) for _, prompt, _ in pairs]
    assert len(set(numbers)) == 20 and max(numbers) - min(numbers) > 300
    assert all(
        reference == f"answer {n}" for n, (_, _, reference) in zip(numbers, pairs, strict=True)
    )
    assert draw.draw_documents(stream, 20, encoder.prompts) == pairs
    everything = draw.draw_documents(stream, 9999, encoder.prompts)
    assert len(everything) == 500 and everything[:20] == pairs
