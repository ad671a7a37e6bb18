"""Text files in every form that programs write: encodings, byte order marks, ends of lines."""

import codecs
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import BadDocumentsError, Selection
from sevenfold.data.sources.records import records
from sevenfold.data.sources.row_groups import split_shard
from sevenfold.data.sources.text_blocks import zstd
from sevenfold.errors import InputError
from sevenfold.recipe import Source

NEWLINES = {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}
TEXTS = {
    "utf-8": "naïve 中文 🙂",
    "utf-8-sig": "naïve 中文 🙂",
    "utf-16": "naïve 中文 🙂",
    "utf-16-le": "ਊ naïve 中文",  # its first character has bytes that are newlines
    "gb18030": "床前明月光 疑是地上霜 🙂",
    "big5": "床前明月光",
    "shift_jis": "今日はいい天気ですね ソ表",  # the last two have the byte of a backslash
    "euc_kr": "오늘 날씨가 좋다",
    "cp1251": "Сегодня хорошая погода",
    "latin-1": "naïve café",
}


def documents(text: str, count: int = 40) -> list[str]:
    """Returns documents of a few words, some with several lines."""
    rng = random.Random(text)
    words = text.split()
    return [
        f"{i} " + "\n".join(" ".join(rng.choices(words, k=3)) for _ in range(1 + i % 3))
        for i in range(count)
    ]


def read(manifest: Manifest, on_bad: str = "error") -> tuple[list[str], int]:
    """Returns the texts of all row groups, and the number of documents left out."""
    texts, skipped = list[str](), 0
    for index in range(len(manifest)):
        found = Selection(on_bad=on_bad).read(manifest, index)  # type: ignore[arg-type]
        texts += found.fields[0].to_pylist()
        skipped += found.skipped.count
    return texts, skipped


def cut(path: Path, target: int, **settings: object) -> Manifest:
    """Returns the manifest of a file that is cut into row groups of this size."""
    source = Source.model_validate({"path": str(path), **settings})
    manifest = scan([source], "causal")
    (shard,) = manifest.shards
    with storage.open_read(str(path)) as file:
        groups = split_shard(0, shard, source, ["text"], [], target, file)
    tree = manifest.to_json()
    tree["row_groups"] = {name: [vars(g)[name] for g in groups] for name in tree["row_groups"]}
    return Manifest.from_json(json.loads(json.dumps(tree)))


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("separator", ["\n\n", "\n---\n", "\r\n\r\n", "\n"])
def test_every_document_is_read_once(
    encoding: str, newline: str, separator: str, tmp_path: Path
) -> None:
    texts = documents(TEXTS[encoding])
    if separator == "\n":
        texts = [text.replace("\n", " ") for text in texts]
    between = separator.replace("\r\n", "\n")
    raw = between.join(texts).replace("\n", NEWLINES[newline]).encode(encoding)
    (tmp_path / "a.txt").write_bytes(raw)
    setting = {} if encoding.startswith("utf-8") else {"encoding": encoding}
    for target in (1, 7, 100, 2**20):
        found, _ = read(cut(tmp_path / "a.txt", target, separator=separator, **setting))
        assert [t.replace("\r\n", "\n") for t in found] == texts


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("encoding", TEXTS)
def test_json_lines(encoding: str, newline: str, tmp_path: Path) -> None:
    texts = documents(TEXTS[encoding])
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    raw = lines.replace("\n", NEWLINES[newline]).encode(encoding)
    (tmp_path / "a.JSONL.GZ").write_bytes(gzip.compress(raw))
    setting = {} if encoding.startswith("utf-8") else {"encoding": encoding}
    for target in (100, 2**20):
        assert read(cut(tmp_path / "a.JSONL.GZ", target, **setting))[0] == texts
    if not setting:  # what `inspect` reads has no encoding
        assert [r.columns["text"] for r in records(Source(path=str(tmp_path)))] == texts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030", "shift_jis", "cp1251"])
