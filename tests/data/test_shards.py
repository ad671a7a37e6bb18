"""Shards are read alike however they are cut, and what is hostile or breaks under a run is named, at a bounded cost."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from sevenfold.data import shards
from sevenfold.data.documents import Selection
from sevenfold.data.manifest import Manifest, scan
from sevenfold.errors import InputError
from sevenfold.recipe import Source

TARGETS = (1, 2, 3, 7, 64, 1000, 2**20)
WORDS = ("a", "über", "中文", "🙂", " ", "\t", "<|", "|>", "\u2028", "é", "end")


def source(path: Path, **settings: object) -> Source:
    return Source.model_validate({"path": str(path), **settings})


def draw(seed: int, count: int = 60) -> list[str]:
    """Documents of random words; none is empty."""
    rng = random.Random(seed)
    return [f"{i}" + "".join(rng.choices(WORDS, k=rng.randrange(12))) + "." for i in range(count)]


def packed(path: Path, data: bytes, codec: str) -> Path:
    with pa.CompressedOutputStream(str(path), codec) as out:
        out.write(data)
    return path


def all_of(path: Path, settings: Source, target: int) -> tuple[list[str], list[shards.RowGroup]]:
    """What the row groups of a shard hold together, cut at this size."""
    shard = shards.describe(str(path), 0, settings)
    groups = shards.cut(0, shard, settings, ["text"], [], target)
    found: list[str] = []
    for group in groups:
        raw = shards.read(shard, settings, group, ["text"], [], 2**20)
        assert not raw.bad
        found += raw.columns["text"].to_pylist()
    return found, groups


def read(manifest: Manifest, selection: Selection | None = None) -> list[str]:
    chosen = selection or Selection()
    return [t for i in range(len(manifest)) for t in chosen.read(manifest, i).fields[0].to_pylist()]


def refused(call: object, *says: str) -> None:
    """Calling it raises an InputError of one line that says all of these."""
    with pytest.raises(InputError) as e:
        call()  # type: ignore[operator]
    assert all(s in str(e.value) for s in says) and "\n" not in str(e.value), str(e.value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("separator", ["\n", "\n\n", "<|endoftext|>", ""])
def test_text_is_read_once_whatever_the_cuts(tmp_path: Path, separator: str, suffix: str, target: int) -> None:
    documents = draw(target)
    gap = separator if separator == "<|endoftext|>" else separator * 2 + "\n"  # blank lines, or more than two line ends
    parts = [d + (gap if i % 5 == 0 else separator) for i, d in enumerate(documents)]
    data = "".join(parts).encode() if separator else "\n\n".join(documents).encode()
    path = tmp_path / f"a.txt{suffix}"
    if suffix:
        packed(path, data, "gzip" if suffix == ".gz" else "zstd")
    else:
        path.write_bytes(data)
    found, groups = all_of(path, source(path, separator=separator), target)
    assert found == (documents if separator else [data.decode()])
    assert [g.start for g in groups[1:]] == [g.end for g in groups[:-1]] and groups[-1].end == len(data)
    assert len(groups) > 5 or target > 64 or not separator


@pytest.mark.parametrize("length", range(2 * 8192 - 6, 2 * 8192 + 3))
def test_a_long_document_before_blank_lines_at_a_cut(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.txt").write_text("a" * length + "\n\n\n" + "b" * (3 * 8192 - length - 3))
    found = all_of(tmp_path / "a.txt", source(tmp_path, separator="\n\n"), 8192)[0]
    assert [(t[0], len(t)) for t in found] == [("a", length), ("b", 3 * 8192 - length - 3)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("last", ["\n", ""])
def test_json_lines_are_read_once_whatever_the_cuts(tmp_path: Path, suffix: str, target: int, last: str) -> None:
    documents = [d + "\n\n\0" * (i % 3) for i, d in enumerate(draw(target))]
    lines = [json.dumps({"n": [i], "text": d}, ensure_ascii=i % 2 == 0) for i, d in enumerate(documents)]
    lines[10] += "\n\r\n  \n"  # blank lines are no documents
    data = ("\n".join(lines) + last).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix:
        packed(path, data, "gzip" if suffix == ".gz" else "zstd")
    else:
        path.write_bytes(data)
    assert all_of(path, source(path), target)[0] == documents


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_row_groups_are_cut_into_parts(tmp_path: Path, target: int, kind: pa.DataType, dictionary: bool) -> None:
    documents = draw(target, 1500)
    path = tmp_path / "a.parquet"
    table = pa.table({"n": range(len(documents)), "text": pa.array(documents, kind)})
    pq.write_table(table, path, row_group_size=700, use_dictionary=dictionary)
    found, groups = all_of(path, source(path), target)
    assert found == documents and [g.documents for g in groups] == [g.end - g.start for g in groups]
    assert len(groups) == (3 if target == 2**20 else 3 * shards.MOST_PARTS if target < 500 else len(groups))


def test_members_laid_end_to_end_are_one_shard(tmp_path: Path) -> None:
    for codec, name in (("gzip", "a.jsonl.gz"), ("zstd", "a.jsonl.zst")):
        halves = [packed(tmp_path / "half", json.dumps({"text": t}).encode() + b"\n", codec).read_bytes() for t in "xy"]
        (tmp_path / name).write_bytes(b"".join(halves))
        assert all_of(tmp_path / name, source(tmp_path / name), 5)[0] == ["x", "y"]


def test_a_folder_a_glob_a_file_and_their_spans(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "_temporary").mkdir(parents=True)
        (tmp_path / folder / "_temporary" / "c.txt").write_text("not to be read\n")
        (tmp_path / folder / "a.txt").write_text(f"{folder} a\n")
        (tmp_path / folder / "b.jsonl").write_text(json.dumps({"text": f"{folder} b"}) + "\n")
        (tmp_path / folder / "c.csv").write_text("not to be read\n")
    (tmp_path / "single.txt").write_text("\n".join(f"single {i}" for i in range(5000)))
    found = scan([source(tmp_path / "one"), source(tmp_path / "*" / "a.txt", name="glob")], "causal", on_bad="skip")
    assert read(found) == ["one a", "one b", "two a"] and [list(s) for s in found.spans] == [[0, 1], [2]]
    assert found.left_out == (f"{tmp_path}/one/a.txt: is named twice: each document should be there once",)
    found = scan([source(tmp_path / "two"), source(tmp_path / "single.txt")], "causal", 4)
    assert [s.start for s in found.spans] == [0, 2] and found.spans[1].stop == len(found) > 4
    again = Manifest.from_json(json.loads(json.dumps(found.to_json())))
    assert again.spans == found.spans and again.hash() == found.hash() and np.array_equal(again.table, found.table)
    assert (again.sources, again.shards, again.left_out) == (found.sources, found.shards, found.left_out)


def test_copies_fall_on_one_side_of_the_split(tmp_path: Path) -> None:
    documents = draw(1, 400)
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("\n".join(reversed(documents)), encoding="utf-8", newline="\n")
    found = scan([source(tmp_path)], "causal")
    train, held = (read(found, Selection(held_out=0.3, split=s)) for s in ("train", "held_out"))
    assert not set(train) & set(held) and sorted(train + held) == sorted(documents * 2) and 160 < len(held) < 320


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_bomb_is_refused_before_it_is_read_whole(tmp_path: Path, codec: str) -> None:
    path = tmp_path / ("a.txt.gz" if codec == "gzip" else "a.txt.zst")
    with pa.CompressedOutputStream(str(path), codec) as out:
        for _ in range(300):
            out.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: scan([source(path)], "causal"), f"{path}: byte ", "a decompression bomb?")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


@pytest.mark.parametrize("kind", ["parquet", "txt", "gzip", "zstd"])
def test_truncated_after_the_scan(tmp_path: Path, kind: str) -> None:
    name = {"parquet": "a.parquet", "txt": "a.txt", "gzip": "a.txt.gz", "zstd": "a.txt.zst"}[kind]
    data = "\n".join(draw(2, 500)).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": draw(2, 500)}), tmp_path / name)
    elif kind == "txt":
        (tmp_path / name).write_bytes(data)
    else:
        packed(tmp_path / name, data, kind)
    found = scan([source(tmp_path)], "causal")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    for check in (found.check_unchanged, lambda: read(found, Selection(on_bad="skip"))):
        refused(check, f"{name}: has changed since this run began")


def test_a_flipped_byte_in_gzip_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.txt.gz", "\n".join(draw(3, 5000)).encode(), "gzip")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 8
    path.write_bytes(raw)
    refused(lambda: scan([source(path)], "causal"), f"{path}: expected gzip")


def test_a_file_longer_than_a_document_may_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 5000)
    (tmp_path / "b.txt").write_text("good")
    found = scan([source(tmp_path, separator="")], "causal")
    short = Selection(max_bytes=1000)
    refused(lambda: read(found, short), "a.txt: byte 0: longer than 0.001 MB (data.max_document_mb)")
    made = [Selection(max_bytes=1000, on_bad="skip").read(found, i) for i in range(2)]
    assert [d.fields[0].to_pylist() for d in made] == [[], ["good"]] and [d.skipped.count for d in made] == [1, 0]


LONG_LINE = """
import resource, sys
from sevenfold.data.documents import Selection
from sevenfold.data.manifest import scan
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
def test_a_line_of_a_gigabyte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    begin, end = b'{"text": "before"}\n{"text": "', b'"}\n{"text": "after"}\n'
    if suffix:
        rng = random.Random(0)
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(begin)
            for _ in range(2**10):
                out.write(rng.randbytes(2**19).hex().encode())
            out.write(end)
    else:
        with path.open("wb") as f:  # sparse: takes no room on disk
            f.write(begin)
            f.seek(2**30, 1)
            f.write(end)
    command = [sys.executable, "-c", LONG_LINE, str(path)]
    env = {"PYTHONPATH": str(ROOT / "platform"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, peak = done.stdout.splitlines()
    assert first == f"{path}: byte 19: longer than 64 MB (data.max_document_mb)"
    assert int(peak) < 1.5 * 2**20  # KiB
