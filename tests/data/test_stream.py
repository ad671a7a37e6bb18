"""The rows of a step do not depend on the number of workers, on a resumption or on the executor."""

import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from sevenfold.cluster import connect
from sevenfold.data import rows as r
from sevenfold.data.backends import FAST, Backend
from sevenfold.data.encode import TextEncoder
from sevenfold.data.order import DataOrder
from sevenfold.data.rows import Chunk
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.stream import ReaderState, Stream, _Ahead
from sevenfold.data.tokenizer import train_tokenizer
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Source

STEPS = 60  # more than two epochs


@pytest.fixture(scope="module")
def stream(texts: Path) -> Stream:
    manifest = scan([Source(path=str(texts / "train"))], "causal", 32)
    encoder = TextEncoder(train_tokenizer(manifest, Selection(), 600, 0.5, 0), 1024, Backend(FAST))
    return Stream(DataOrder(manifest, 5, 8), Selection(), encoder, 1024, "inline")


def read(
    stream: Stream, world: int, steps: int, resume_from: ReaderState | None = None
) -> tuple[list[int], ReaderState, list]:
    """Returns the hash of each step's rows, the joint state of the readers, and the read ranges."""
    readers = [stream.shard(rank, world).reader(2, resume_from) for rank in range(world)]
    hashes = [r.Rows.concatenate([next(reader) for reader in readers]).hash() for _ in range(steps)]
    for reader in readers:
        reader.close()
    read_ranges = sorted(
        read_range for reader in readers for read_range in reader.take_read_ranges()
    )
    return (
        hashes,
        ReaderState.together(
            [reader.state for reader in readers], resume_from.skipped if resume_from else 0
        ),
        read_ranges,
    )


