"""What users' files are like: each bad one is named with file and position, or left out and counted."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sevenfold.data import shards
from sevenfold.data.documents import Selection
from sevenfold.data.manifest import Manifest, scan
from sevenfold.errors import InputError
from sevenfold.recipe import Source

TEXTS = [f"document {i} " + "über 中文 🙂 text " * (i % 7) + "end" for i in range(200)]


def source(path: Path, **settings: object) -> Source:
    return Source.model_validate({"path": str(path), **settings})


def read(manifest: Manifest, selection: Selection | None = None) -> list[str]:
    chosen = selection or Selection()
    return [t for i in range(len(manifest)) for t in chosen.read(manifest, i).fields[0].to_pylist()]


def packed(path: Path, data: bytes, codec: str) -> Path:
    with pa.CompressedOutputStream(str(path), codec) as out:
        out.write(data)
    return path


@pytest.mark.parametrize("most", [40, 333, 2**20])
@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.txt", "marked.txt", "gaps.txt.gz"]
)
def test_every_document_once_whatever_the_cuts(tmp_path: Path, name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sevenfold.data.manifest._LEAST_BYTES", 10)
    lines = "".join(json.dumps({"n": i, "text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(TEXTS)).encode()
    separator = {"marked.txt": "<|endoftext|>", "gaps.txt.gz": "\n\n"}.get(name, "\n")
    plain = separator.join(TEXTS).encode() + (b"\n\n\n" if name.startswith("gaps") else b"")
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=70)
    elif name.endswith((".gz", ".zst")):
        packed(path, lines if "jsonl" in name else plain, "gzip" if name.endswith("gz") else "zstd")
    else:
        path.write_bytes(lines if "jsonl" in name else plain)
    found = scan([source(path, separator=separator)], "causal", 1, most=most)
    assert read(found) == TEXTS
    assert most > 2**10 or len(found) > 5
    assert Manifest.from_json(json.loads(json.dumps(found.to_json()))).hash() == found.hash()


def test_a_file_can_be_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read(scan([source(tmp_path, separator="")], "causal")) == ["one\n\ntwo\n"]


def test_filters_and_the_split_by_hash(tmp_path: Path) -> None:
    rows = [{"text": t, "score": i % 10, "lang": "de" if i % 3 else "en"} for i, t in enumerate(TEXTS + TEXTS[:50])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rules = [{"column": "score", "min": 3, "max": 8}, {"column": "lang", "one_of": ["de"]}, {"column": "text", "min_chars": 20}]
    kept = read(scan([source(tmp_path, filters=rules)], "causal"))
    assert kept == [r["text"] for r in rows if 3 <= r["score"] <= 8 and r["lang"] == "de" and len(r["text"]) >= 20]
    everything = scan([source(tmp_path)], "causal")
    train, held = (read(everything, Selection(held_out=0.2, split=s)) for s in ("train", "held_out"))
    assert 20 < len(held) < 90 and not set(train) & set(held) and sorted(train + held) == sorted(r["text"] for r in rows)


def bad_garbage(at: Path) -> None:
    (at / "a.parquet").write_bytes(b"not parquet at all" * 10)


def bad_truncated(at: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), at / "a.parquet")
    (at / "a.parquet").write_bytes((at / "a.parquet").read_bytes()[:-500])


def bad_column(at: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), at / "a.parquet")


def bad_type(at: Path) -> None:
    pq.write_table(pa.table({"text": [1]}), at / "a.parquet")


def bad_empty(at: Path) -> None:
    (at / "a.jsonl").write_text("")


def bad_gzip(at: Path) -> None:
    (at / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "x" * 5000}).encode() * 50)[:-20])


def bad_zstd(at: Path) -> None:
    whole = packed(at / "a.jsonl.zst", b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS), "zstd").read_bytes()
    (at / "a.jsonl.zst").write_bytes(whole[: len(whole) // 2])


def bad_bomb(at: Path) -> None:
    packed(at / "a.txt.gz", bytes(100 * 2**20), "gzip")


def bad_copy(at: Path) -> None:
    (at / "a.txt").write_text("the same\n")
    (at / "b.txt").write_text("the same\n")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bad_garbage, "a.parquet: expected a parquet file"),
        (bad_truncated, "a.parquet: expected a parquet file"),
        (bad_column, "a.parquet: expected a column 'text', found body"),
        (bad_type, "expected strings, found int64"),
        (bad_empty, "a.jsonl: expected documents, found an empty shard"),
        (bad_gzip, "a.jsonl.gz: expected gzip"),
        (bad_zstd, "a.jsonl.zst: expected zstd"),
        (bad_bomb, "a decompression bomb?"),
        (bad_copy, "b.txt: is a copy of"),
    ],
)
def test_bad_shards(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError) as e:
        scan([source(tmp_path)], "causal")
    assert says in str(e.value) and "\n" not in str(e.value)
    (tmp_path / "good.txt").write_text("a good one")
    found = scan([source(tmp_path)], "causal", on_bad="skip")
    assert len(found.left_out) == 1 and says in found.left_out[0] and "a good one" in read(found)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match="expected shards"):
        scan([source(tmp_path)], "causal")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="is named twice"):
        scan([source(tmp_path, name="one"), source(tmp_path / "a.txt", name="two")], "causal")


def documents(at: Path, kind: str) -> None:
    good = json.dumps({"text": "good"}).encode() + b"\n"
    if kind == "utf8":
        (at / "a.jsonl").write_bytes(good + b'{"text": "\xff\xfe"}\n' + good)
    elif kind == "utf8 txt":
        (at / "a.txt").write_bytes(b"good\n\xff\xfe\ngood\n")
    elif kind == "utf8 parquet":
        data = pa.py_buffer(b"good\xff\xfe!good")
        strings = pa.Array.from_buffers(
            pa.string(), 3, [None, pa.py_buffer(pa.array([0, 4, 7, 11], pa.int32()).buffers()[1]), data]
        )
        pq.write_table(pa.table({"text": strings}), at / "a.parquet")
    elif kind == "json":
        (at / "a.jsonl").write_bytes(good + b'{"text": "go\n' + good)
    elif kind == "two":
        (at / "a.jsonl").write_bytes(good + good.strip() + b" " + good + good)
    elif kind == "key":
        (at / "a.jsonl").write_bytes(good + b'{"body": "x"}\n' + good)
    elif kind == "type":
        (at / "a.jsonl").write_bytes(good + b'{"text": 5}\n' + good)
    elif kind == "empty":
        pq.write_table(pa.table({"text": ["good", "", "good"]}), at / "a.parquet")
    elif kind == "null":
        pq.write_table(pa.table({"text": ["good", None, "good"]}), at / "a.parquet")
    elif kind == "long":
        (at / "a.jsonl").write_bytes(good + json.dumps({"text": "x" * 3_000_000}).encode() + b"\n" + good)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("utf8", "a.jsonl: line 2: not UTF-8"),
        ("utf8 txt", "a.txt: byte 5: not UTF-8"),
        ("utf8 parquet", "a.parquet: row group 0, row 1: not UTF-8 at its byte 0"),
        ("json", "a.jsonl: line 2: expected a JSON object"),
        ("two", "a.jsonl: line 2: expected a JSON object, found something else: Extra data"),
        ("key", "a.jsonl: line 2: expected a key 'text', found body"),
        ("type", "a.jsonl: line 2: key 'text': expected a string, found int"),
        ("empty", "a.parquet: row group 0, row 1: no text in 'text'"),
        ("null", "a.parquet: row group 0, row 1: no text in 'text'"),
        ("long", "MB (data.max_document_mb)"),
    ],
)
def test_bad_documents(tmp_path: Path, kind: str, says: str) -> None:
    documents(tmp_path, kind)
    found = scan([source(tmp_path)], "causal")
    with pytest.raises(InputError) as e:
        read(found, Selection(max_bytes=2_000_000))
    assert says in str(e.value) and "data.on_bad_document=skip" in str(e.value) and "\n" not in str(e.value)
    chosen = Selection(max_bytes=2_000_000, on_bad="skip")
    made = [chosen.read(found, i) for i in range(len(found))]
    assert [t for d in made for t in d.fields[0].to_pylist()] == ["good", "good"]
    assert sum(d.skipped.count for d in made) == 1 and any(says in d.skipped.first for d in made)


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(200_000))
    pq.write_table(
        pa.table({"text": [text]}), tmp_path / "a.parquet", write_page_checksum=True, compression="none", use_dictionary=False
    )
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[2000] ^= 4
    (tmp_path / "a.parquet").write_bytes(raw)
    found = scan([source(tmp_path)], "causal")
    with pytest.raises(shards.Unreadable, match=r"a.parquet: row group 0, rows 0-0 cannot be read"):
        read(found)
    assert Selection(on_bad="skip").read(found, 0).skipped.count == 1


def test_a_source_that_changed_under_a_run(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"in {name}\n")
    before = scan([source(tmp_path)], "causal")
    before.check_unchanged()
    (tmp_path / "b.txt").write_text("changed\n")
    with pytest.raises(InputError, match=r"b.txt: has changed since this run began"):
        before.check_unchanged()
    with pytest.raises(InputError, match=r"b.txt: has changed since this run began"):
        read(before, Selection(on_bad="skip"))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match="is gone"):
        before.check_unchanged()
    with pytest.raises(InputError, match=r"b.txt: expected a file, found none"):
        read(before, Selection(on_bad="skip"))
    (tmp_path / "c.txt").write_text("new\n")
    (tmp_path / "b.txt").write_text("in b.txt\n")
    with pytest.raises(InputError, match=r"c.txt: is new"):
        before.check_unchanged()
