"""The token cache gives the same rows as the text; a damaged or foreign cache is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sevenfold.data import token_cache
from sevenfold.data.backends import FAST, Backend
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.order import DataOrder
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.stream import Stream
from sevenfold.data.tokenizer import train_tokenizer
from sevenfold.errors import InputError
from sevenfold.recipe import Source


@pytest.fixture(scope="module")
def stream(texts: Path) -> Stream:
    manifest = scan([Source(path=str(texts / "train"))], "causal", 8)
    encoder = TextEncoder(train_tokenizer(manifest, Selection(), 600, 0.5, 0), 256, Backend(FAST))
    return Stream(DataOrder(manifest, 5, 2), Selection(), encoder, 256, "inline")


def fill(stream: Stream, folder: Path) -> token_cache.TokenCache:
    """Writes the token cache of the stream's data to the folder and opens it."""
    manifest = stream.order.manifest
    assert not token_cache.begin(str(folder), manifest, stream.selection, stream.encoder)
    counts = [
        token_cache.write_shard(str(folder), index, manifest, stream.selection, stream.encoder)
        for index in range(len(manifest.shards))
    ]
    totals = {key: sum(count[key] for count in counts) for key in counts[0]}
    token_cache.finish(str(folder), manifest, stream.selection, stream.encoder, totals)
    assert totals["documents"] == sum(len(texts) for (texts,) in stream.documents())
    return token_cache.TokenCache.open(str(folder), manifest, stream.selection, stream.encoder)


def test_the_cache_gives_the_same_rows_and_survives_a_kill(stream: Stream, tmp_path: Path) -> None:
    cache = fill(stream, tmp_path)
    cached = replace(stream, cache=cache)
    chunks = range(stream.order.chunks_per_epoch)
    assert [cached.chunk(i).rows.hash() for i in chunks] == [
        stream.chunk(i).rows.hash() for i in chunks
    ]
    # plain Arrow: any tool can open it
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard-00000.arrow"))).read_all()
    assert table.column_names == ["tokens", "origin"]
    # the state after a kill: some shards are missing, and one was being written
    (tmp_path / "cache.json").unlink()
    (tmp_path / "shard-00001.arrow").unlink()
    (tmp_path / ".making-x").mkdir()
    with pytest.raises(InputError, match="expected a finished token cache, found none"):
        token_cache.TokenCache.open(
            str(tmp_path), stream.order.manifest, stream.selection, stream.encoder
        )
    before = (tmp_path / "shard-00000.arrow").stat().st_mtime_ns
    refilled = replace(stream, cache=fill(stream, tmp_path))
    # the shard that was already complete is not written again
    assert (tmp_path / "shard-00000.arrow").stat().st_mtime_ns == before
    token_cache._file.cache_clear()
    assert [refilled.chunk(i).rows.hash() for i in chunks] == [
        stream.chunk(i).rows.hash() for i in chunks
    ]


def test_a_damaged_row_group_is_named(stream: Stream, tmp_path: Path) -> None:
    cache = fill(stream, tmp_path)
    path = tmp_path / "shard-00001.arrow"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    token_cache._file.cache_clear()
    with pytest.raises(
        InputError, match=r"shard-00001.arrow: row group \d+ of the token cache is damaged"
    ):
        for group in range(len(stream.order.manifest)):
            cache.read(group)


def test_a_cache_of_other_data_is_refused(stream: Stream, tmp_path: Path) -> None:
    fill(stream, tmp_path)
    manifest = stream.order.manifest
    with pytest.raises(InputError, match="found one with another held_out"):
        token_cache.TokenCache.open(
            str(tmp_path), manifest, Selection(held_out=0.1), stream.encoder
        )
    with pytest.raises(InputError, match="found the cache of other data"):
        token_cache.begin(str(tmp_path), manifest, Selection(held_out=0.1), stream.encoder)
    other = TextEncoder(train_tokenizer(manifest, Selection(), 500, 0.5, 0), 256, Backend(FAST))
    with pytest.raises(InputError, match="found one with another encoder"):
        token_cache.TokenCache.open(str(tmp_path), manifest, stream.selection, other)
    fewer = scan([Source(path=manifest.shards[0].path)], "causal", 8)
    with pytest.raises(InputError, match="found one with another manifest"):
        token_cache.TokenCache.open(str(tmp_path), fewer, stream.selection, stream.encoder)


def test_a_token_id_beyond_the_vocabulary_is_refused(stream: Stream) -> None:
    class OutOfRangeEncoder(TextEncoder):
        def __init__(self) -> None:
            vars(self).update(vars(stream.encoder))

        def encode(self, groups: object) -> list[Encoded]:
            encoded = super().encode(groups)  # type: ignore[arg-type]
            encoded[0].ids = np.append(encoded[0].ids[:-1], np.uint32(600)).astype(np.uint32)
            return encoded

    with pytest.raises(
        InputError,
        match=r"shard-0000\d.parquet: document \d+ of row group \d+: expected .*600.*found 600",
    ):
        replace(stream, encoder=OutOfRangeEncoder()).chunk(0)
