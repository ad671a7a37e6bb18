"""Reading of shards.

The size of the row groups does not change what is read. Hostile files, and files that break during
a run, are named at a bounded cost.
"""

import json
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.data.scan import scan
from sevenfold.data.sources import reading, row_groups, shards
from sevenfold.data.sources.documents import Selection
from sevenfold.errors import InputError
from sevenfold.recipe import Source

TARGETS = (1, 2, 3, 7, 64, 1000, 2**20)
WORDS = ("a", "über", "中文", "🙂", " ", "\t", "<|", "|>", "\u2028", "é", "end")


def source(path: Path, **settings: object) -> Source:
    return Source.model_validate({"path": str(path), **settings})


def draw(seed: int, count: int = 60) -> list[str]:
    """Returns documents of random words; none is empty."""
    rng = random.Random(seed)
    return [f"{i}" + "".join(rng.choices(WORDS, k=rng.randrange(12))) + "." for i in range(count)]


def write_compressed(path: Path, data: bytes, codec: str) -> Path:
    """Writes the data compressed with this codec and returns the path."""
    with pa.CompressedOutputStream(str(path), codec) as stream:
        stream.write(data)
    return path


def read_shard(
    path: Path, settings: Source, target: int, estimate: bool = False
) -> tuple[list[str], list[shards.RowGroup]]:
    """Reads all row groups of a shard, cut at this target size; returns texts and row groups."""
    shard = replace(
        shards.named_shard(str(path), 0, settings), fingerprint=shards.fingerprint(str(path))
    )
    with storage.open_read(str(path)) as file:
        groups = row_groups.split_shard(
            0, shard, settings, ["text"], [], target, file, estimate=estimate
        )
    texts: list[str] = []
    for group in groups:
        rows = reading.read_row_group(shard, settings, group, ["text"], 2**20)
        assert not rows.bad
        texts += rows.columns["text"].to_pylist()
    return texts, groups


def read(manifest: Manifest, selection: Selection | None = None) -> list[str]:
    """Returns the texts of all row groups of the manifest."""
    selection = selection or Selection()
    return [
        t for i in range(len(manifest)) for t in selection.read(manifest, i).fields[0].to_pylist()
    ]


