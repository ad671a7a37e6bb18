"""Bad input files: each is named with file and position, or skipped and counted."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sevenfold.data.manifest import Manifest
from sevenfold.data.scan import scan
from sevenfold.data.sources import shards
from sevenfold.data.sources.documents import Selection
from sevenfold.errors import InputError
from sevenfold.recipe import Source

TEXTS = [f"document {i} " + "über 中文 🙂 text " * (i % 7) + "end" for i in range(200)]


def source(path: Path, **settings: object) -> Source:
    return Source.model_validate({"path": str(path), **settings})


def read(manifest: Manifest, selection: Selection | None = None) -> list[str]:
    """Returns the texts of all row groups of the manifest."""
    selection = selection or Selection()
    return [
        t for i in range(len(manifest)) for t in selection.read(manifest, i).fields[0].to_pylist()
    ]


def write_compressed(path: Path, data: bytes, codec: str) -> Path:
    """Writes the data compressed with this codec and returns the path."""
    with pa.CompressedOutputStream(str(path), codec) as stream:
        stream.write(data)
    return path


@pytest.mark.parametrize("most", [40, 333, 2**20])
@pytest.mark.parametrize(
    "name",
    ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.txt", "marked.txt", "gaps.txt.gz"],
)
def test_every_document_is_read_once_for_any_row_group_size(
    tmp_path: Path, name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sevenfold.data.scan._MIN_BYTES", 10)
    lines = "".join(
        json.dumps({"n": i, "text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(TEXTS)
    ).encode()
    separator = {"marked.txt": "<|endoftext|>", "gaps.txt.gz": "\n\n"}.get(name, "\n")
    plain_text = separator.join(TEXTS).encode() + (b"\n\n\n" if name.startswith("gaps") else b"")
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=70)
    elif name.endswith((".gz", ".zst")):
        write_compressed(
            path,
            lines if "jsonl" in name else plain_text,
            "gzip" if name.endswith("gz") else "zstd",
        )
    else:
        path.write_bytes(lines if "jsonl" in name else plain_text)
    manifest = scan([source(path, separator=separator)], "causal", 1, most=most)
    assert read(manifest) == TEXTS
    assert most > 2**10 or len(manifest) > 5
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))).hash() == manifest.hash()


def test_a_file_can_be_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read(scan([source(tmp_path, separator="")], "causal")) == ["one\n\ntwo\n"]


def test_filters_and_the_held_out_split(tmp_path: Path) -> None:
    rows = [
        {"text": t, "score": i % 10, "lang": "de" if i % 3 else "en"}
        for i, t in enumerate(TEXTS + TEXTS[:50])
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rules = [
        {"column": "score", "min": 3, "max": 8},
        {"column": "lang", "one_of": ["de"]},
        {"column": "text", "min_chars": 20},
    ]
    kept = read(scan([source(tmp_path, filters=rules)], "causal"))
    assert kept == [
        r["text"]
        for r in rows
        if 3 <= r["score"] <= 8 and r["lang"] == "de" and len(r["text"]) >= 20
    ]
    everything = scan([source(tmp_path)], "causal")
    train, held_out = (
        read(everything, Selection(held_out=0.2, split=s)) for s in ("train", "held_out")
    )
    assert (
        20 < len(held_out) < 90
        and not set(train) & set(held_out)
        and sorted(train + held_out) == sorted(r["text"] for r in rows)
    )


def bad_garbage(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(b"not parquet at all" * 10)


def bad_truncated(folder: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-500])


def bad_column(folder: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), folder / "a.parquet")


def bad_type(folder: Path) -> None:
    pq.write_table(pa.table({"text": [1]}), folder / "a.parquet")


def bad_empty(folder: Path) -> None:
    (folder / "a.jsonl").write_text("")


def bad_gzip(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"text": "x" * 5000}).encode() * 50)[:-20]
    )


def bad_zstd(folder: Path) -> None:
    data = write_compressed(
        folder / "a.jsonl.zst",
        b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS),
        "zstd",
    ).read_bytes()
    (folder / "a.jsonl.zst").write_bytes(data[: len(data) // 2])


def bad_bomb(folder: Path) -> None:
    write_compressed(folder / "a.txt.gz", bytes(100 * 2**20), "gzip")


def bad_copy(folder: Path) -> None:
    (folder / "a.txt").write_text("the same\n")
    (folder / "b.txt").write_text("the same\n")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bad_garbage, "a.parquet: expected a parquet file"),
        (bad_truncated, "a.parquet: expected a parquet file"),
        (bad_column, "a.parquet: expected a column 'text', found body"),
        (bad_type, "expected strings, found int64"),
        (bad_empty, "a.jsonl: expected documents, found an empty file"),
        (bad_gzip, "a.jsonl.gz: expected gzip"),
        (bad_zstd, "a.jsonl.zst: expected zstd"),
        (bad_bomb, "possible decompression bomb"),
        (bad_copy, "b.txt: is a copy of"),
    ],
)
def test_bad_shards_are_named_or_skipped(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError) as error:
        scan([source(tmp_path)], "causal")
    assert says in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "good.txt").write_text("a good one")
    manifest = scan([source(tmp_path)], "causal", on_bad="skip")
    assert (
        len(manifest.skipped) == 1
        and says in manifest.skipped[0]
        and "a good one" in read(manifest)
    )


def test_missing_files_and_duplicates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(
        InputError, match=r"expected files .* not read: 1 file \(1 .md\); add format: txt"
    ):
        scan([source(tmp_path)], "causal")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="is listed twice"):
        scan([source(tmp_path, name="one"), source(tmp_path / "a.txt", name="two")], "causal")


def write_bad_document(folder: Path, kind: str) -> None:
    """Writes a file in which one document is bad in this way."""
    good = json.dumps({"text": "good"}).encode() + b"\n"
    if kind == "utf8":
        (folder / "a.jsonl").write_bytes(good + b'{"text": "\xff\xfe"}\n' + good)
    elif kind == "utf8 txt":
        (folder / "a.txt").write_bytes(b"good\n\xff\xfe\ngood\n")
    elif kind == "utf8 parquet":
        data = pa.py_buffer(b"good\xff\xfe!good")
        strings = pa.Array.from_buffers(
            pa.string(),
            3,
            [None, pa.py_buffer(pa.array([0, 4, 7, 11], pa.int32()).buffers()[1]), data],
        )
        pq.write_table(pa.table({"text": strings}), folder / "a.parquet")
    elif kind == "json":
        (folder / "a.jsonl").write_bytes(good + b'{"text": "go\n' + good)
    elif kind == "two":
        (folder / "a.jsonl").write_bytes(good + good.strip() + b" " + good + good)
    elif kind == "key":
        (folder / "a.jsonl").write_bytes(good + b'{"body": "x"}\n' + good)
    elif kind == "type":
        (folder / "a.jsonl").write_bytes(good + b'{"text": 5}\n' + good)
    elif kind == "empty":
        pq.write_table(pa.table({"text": ["good", "", "good"]}), folder / "a.parquet")
    elif kind == "null":
        pq.write_table(pa.table({"text": ["good", None, "good"]}), folder / "a.parquet")
    elif kind == "long":
        (folder / "a.jsonl").write_bytes(
            good + json.dumps({"text": "x" * 3_000_000}).encode() + b"\n" + good
        )


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("utf8", "a.jsonl: line 2: not UTF-8"),
        ("utf8 txt", "a.txt: byte 5: not UTF-8"),
        ("utf8 parquet", "a.parquet: row group 0, row 1: not UTF-8 at its byte 0"),
        ("json", "a.jsonl: line 2: expected a JSON object"),
        ("two", "a.jsonl: line 2: expected a JSON object, found invalid JSON: Extra data"),
        ("key", "a.jsonl: line 2: expected a key 'text', found body"),
        ("type", "a.jsonl: line 2: key 'text': expected a string, found int"),
        ("empty", "a.parquet: row group 0, row 1: no text in 'text'"),
        ("null", "a.parquet: row group 0, row 1: no text in 'text'"),
        ("long", "MB (data.max_document_mb)"),
    ],
)
def test_bad_documents_are_named_or_skipped(tmp_path: Path, kind: str, says: str) -> None:
    write_bad_document(tmp_path, kind)
    manifest = scan([source(tmp_path)], "causal")
    with pytest.raises(InputError) as error:
        read(manifest, Selection(max_bytes=2_000_000))
    assert (
        says in str(error.value)
        and "data.on_bad_document=skip" in str(error.value)
        and "\n" not in str(error.value)
    )
    skipping = Selection(max_bytes=2_000_000, on_bad="skip")
    results = [skipping.read(manifest, i) for i in range(len(manifest))]
    assert [t for result in results for t in result.fields[0].to_pylist()] == ["good", "good"]
    assert sum(result.skipped.count for result in results) == 1 and any(
        says in result.skipped.first for result in results
    )


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(200_000))
    pq.write_table(
        pa.table({"text": [text]}),
        tmp_path / "a.parquet",
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[2000] ^= 4
    (tmp_path / "a.parquet").write_bytes(raw)
    manifest = scan([source(tmp_path)], "causal")
    with pytest.raises(
        shards.UnreadableError, match=r"a.parquet: row group 0, rows 0-0 cannot be read"
    ):
        read(manifest)
    assert Selection(on_bad="skip").read(manifest, 0).skipped.count == 1


def test_a_source_that_changed_during_a_run_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"in {name}\n")
    manifest = scan([source(tmp_path)], "causal")
    manifest.check_unchanged()
    (tmp_path / "b.txt").write_text("changed\n")
    with pytest.raises(InputError, match=r"b.txt: has changed since this run began"):
        manifest.check_unchanged()
    with pytest.raises(InputError, match=r"b.txt: has changed since this run began"):
        read(manifest, Selection(on_bad="skip"))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match="is gone"):
        manifest.check_unchanged()
    with pytest.raises(InputError, match=r"b.txt: expected a file, found none"):
        read(manifest, Selection(on_bad="skip"))
    (tmp_path / "c.txt").write_text("new\n")
    (tmp_path / "b.txt").write_text("in b.txt\n")
    with pytest.raises(InputError, match=r"c.txt: is new"):
        manifest.check_unchanged()


def test_a_change_is_noticed_wherever_it_lies_and_a_copy_is_none(tmp_path: Path) -> None:
    """The end of each file, which is hashed before each read, does not change here."""
    lines = [f"document {i}" for i in range(20_000)]
    pq.write_table(pa.table({"text": lines}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("\n".join(lines))
    manifest = scan([source(tmp_path)], "causal").recorded()
    manifest = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert manifest.hash() == scan([source(tmp_path)], "causal").hash()
    manifest.check_unchanged()
    for name in ("a.parquet", "b.txt"):
        path = tmp_path / name
        original = path.read_bytes()
        path.unlink()
        path.write_bytes(original)  # a copy, written later
        manifest.check_unchanged()
        for place in (0, 10, len(original) // 2, len(original) - 70_000):
            changed = bytearray(original)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(InputError, match=f"{name}: has changed since this run began"):
                manifest.check_unchanged()
        path.write_bytes(original)
        manifest.check_unchanged()
