"""The token cache gives the rows that the text gives; what is damaged or of something else is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sevenfold.data import cache
from sevenfold.data.documents import Selection
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.manifest import scan
from sevenfold.data.order import Plan
from sevenfold.data.stream import Stream
from sevenfold.data.tokens import train_tokenizer
from sevenfold.errors import InputError
from sevenfold.recipe import Source


@pytest.fixture(scope="module")
def stream(texts: Path) -> Stream:
    found = scan([Source(path=str(texts / "train"))], "causal", 8)
    encoder = TextEncoder(train_tokenizer(found, Selection(), 600, 0.5, 0), 256, "gigatoken")
    return Stream(Plan(found, 5, 2), Selection(), encoder, 256, "inline")


def fill(stream: Stream, folder: Path) -> cache.TokenCache:
    manifest = stream.plan.manifest
    assert not cache.begin(str(folder), manifest, stream.selection, stream.encoder)
    counts = [
        cache.write_shard(str(folder), i, manifest, stream.selection, stream.encoder) for i in range(len(manifest.shards))
    ]
    totals = {k: sum(c[k] for c in counts) for k in counts[0]}
    cache.finish(str(folder), manifest, stream.selection, stream.encoder, totals)
    assert totals["documents"] == sum(len(c) for (c,) in stream.documents())
    return cache.TokenCache.open(str(folder), manifest, stream.selection, stream.encoder)


def test_the_same_rows_and_safe_to_kill(stream: Stream, tmp_path: Path) -> None:
    made = fill(stream, tmp_path)
    cached = replace(stream, cache=made)
    windows = range(stream.plan.windows_per_epoch)
    assert [cached.window(i).rows.hash() for i in windows] == [stream.window(i).rows.hash() for i in windows]
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard-00000.arrow"))).read_all()  # any tool opens it
    assert table.column_names == ["tokens", "origin"]
    (tmp_path / "cache.json").unlink()  # as if killed: some shards are missing, a half one lies aside
    (tmp_path / "shard-00001.arrow").unlink()
    (tmp_path / ".making-x").mkdir()
    with pytest.raises(InputError, match="found none that is finished"):
        cache.TokenCache.open(str(tmp_path), stream.plan.manifest, stream.selection, stream.encoder)
    before = (tmp_path / "shard-00000.arrow").stat().st_mtime_ns
    again = replace(stream, cache=fill(stream, tmp_path))
    assert (tmp_path / "shard-00000.arrow").stat().st_mtime_ns == before  # what was there was not made again
    cache._file.cache_clear()
    assert [again.window(i).rows.hash() for i in windows] == [stream.window(i).rows.hash() for i in windows]


def test_damage_is_named(stream: Stream, tmp_path: Path) -> None:
    made = fill(stream, tmp_path)
    path = tmp_path / "shard-00001.arrow"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    cache._file.cache_clear()
    with pytest.raises(InputError, match=r"shard-00001.arrow: row group \d+ of the token cache is damaged"):
        for group in range(len(stream.plan.manifest)):
            made.read(group)


def test_of_something_else(stream: Stream, tmp_path: Path) -> None:
    fill(stream, tmp_path)
    manifest = stream.plan.manifest
    with pytest.raises(InputError, match="something else"):
        cache.TokenCache.open(str(tmp_path), manifest, Selection(held_out=0.1), stream.encoder)
    with pytest.raises(InputError, match="something else is there"):
        cache.begin(str(tmp_path), manifest, Selection(held_out=0.1), stream.encoder)
    other = TextEncoder(train_tokenizer(manifest, Selection(), 500, 0.5, 0), 256, "gigatoken")
    with pytest.raises(InputError, match=r"something else \(encoder differ\)"):
        cache.TokenCache.open(str(tmp_path), manifest, stream.selection, other)
    fewer = scan([Source(path=manifest.shards[0].path)], "causal", 8)
    with pytest.raises(InputError, match=r"something else \(manifest differ\)"):
        cache.TokenCache.open(str(tmp_path), fewer, stream.selection, stream.encoder)


def test_an_id_beyond_the_vocabulary(stream: Stream) -> None:
    class Wrong(TextEncoder):
        def __init__(self) -> None:
            vars(self).update(vars(stream.encoder))

        def encode(self, groups: object) -> list[Encoded]:
            made = super().encode(groups)  # type: ignore[arg-type]
            made[0].ids = np.append(made[0].ids[:-1], np.uint32(600)).astype(np.uint32)
            return made

    with pytest.raises(InputError, match=r"shard-0000\d.parquet: document \d+ of row group \d+: token id 600 is beyond"):
        replace(stream, encoder=Wrong()).window(0)