def test_positions_labels_and_document_starts_of_rows(stream: Stream) -> None:
    chunk = stream.chunk(0).rows
    assert stream.chunk(0).rows.hash() == chunk.hash() and chunk.tokens.dtype == np.uint16
    positions, labels, edges = r.positions(chunk), r.labels(chunk), chunk.edges
    starts = np.zeros(chunk.tokens.size, bool)
    starts[edges[:-1]] = True
    starts = starts.reshape(chunk.tokens.shape)
    assert edges[-1] == chunk.tokens.size and (np.diff(edges) > 0).all()
    assert (positions[starts] == 0).all() and starts[:, 0].all()
    assert (positions[:, 1:][~starts[:, 1:]] == positions[:, :-1][~starts[:, 1:]] + 1).all()
    has_label = labels >= 0
    assert np.array_equal(labels[:, :-1][has_label[:, :-1]], chunk.tokens[:, 1:][has_label[:, :-1]])
    # no label crosses the end of a document
    assert not has_label[:, :-1][starts[:, 1:]].any() and not has_label[:, -1].any()
    assert [len(chunk.part(i, i + 1).starts) for i in range(len(chunk))] == starts.sum(1).tolist()


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_an_epoch_holds_every_document_once(stream: Stream, packing: str) -> None:
    order = replace(stream.order, epochs=1)
    one_epoch = replace(stream, order=order, packing=packing)
    pieces: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    padded = total = 0
    for index in range(order.chunks or 0):
        chunk = one_epoch.chunk(index)
        pieces_of_chunk, tokens = chunk.pieces, chunk.rows.tokens
        assert pieces_of_chunk is not None
        padded += tokens.size - int(chunk.rows.used.sum())
        total += tokens.size
        for group, origin, start, row, offset, length in zip(
            *vars(pieces_of_chunk).values(), strict=True
        ):
            pieces.setdefault((group, origin), []).append(
                (start, tokens[row, offset : offset + length].tolist())
            )
    documents = {
        (g, i): text
        for g, (column,) in enumerate(stream.documents())
        for i, text in enumerate(column)
    }
    assert pieces.keys() == documents.keys()
    for key, ids in zip(documents, stream.encoder.ids(list(documents.values())), strict=True):
        whole_document = [0, *ids, 1]
        assert [token for _, part in sorted(pieces[key]) for token in part] == whole_document
        # cut only where necessary
        assert packing == "concatenate" or len(pieces[key]) == -(-len(whole_document) // 1024)
    # the chunks of a small corpus are small; tests/data/test_pack.py checks 0.6% for large ones
    assert padded / total < 0.05


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_rows_do_not_depend_on_the_number_of_workers(stream: Stream, world: int) -> None:
    assert read(stream, world, STEPS)[0] == read(stream, 1, STEPS)[0]


def test_resuming_on_other_numbers_of_workers_gives_the_same_rows(stream: Stream) -> None:
    expected, end_state, expected_ranges = read(stream, 2, STEPS)
    hashes, state, read_ranges = read(stream, 2, 17)
    for world, steps in ((3, 20), (1, 11), (4, STEPS - 48)):
        next_hashes, state, next_ranges = read(
            stream, world, steps, ReaderState.from_json(state.to_json())
        )
        hashes, read_ranges = hashes + next_hashes, read_ranges + next_ranges
    assert hashes == expected and state == end_state
    assert [(read_range.data_step, *read_range[3:]) for read_range in read_ranges] == [
        (read_range.data_step, *read_range[3:]) for read_range in expected_ranges
    ]


def test_skipped_data_steps_are_left_out(stream: Stream) -> None:
    unskipped = read(stream, 1, 30)[0]
    skipping = replace(stream, skip=((3, 5), (20, 20)))
    expected = unskipped[:2] + unskipped[5:19] + unskipped[20:]
    first, state, _ = read(skipping, 2, 4)
    assert first + read(skipping, 3, len(expected) - 4, state)[0] == expected


def test_an_epoch_limit_ends_the_stream_after_every_document(stream: Stream) -> None:
    one_epoch = replace(stream, order=replace(stream.order, epochs=1))
    results = []
    for world in (1, 3):
        readers = [one_epoch.shard(rank, world).reader(2) for rank in range(world)]
        steps = [[next(reader) for reader in readers] for _ in range(200)]
        assert all(reader.ended for reader in readers)
        results.append(
            (
                [r.Rows.concatenate(step).hash() for step in steps],
                sum(int(part.used.sum()) for step in steps for part in step),
            )
        )
        for reader in readers:
            reader.close()
    assert results[0] == results[1]
    assert results[0][1] == sum(
        len(ids) + 2 for (column,) in stream.documents() for ids in stream.encoder.ids(column)
    )


def read_with_ray(stream: Stream, worlds: tuple[int, ...], steps: int) -> list[tuple]:
    """Returns what `read` returns for each number of workers, with Ray Data as the executor."""
    connect.connect()
    results, threads = [], []
    for world in worlds:
        results.append(read(replace(stream, executor="ray"), world, steps))
        threads.append(set(threading.enumerate()))
    assert threads[-1] <= threads[0], threads  # a long run starts thousands of executions
    return results


def test_ray_data_gives_the_same_rows(stream: Stream, on_shared_ray: None) -> None:
    results = read_with_ray(stream, (2, 3), STEPS)
    assert results == [read(stream, 1, STEPS)] * 2


def test_bad_documents_are_skipped_counted_and_reported_once(
    stream: Stream, tmp_path: Path, on_shared_ray: None
) -> None:
    write_shards(
        tmp_path / "s",
        [{"text": ""}, {"text": "some text"}, {"text": ""}, {"text": ""}],
        shards=1,
        group=1,
    )
    manifest = scan([Source(path=str(tmp_path / "s"))], "causal")
    skipping = Stream(
        DataOrder(manifest, 0, 8), Selection(on_bad="skip"), stream.encoder, 32, "inline"
    )
    reader = skipping.shard(0, 1).reader(1)
    rows = r.Rows.concatenate([next(reader) for _ in range(2)])
    reader.close()
    # two steps of eight lanes are four epochs of four chunks
    assert (r.labels(rows) >= 0).any(axis=1).sum() == 4
    assert (
        reader.state.skipped == 12
        and "shard-00000.parquet: row group" in reader.bad_documents[0].first
    )
    assert read_with_ray(skipping, (1,), 2) == [read(skipping, 1, 2)]
    with pytest.raises(InputError, match=r"no text in 'text'.*on_bad_document=skip"):
        next(replace(skipping, selection=Selection()).shard(0, 1).reader(1))


def test_a_chunk_out_of_order_is_refused(stream: Stream) -> None:
    reader = stream.shard(0, 1).reader(2)
    reader.close()
    reader._chunks = iter([stream.chunk(3)])
    with pytest.raises(RunError, match="expected chunk 0, found chunk 3"):
        next(reader)


def test_an_error_in_the_read_ahead_thread_is_raised(stream: Stream) -> None:
    def failing_chunks() -> Generator[Chunk, None, None]:
        yield stream.chunk(0)
        raise ValueError("broken")

    chunks = _Ahead(failing_chunks())
    assert next(chunks).index == 0
    with pytest.raises(ValueError, match="broken"):
        next(chunks)
