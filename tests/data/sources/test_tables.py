"""CSV, TSV and Arrow files: the rows of parquet, row groups, and what is wrong with files."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from sevenfold.data.backends import FAST, Backend
from sevenfold.data.encode import TextEncoder
from sevenfold.data.examples import ENCODERS
from sevenfold.data.manifest import Manifest
from sevenfold.data.order import DataOrder
from sevenfold.data.rows import Rows
from sevenfold.data.scan import scan
from sevenfold.data.sources import text_blocks
from sevenfold.data.sources.documents import BadDocumentsError, Selection
from sevenfold.data.sources.records import records
from sevenfold.data.stream import ReaderState, Stream
from sevenfold.data.tokenizer import train_tokenizer
from sevenfold.errors import InputError
from sevenfold.recipe import Source

TEXTS = [
    "plain",
    "with, comma\tand tab",
    'he said "no"',
    "two\nlines",
    "two\r\nlines",
    '"',
    "Grüße, 日本語 \U0001f600",
    "007",
    "1e5",
    "NA",
    "2024-01-31",
    "null",
    " kept ",
    'ends with "quote"',
    "\n\nfirst lines are blank",
]


def table(rows: int = 200) -> pa.Table:
    """Rows with every kind of text, of which the last column has empty cells."""
    texts = [f"{TEXTS[i % len(TEXTS)]} {i}" if i >= len(TEXTS) else TEXTS[i] for i in range(rows)]
    # each text occurs in the middle and at the end of a row
    notes = [None if i % 3 == 0 else TEXTS[i % len(TEXTS)] for i in range(rows)]
    return pa.table({"text": texts, "label": [f"c{i % 4}" for i in range(rows)], "note": notes})


def _write_csv(rows: pa.Table, path: Path, delimiter: str = ",", newline: str = "\n") -> None:
    def cell(value: Any) -> str:
        text = "" if value is None else str(value)
        quoted = any(c in text for c in '"\r\n' + delimiter)
        return '"' + text.replace('"', '""') + '"' if quoted else text

    lines = [rows.column_names, *([row[c] for c in rows.column_names] for row in rows.to_pylist())]
    content = "".join(delimiter.join(map(cell, line)) + newline for line in lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = text_blocks.zstd.compress(content)
    path.write_bytes(content)


def _write_ipc(rows: pa.Table, path: Path, new: Any, codec: str | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with new(str(path), rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=60)


WRITERS = {
    "a.parquet": lambda rows, path: pq.write_table(rows, path, row_group_size=60),
    "a.csv": _write_csv,
    "crlf.csv": lambda rows, path: _write_csv(rows, path, newline="\r\n"),
    "arrow.csv": lambda rows, path: pa.csv.write_csv(rows, path),
    "a.tsv": lambda rows, path: _write_csv(rows, path, "\t"),
    "a.csv.gz": _write_csv,
    "a.tsv.zst": lambda rows, path: _write_csv(rows, path, "\t"),
    "a.arrow": lambda rows, path: _write_ipc(rows, path, pa.ipc.new_file),
    "stream.arrow": lambda rows, path: _write_ipc(rows, path, pa.ipc.new_stream),
    "lz4.ipc": lambda rows, path: _write_ipc(rows, path, pa.ipc.new_stream, "lz4"),
    "zstd.ipc": lambda rows, path: _write_ipc(rows, path, pa.ipc.new_file, "zstd"),
    "a.feather": lambda rows, path: pa.feather.write_feather(rows, path, chunksize=60),
}
CELLS = [name for name in WRITERS if ".csv" in name or ".tsv" in name]
ARROW = [name for name in WRITERS if name.endswith((".arrow", ".ipc", ".feather"))]


@pytest.fixture(params=WRITERS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of each kind with the same rows."""
    path = tmp_path / request.param
    WRITERS[request.param](table(), path)
    return path


def manifest_of(path: Path, objective: str = "classify", **settings: Any) -> Manifest:
    chunks = settings.pop("chunks", 1)
    on_bad = settings.pop("on_bad", "error")
    source = Source.model_validate({"path": str(path), **settings})
    return scan([source], objective, chunks, on_bad)


def read(manifest: Manifest, objective: str = "classify", on_bad: Any = "error") -> list[Any]:
    """Returns the fields of the rows of each row group."""
    selection = Selection(ENCODERS[objective].fields, on_bad=on_bad)
    documents = [selection.read(manifest, i) for i in range(len(manifest))]
    return [list(zip(*(f.to_pylist() for f in d.fields), strict=True)) for d in documents]


def flat(groups: list[Any]) -> list[Any]:
    return [row for group in groups for row in group]


def rows(path: Path, objective: str = "classify", on_bad: str = "error", **settings: Any) -> Any:
    return flat(read(manifest_of(path, objective, on_bad=on_bad, **settings), objective, on_bad))