def test_an_encoding_is_guessed_and_told(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = documents(TEXTS[encoding], 200)
    (tmp_path / "a.txt").write_bytes("\n\n".join(texts).encode(encoding))
    manifest = cut(tmp_path / "a.txt", 300, separator="\n\n", encoding="auto")
    assert read(manifest)[0] == texts
    assert "guessed the encoding" in capsys.readouterr().out


def padded_gzip(data: bytes) -> bytes:
    """Two members, and zeros up to a block of a tape."""
    raw = gzip.compress(data[:100]) + gzip.compress(data[100:])
    return raw + bytes(-len(raw) % 10240)


def long_window(data: bytes) -> bytes:
    options = {
        zstd.CompressionParameter.window_log: 28,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
        zstd.CompressionParameter.checksum_flag: 1,
    }
    return zstd.compress(data, options=options)


@pytest.mark.parametrize(("name", "write"), [("a.txt.gz", padded_gzip), ("a.txt.zst", long_window)])
def test_compressed_files_of_other_programs(
    name: str, write: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    texts = [t.replace("\n", " ") for t in documents(TEXTS["utf-8"], 400)]
    (tmp_path / name).write_bytes(write("\n".join(texts).encode()))
    assert read(cut(tmp_path / name, 1000))[0] == texts
    whole = (tmp_path / name).read_bytes().rstrip(b"\0")
    for damaged in (whole[:-30], whole[:200] + b"nonsense" + whole[208:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name}: expected .*by its name"):
            scan([Source(path=str(tmp_path / name))], "causal")


@pytest.mark.parametrize(
    ("raw", "settings", "reason"),
    [
        ("今日は".encode("utf-16"), {}, "not UTF-8|NUL"),
        ("abc".encode("utf-16-le"), {}, "NUL character: expected text .UTF-16"),
        ("床前明月光".encode("gb18030"), {}, "byte 0: not UTF-8 .see the source's `encoding`"),
        ("naïve".encode("latin-1"), {}, "byte 2: not UTF-8"),
        (b"abc\xff\xff", {"encoding": "gb18030"}, "not gb18030 near its byte 3"),
        (b"a\0b", {}, "NUL character"),
        (json.dumps({"text": "a\0b"}).encode(), {"format": "jsonl"}, "line 1: a NUL character"),
        (b'{"text": "a\\ud800b"}', {"format": "jsonl"}, "line 1: .*UTF-8"),
        (b'{"text": " \\n\\t"}', {"format": "jsonl"}, "line 1: no text but white space"),
        (b"text", {"encoding": "klingon"}, "expected the name of an encoding, such as gb18030"),
    ],
)
def test_what_is_no_text_is_named(
    raw: bytes, settings: dict[str, str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises((InputError, ValueError), match=reason):
        read(scan([Source.model_validate({"path": str(tmp_path / "a.txt"), **settings})], "causal"))


def test_a_bad_document_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n \t \na\0b\nna\xefve\n\xe4\xb8\xad\n\n")
    source = Source(path=str(tmp_path / "a.txt"))
    with pytest.raises(BadDocumentsError) as error:
        read(scan([source], "causal"))
    assert [reason for _, reason in error.value.bad] == [
        "not UTF-8 (see the source's `encoding`)",
        "a NUL character: expected text (UTF-16? see the source's `encoding`) in 'text'",
    ]
    assert read(scan([source], "causal"), "skip") == (["one", "中"], 2)


def test_parquet_has_no_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(InputError, match="parquet, whose text is always UTF-8"):
        scan([Source(path=str(tmp_path / "a.parquet"), encoding="gb18030")], "causal")


def test_a_row_of_several_texts_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\n")
    (tmp_path / "b.txt").write_text("four\n")
    (tmp_path / "c.jsonl").write_text('{"text": "five"}\n{"text": "six"}\n')
    found = [(record.row, record.text()) for record in records(Source(path=str(tmp_path)))]
    assert [text.split() for _, text in found] == [
        ["one", "two", "three"],
        ["four"],
        ["five"],
        ["six"],
    ]
    lines = records(Source(path=str(tmp_path), separator="\n", format="txt"))
    assert [r.text() for r in lines][:3] == ["one", "two", "three"]