def assert_refused(call: object, *texts: str) -> None:
    """Checks that the call raises an InputError of one line that contains all of these texts."""
    with pytest.raises(InputError) as error:
        call()  # type: ignore[operator]
    assert all(text in str(error.value) for text in texts) and "\n" not in str(error.value), str(
        error.value
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("separator", ["\n", "\n\n", "<|endoftext|>", ""])
def test_text_is_read_once_for_any_row_group_size(
    tmp_path: Path, separator: str, suffix: str, target: int
) -> None:
    documents = draw(target)
    # blank lines, or more than two line ends
    gap = separator if separator == "<|endoftext|>" else separator * 2 + "\n"
    parts = [d + (gap if i % 5 == 0 else separator) for i, d in enumerate(documents)]
    data = "".join(parts).encode() if separator else "\n\n".join(documents).encode()
    path = tmp_path / f"a.txt{suffix}"
    if suffix:
        write_compressed(path, data, "gzip" if suffix == ".gz" else "zstd")
    else:
        path.write_bytes(data)
    texts, groups = read_shard(path, source(path, separator=separator), target)
    assert texts == (documents if separator else [data.decode()])
    assert [g.start for g in groups[1:]] == [g.end for g in groups[:-1]] and groups[-1].end == len(
        data
    )
    assert len(groups) > 5 or target > 64 or not separator


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "two.txt.gz"])
@pytest.mark.parametrize("start", ["same", "denser", "thinner"])
def test_files_whose_size_is_estimated_are_read_once(
    tmp_path: Path, name: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of a file may compress better or worse than the rest of it."""
    monkeypatch.setattr(row_groups, "_SAMPLE_BYTES", 1)
    rng = random.Random(name)
    repeated = ["word " * 40 + str(i) for i in range(20_000)]
    random_texts = [f"{i} {rng.randbytes(60).hex()}" for i in range(20_000)]
    documents = {
        "same": [text for pair in zip(repeated, random_texts, strict=True) for text in pair],
        "denser": repeated + random_texts,
        "thinner": random_texts + repeated,
    }[start]
    lines = [json.dumps({"text": d}) if "jsonl" in name else d for d in documents]
    data = ("\n".join(lines) + "\n").encode()
    codec = "zstd" if name.endswith("zst") else "gzip"
    path = write_compressed(tmp_path / name, data, codec)
    if name.startswith("two"):  # a file put together from two, which ends with the size of one
        write_compressed(tmp_path / "b.txt.gz", data[: data.index(b"\n", 4_000_000) + 1], codec)
        write_compressed(path, data[data.index(b"\n", 4_000_000) + 1 :], codec)
        path.write_bytes((tmp_path / "b.txt.gz").read_bytes() + path.read_bytes())
    texts, groups = read_shard(path, source(path), 100_000, estimate=True)
    assert texts == documents and groups[-1].end == shards.MAX_SHARD_BYTES
    assert len(groups) == row_groups.MAX_PARTS
    if codec == "gzip" and not name.startswith("two") and start != "denser":  # it says its size
        assert sum(group.bytes for group in groups) == len(data)


def test_a_bomb_whose_size_is_estimated_is_refused(tmp_path: Path) -> None:
    """At the start if its beginning shows it, or else when it is read."""
    bomb = write_compressed(tmp_path / "a.txt.gz", b"0" * (200 << 20), "gzip")
    assert_refused(lambda: read_shard(bomb, source(bomb), 2**20, estimate=True), "bomb", "a.txt.gz")
    rng = random.Random(0)
    innocent = "".join(f"{rng.randbytes(60).hex()}\n" for _ in range(60_000)).encode()
    write_compressed(tmp_path / "b.txt.zst", innocent, "zstd")
    rest = write_compressed(tmp_path / "c.txt.zst", b"0\n" * (300 << 20), "zstd")
    late = tmp_path / "b.txt.zst"
    late.write_bytes(late.read_bytes() + rest.read_bytes())
    assert_refused(
        lambda: read_shard(late, source(late), 2**20, estimate=True), "bomb", "from byte"
    )


@pytest.mark.parametrize("length", range(2 * 8192 - 6, 2 * 8192 + 3))
def test_a_long_document_before_blank_lines_at_a_cut(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.txt").write_text("a" * length + "\n\n\n" + "b" * (3 * 8192 - length - 3))
    texts = read_shard(tmp_path / "a.txt", source(tmp_path, separator="\n\n"), 8192)[0]
    assert [(text[0], len(text)) for text in texts] == [("a", length), ("b", 3 * 8192 - length - 3)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("last", ["\n", ""])
def test_json_lines_are_read_once_for_any_row_group_size(
    tmp_path: Path, suffix: str, target: int, last: str
) -> None:
    documents = [d + "\n\n\0" * (i % 3) for i, d in enumerate(draw(target))]
    lines = [
        json.dumps({"n": [i], "text": d}, ensure_ascii=i % 2 == 0) for i, d in enumerate(documents)
    ]
    lines[10] += "\n\r\n  \n"  # blank lines are not documents
    data = ("\n".join(lines) + last).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix:
        write_compressed(path, data, "gzip" if suffix == ".gz" else "zstd")
    else:
        path.write_bytes(data)
    assert read_shard(path, source(path), target)[0] == documents


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_row_groups_are_cut_into_parts(
    tmp_path: Path, target: int, kind: pa.DataType, dictionary: bool
) -> None:
    documents = draw(target, 1500)
    path = tmp_path / "a.parquet"
    table = pa.table({"n": range(len(documents)), "text": pa.array(documents, kind)})
    pq.write_table(table, path, row_group_size=700, use_dictionary=dictionary)
    texts, groups = read_shard(path, source(path), target)
    assert texts == documents and [g.documents for g in groups] == [g.end - g.start for g in groups]
    assert len(groups) == (
        3 if target == 2**20 else 3 * row_groups.MAX_PARTS if target < 500 else len(groups)
    )


def test_concatenated_compressed_files_are_one_shard(tmp_path: Path) -> None:
    for codec, name in (("gzip", "a.jsonl.gz"), ("zstd", "a.jsonl.zst")):
        halves = [
            write_compressed(
                tmp_path / "half", json.dumps({"text": t}).encode() + b"\n", codec
            ).read_bytes()
            for t in "xy"
        ]
        (tmp_path / name).write_bytes(b"".join(halves))
        assert read_shard(tmp_path / name, source(tmp_path / name), 5)[0] == ["x", "y"]


def test_folders_globs_and_files_have_spans_of_row_groups(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "_temporary").mkdir(parents=True)
        (tmp_path / folder / "_temporary" / "c.txt").write_text("not to be read\n")
        (tmp_path / folder / "a.txt").write_text(f"{folder} a\n")
        (tmp_path / folder / "b.jsonl").write_text(json.dumps({"text": f"{folder} b"}) + "\n")
        (tmp_path / folder / "c.md").write_text("not to be read\n")
    (tmp_path / "single.txt").write_text("\n".join(f"single {i}" for i in range(5000)))
    manifest = scan(
        [
            source(tmp_path / "one"),
            source(tmp_path / "*" / "a.txt", name="glob", separator="\n"),
        ],
        "causal",
        on_bad="skip",
    )
    assert read(manifest) == ["one a", "one b", "two a"] and [list(s) for s in manifest.spans] == [
        [0, 1],
        [2],
    ]
    assert manifest.skipped == (
        f"{tmp_path}/one/a.txt: is listed twice: each file may be used only once",
    )
    manifest = scan([source(tmp_path / "two"), source(tmp_path / "single.txt")], "causal", 4)
    assert [s.start for s in manifest.spans] == [0, 2] and manifest.spans[1].stop == len(
        manifest
    ) > 4
    restored = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert (
        restored.spans == manifest.spans
        and restored.hash() == manifest.hash()
        and np.array_equal(restored.table, manifest.table)
    )
    assert (restored.sources, restored.shards, restored.skipped) == (
        manifest.sources,
        manifest.shards,
        manifest.skipped,
    )


def test_copies_are_on_the_same_side_of_the_split(tmp_path: Path) -> None:
    documents = draw(1, 400)
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("\n".join(reversed(documents)), encoding="utf-8", newline="\n")
    manifest = scan([source(tmp_path)], "causal")
    train, held_out = (
        read(manifest, Selection(held_out=0.3, split=s)) for s in ("train", "held_out")
    )
    assert (
        not set(train) & set(held_out)
        and sorted(train + held_out) == sorted(documents * 2)
        and 160 < len(held_out) < 320
    )


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_decompression_bomb_is_refused_before_it_is_read_fully(
    tmp_path: Path, codec: str
) -> None:
    path = tmp_path / ("a.txt.gz" if codec == "gzip" else "a.txt.zst")
    with pa.CompressedOutputStream(str(path), codec) as stream:
        for _ in range(300):
            stream.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(
        lambda: scan([source(path)], "causal"), f"{path}: byte ", "possible decompression bomb"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


@pytest.mark.parametrize("kind", ["parquet", "txt", "gzip", "zstd"])
def test_truncation_after_the_scan_is_refused(tmp_path: Path, kind: str) -> None:
    name = {"parquet": "a.parquet", "txt": "a.txt", "gzip": "a.txt.gz", "zstd": "a.txt.zst"}[kind]
    data = "\n".join(draw(2, 500)).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": draw(2, 500)}), tmp_path / name)
    elif kind == "txt":
        (tmp_path / name).write_bytes(data)
    else:
        write_compressed(tmp_path / name, data, kind)
    manifest = scan([source(tmp_path)], "causal")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    for check in (manifest.check_unchanged, lambda: read(manifest, Selection(on_bad="skip"))):
        assert_refused(check, f"{name}: has changed since this run began")


def test_a_flipped_byte_in_gzip_is_refused(tmp_path: Path) -> None:
    path = write_compressed(tmp_path / "a.txt.gz", "\n".join(draw(3, 5000)).encode(), "gzip")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 8
    path.write_bytes(raw)
    assert_refused(lambda: scan([source(path)], "causal"), f"{path}: expected gzip")


def test_a_document_longer_than_the_limit_is_refused_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 5000)
    (tmp_path / "b.txt").write_text("good")
    manifest = scan([source(tmp_path, separator="")], "causal")
    short = Selection(max_bytes=1000)
    assert_refused(
        lambda: read(manifest, short), "a.txt: byte 0: longer than 0.001 MB (data.max_document_mb)"
    )
    results = [Selection(max_bytes=1000, on_bad="skip").read(manifest, i) for i in range(2)]
    assert [result.fields[0].to_pylist() for result in results] == [[], ["good"]] and [
        result.skipped.count for result in results
    ] == [1, 0]


LONG_LINE = """
import resource, sys
from sevenfold.data.sources.documents import Selection
from sevenfold.data.scan import scan
from sevenfold.recipe import Source
found = scan([Source(path=sys.argv[1])], "causal")
made = [Selection(on_bad="skip").read(found, i) for i in range(len(found))]
texts = [t for d in made for t in d.fields[0].to_pylist()]
assert texts == ["before", "after"], len(texts)
bad = [d.skipped for d in made if d.skipped.count]
assert sum(b.count for b in bad) == 1, bad
print(bad[0].first)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_line_of_a_gigabyte_is_skipped_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    begin, end = b'{"text": "before"}\n{"text": "', b'"}\n{"text": "after"}\n'
    if suffix:
        rng = random.Random(0)
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(begin)
            for _ in range(2**10):
                stream.write(rng.randbytes(2**19).hex().encode())
            stream.write(end)
    else:
        with path.open("wb") as file:  # sparse: takes no space on disk
            file.write(begin)
            file.seek(2**30, 1)
            file.write(end)
    command = [sys.executable, "-c", LONG_LINE, str(path)]
    env = {"PYTHONPATH": str(ROOT / "platform"), "PATH": "/usr/bin:/bin"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    first, peak = process.stdout.splitlines()
    assert first == f"{path}: byte 19: longer than 64 MB (data.max_document_mb)"
    assert int(peak) < 1.5 * 2**20  # KiB