def expected(keep: Any = lambda row: True) -> list[tuple[str, str]]:
    return [(r["text"], r["label"]) for r in table().to_pylist() if keep(r)]


def test_the_rows_are_those_of_parquet(file: Path) -> None:
    assert rows(file) == expected()
    assert [row for (row,) in rows(file, "causal")] == [text for text, _ in expected()]
    found = list(records(Source(path=str(file))))
    assert [r.columns for r in found] == table().to_pylist()
    assert [r.row for r in found] == list(range(1, 201))


def test_row_groups_divide_the_rows_and_are_read_alone(file: Path) -> None:
    manifest = manifest_of(file, chunks=200)
    groups = read(manifest)
    assert len(groups) >= 3 and all(groups) and flat(groups) == expected()
    assert manifest.table[:, 4].tolist() == list(map(len, groups)) and manifest.documents == 200
    stored = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    selection = Selection(ENCODERS["classify"].fields)
    for index in reversed(range(len(stored))):
        texts = selection.read(stored, index).fields[0].to_pylist()
        assert texts == [text for text, _ in groups[index]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    path = tmp_path_factory.mktemp("encoder") / "a.parquet"
    pq.write_table(table(), path)
    tokenizer = train_tokenizer(manifest_of(path, "causal"), Selection(), 300, 0.1, 0)
    return TextEncoder(tokenizer, 32, Backend(FAST))


def test_a_run_that_is_resumed_reads_the_same_rows(file: Path, encoder: TextEncoder) -> None:
    def steps(stream: Stream, count: int, world: int, state: Any = None) -> tuple[list[int], Any]:
        readers = [stream.shard(rank, world).reader(2, state) for rank in range(world)]
        read_rows = [[next(reader) for reader in readers] for _ in range(count)]
        for reader in readers:
            reader.close()
        joint = ReaderState.together([reader.state for reader in readers], 0)
        return [Rows.concatenate(parts).hash() for parts in read_rows], joint

    manifest = manifest_of(file, "causal", chunks=64)
    stream = Stream(DataOrder(manifest, 5, 2), Selection(), encoder, 32, "inline")
    whole, _ = steps(stream, 30, 1)  # more than an epoch
    first, state = steps(stream, 13, 2)
    stored = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    again = Stream(DataOrder(stored, 5, 2), Selection(), encoder, 32, "inline")
    assert first + steps(again, 17, 1, state)[0] == whole and len(set(whole)) == 30


def test_an_empty_cell_is_a_missing_value(file: Path) -> None:
    settings = {"columns": {"label": "note"}}
    with pytest.raises(BadDocumentsError, match="no text in 'label'"):
        rows(file, **settings)
    wanted = [(r["text"], r["note"]) for r in table().to_pylist() if r["note"] is not None]
    assert rows(file, on_bad="skip", **settings) == wanted
    rule = {"column": "note", "one_of": ["007", "two\nlines"]}
    assert rows(file, filters=[rule]) == expected(lambda r: r["note"] in rule["one_of"])


def test_a_missing_column_is_named(file: Path) -> None:
    with pytest.raises(InputError, match=r"expected the columns.*; found text, label, note"):
        rows(file, "dpo")
    with pytest.raises(InputError, match=r"expected a column 'txt', found text, label, note"):
        rows(file, "causal", text="txt")
    with pytest.raises(InputError, match=r"expected a column 'lang', found text, label, note"):
        rows(file, filters=[{"column": "lang", "one_of": ["en"]}])


def test_a_truncated_file_is_one_line(file: Path) -> None:
    content = file.read_bytes()
    for size in (len(content) - 5, len(content) * 2 // 3, len(content) // 2, 12, 0):
        file.write_bytes(content[:size])
        with pytest.raises(InputError, match=f"^{file}: [^\n]+$"):
            rows(file)


def test_a_changed_file_is_named_by_a_run(file: Path) -> None:
    manifest = manifest_of(file)
    WRITERS[file.name](table(190), file)
    with pytest.raises(InputError, match=f"{file}: has changed since this run began"):
        read(manifest)
    with pytest.raises(InputError, match=f"{file}: has changed since this run began"):
        manifest.check_unchanged()


@pytest.mark.parametrize("name", WRITERS)
def test_a_filter_on_numbers(name: str, tmp_path: Path) -> None:
    plain = {"text": ["a", "b", "c", "d"], "label": list("wxyz"), "score": [1.5, None, 3, 20]}
    flags = [True, False, True, None]
    WRITERS[name](pa.table({**plain, "good": flags}), tmp_path / name)
    numbers = {"column": "score", "min": 1.6, "max": 30}
    assert rows(tmp_path / name, filters=[numbers]) == [("c", "y"), ("d", "z")]
    good = {"column": "good", "one_of": [True]}
    assert rows(tmp_path / name, filters=[good]) == [("a", "w"), ("c", "y")]
    on_label = {"text": ["a", "b"], "label": [3, 10]}
    WRITERS[name](pa.table(on_label), tmp_path / name)
    assert rows(tmp_path / name, filters=[{"column": "label", "min": 4}]) == [("b", "10")]


HEADER = "text,label,more\n"
# What is wrong in a CSV file: its content, what is said, and the texts of the rows that are left.
BAD_CELLS: dict[str, tuple[bytes, str, list[str]]] = {
    "too few cells": (
        b'"a\nb",x,1\nc,y\nd,z,3\n',
        "line 4: expected 3 cells.*found 2",
        ["a\nb", "d"],
    ),
    "too many cells": (b"\n\na,x,1\n\nb,y,2,5\nc,z,3\n", "line 6: .*found 4", ["a", "c"]),
    "not UTF-8": (
        b'a,x,1\n"b\n\xff",y,2\nc,z,3',
        "line 3: not UTF-8 at its byte 2 in 't",
        ["a", "c"],
    ),
    "not UTF-8 in a filter": (
        b"a,x,1\nb,y,2\xff\nc,z,3\n",
        "line 3: not UTF-8 .* 'more'",
        ["a", "c"],
    ),
    "no number": (b"a,x,1\nb,y,high\nc,z,3\n", "line 3: column 'more': .*found 'high'", ["a", "c"]),
    "a NUL": (b"a,x,1\nb\0b,y,2\nc,z,3\n", "line 3: a NUL character", ["a", "c"]),
    "no text": (b"a,x,1\n,y,2\nc,z,3\n", "line 3: no text in 'text'", ["a", "c"]),
}


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("case", BAD_CELLS)
def test_a_bad_row_is_named_by_its_line(case: str, name: str, tmp_path: Path) -> None:
    content, message, left = BAD_CELLS[case]
    content = HEADER.encode() + content
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rule = {"column": "more", "one_of" if "UTF-8" in case else "max": 9}
    rule |= {"one_of": [1, 2, 3]} if "UTF-8" in case else {}
    with pytest.raises(BadDocumentsError, match=message) as error:
        rows(path, filters=[rule])
    assert len(error.value.bad) == 1 and "\n" not in str(error.value)
    assert [text for text, _ in rows(path, on_bad="skip", filters=[rule])] == left


# What is wrong with a whole CSV file.
BAD_FILES = {
    "a quote that is not closed": (b'text,label\na,x\n"b,y\nc,z\n', "line 3: .*opened on line 3"),
    "such a quote in the header": (b'text,"label\na,x\n', "line 1: .*opened on line 1"),
    "two columns of one name": (b"text,label,text\na,x,b\n", "found 'text' twice"),
    "a header that is not UTF-8": (b"text,l\xe4bel\na,x\n", "first line: not UTF-8 at its byte 6"),
    "a header alone": (b"text,label\n\n", "expected rows below the header"),
    "nothing": (b"", "expected a header, found an empty file"),
    "blank lines": (b"\n\r\n\n", "expected a header, found an empty file"),
    "no header": (b"hello,x\nyou,y\n", "found hello, x: .*the first line of a CSV file names"),
    "semicolons": (b"text;label\na;x\n", "divided by semicolons: write it with commas"),
    "tabs": (b"text\tlabel\na\tx\n", "divided by tabs: set the source's `format` to tsv"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("objective", ["causal", "classify"])
def test_what_is_wrong_with_a_csv_file(case: str, objective: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"a.csv: .*{message}") as error:
        rows(tmp_path / "a.csv", objective)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gb18030", "auto"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding: str, newline: str, tmp_path: Path) -> None:
    lines = ['"text","label"', '"你好世界。","x"', "再见,y", "今天天气很好我们去公园吧。,x"]
    written = "gb18030" if encoding == "auto" else encoding
    (tmp_path / "a.csv").write_bytes(newline.join(lines).encode(written))
    setting = None if encoding == "utf-8-sig" else encoding
    read_rows = rows(tmp_path / "a.csv", encoding=setting)
    assert read_rows == [
        ("你好世界。", "x"),
        ("再见", "y"),
        ("今天天气很好我们去公园吧。", "x"),
    ]


def test_columns_without_a_name(tmp_path: Path) -> None:
    """pandas writes its index so."""
    (tmp_path / "a.csv").write_text(",text,label\n0,a,x\n1,b,y\n")
    assert rows(tmp_path / "a.csv") == [("a", "x"), ("b", "y")]
    first = next(records(Source(path=str(tmp_path))))
    assert first.columns == {"Unnamed: 0": "0", "text": "a", "label": "x"}


@pytest.mark.parametrize("target", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("block", [1, 2, 3, 17, 4096])
def test_rows_are_found_wherever_the_blocks_end(target: int, block: int, tmp_path: Path) -> None:
    from sevenfold.data.sources import csv_cells, csv_rows, shards

    _write_csv(table(40), tmp_path / "a.csv")
    content = (tmp_path / "a.csv").read_bytes()
    shard = shards.Shard(str(tmp_path / "a.csv"), 0, "csv", None, "")
    text = (content[i : i + block] for i in range(0, len(content), block))
    pieces = list(csv_rows.pieces(text, shard, target))
    assert sum(p.rows for p in pieces) == 41  # with the header
    assert [p.start for p in pieces] == [0, *(p.end for p in pieces[:-1])]
    assert pieces[-1].end == len(content)
    assert all(p.end - p.start >= target for p in pieces[:-1])
    names = ["text", "label", "note"]
    cells = [csv_cells.parse(content[p.start : p.end], shard, names, names).table for p in pieces]
    assert pa.concat_tables(cells).slice(1).to_pylist() == table(40).to_pylist()


def test_long_rows_and_quotes_within_cells(tmp_path: Path) -> None:
    long = "x,\n" * 2**20  # over several blocks
    lines = [f'"{long}",c', 'a 5" disk,c', '"q" more,c', '"",c', "last,c"]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(lines))
    read_rows = rows(tmp_path / "a.csv", on_bad="skip")
    assert [text for text, _ in read_rows] == [long, 'a 5" disk', "q more", "last"]


@pytest.mark.parametrize("name", ARROW)
def test_damaged_arrow_files_are_refused(name: str, tmp_path: Path) -> None:
    """Whatever byte is changed, the rows are read or the file is refused in one line."""
    path = tmp_path / name
    WRITERS[name](table(), path)
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), max(1, len(content) // 60)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            rows(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 5


def test_columns_of_arrow_types(tmp_path: Path) -> None:
    ends = pa.array([2, 3], pa.int32())
    columns = {
        "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
        "view": pa.array(["a", "b", "a"], pa.string_view()),
        "integers": pa.array([1, 2, 1], pa.int8()),
        "runs": pa.RunEndEncodedArray.from_arrays(ends, pa.array(["a", "b"])),
        "json": pa.array(['"a"', '"b"', '"a"'], pa.json_()),
        "booleans": pa.array([True, False, True]),
    }
    data = pa.table({"text": ["x", "y", "z"], **columns})
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        with new(str(tmp_path / "a.arrow"), data.schema) as writer:
            writer.write_table(data, max_chunksize=2)
        for name, column in columns.items():
            found = [label for _, label in rows(tmp_path / "a.arrow", columns={"label": name})]
            values = ["true", "false", "true"] if name == "booleans" else column.to_pylist()
            assert found == list(map(str, values))


def test_dictionaries_that_change_within_a_stream(tmp_path: Path) -> None:
    first = pa.array(["a", "b"]).dictionary_encode()
    second = pa.array(["c", "a"]).dictionary_encode()
    schema = pa.schema({"text": pa.string(), "label": first.type})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), schema) as writer:
        for label in (first, second, first):
            writer.write_batch(pa.record_batch([pa.array(["t", "u"]), label], schema))
    assert [label for _, label in rows(tmp_path / "a.arrow")] == ["a", "b", "c", "a", "a", "b"]


def test_feather_v1_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(InputError, match="found Feather V1, which is not read: write the file"):
        rows(tmp_path / "a.feather")


def test_a_conversation_in_nested_columns(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]
    for name in ("a.parquet", "a.arrow", "a.csv"):
        cells = [json.dumps(messages[0])] if name == "a.csv" else messages
        WRITERS[name](pa.table({"messages": cells}), tmp_path / name)
    read_rows = [rows(tmp_path / name, "sft") for name in ("a.parquet", "a.arrow", "a.csv")]
    assert read_rows[0] == read_rows[1] == read_rows[2] and len(read_rows[0]) == 1


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    data = pa.table({"text": ["a" * (80 << 20)], "label": ["x"]})
    _write_ipc(data, tmp_path / "a.arrow", pa.ipc.new_stream, "zstd")
    with pytest.raises(InputError, match=r"record batch 0: .*possible decompression bomb"):
        rows(tmp_path / "a.arrow")
    run = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["a"]))
    rows_alone = pa.record_batch({"text": run, "label": run})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), rows_alone.schema) as writer:
        writer.write_batch(rows_alone)
    with pytest.raises(InputError, match="possible decompression bomb"):
        rows(tmp_path / "a.arrow")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b"a,b\n" * (20 << 20), 1))
    with pytest.raises(InputError, match="possible decompression bomb"):
        rows(tmp_path / "a.csv.gz")
