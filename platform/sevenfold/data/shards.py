"""Shards of each format: how one is cut into row groups, and how the documents of a row group are read.

A row group is a run of rows of a parquet row group, or the documents that begin in a byte range of a text file (of
its uncompressed bytes). So any row group can be read alone; of a compressed file what lies before it is decompressed too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.recipe import Source

Format = Literal["parquet", "jsonl", "txt"]
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "txt": (".txt",),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
MOST_PARTS = 8  # of what must be decoded from its beginning for each part: a parquet row group, a compressed file
SMALL_BYTES, SMALL_PARTS = 8 * 2**20, 512  # of fine-tuning data, often sorted, small row groups are cut into as many
MOST_BYTES = 64 * 2**20  # of text in a row group
MAX_RATIO, MAX_SHARD_BYTES = 200, 64 * 2**30  # beyond, a compressed shard is a bomb; text shrinks 3 to 10 times
_TAIL = 64 * 2**10
_BLOCK = 2**20
_ROWS = 256  # read at once: few, for a dictionary-encoded column can grow a thousandfold


class Unreadable(InputError):
    """A row group whose bytes are damaged."""


@dataclass(frozen=True)
class Shard:
    path: str
    source: int
    format: Format
    compression: str | None
    fingerprint: str  # of size and tail: changes when the file does


@dataclass(frozen=True)
class RowGroup:
    """index, start, end: parquet's row group and the rows of it; else a number, and the bytes in which documents begin."""

    shard: int
    index: int
    start: int
    end: int
    documents: int  # 0 where unknown: a text file is not read to count them
    bytes: int  # of text, uncompressed


@dataclass
class Raw:
    """Documents as they lie in a shard: column -> strings or values; where each is, for people; those not readable."""

    columns: dict[str, pa.ChunkedArray]
    where: Callable[[int], str]
    bad: list[tuple[str, str]] = field(default_factory=list)  # (where, what is wrong) of those left out of columns


def suffixes(source: Source) -> tuple[str, ...]:
    """Of the files that a folder of this source is made of."""
    plain = SUFFIXES[source.format] if source.format else tuple(s for kinds in SUFFIXES.values() for s in kinds)
    packed = tuple(s + c for s in plain if s not in SUFFIXES["parquet"] for c in COMPRESSIONS)
    return plain + packed


def describe(path: str, source: int, settings: Source) -> Shard:
    """Raises InputError where the name does not tell the format, or the file is not there."""
    name = path.partition("?")[0] if storage.is_url(path) else path
    compression = next((c for suffix, c in COMPRESSIONS.items() if name.endswith(suffix)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    kind = settings.format or next((k for k, known in SUFFIXES.items() if name.endswith(known)), None)
    if kind is None or (kind == "parquet" and compression):
        known = ", ".join(s for kinds in SUFFIXES.values() for s in kinds)
        raise InputError(f"{path}: expected a shard ({known}; .gz or .zst where it is text): name its format in the source")
    return Shard(path, source, kind, compression, fingerprint(path))


def fingerprint(path: str) -> str:
    with storage.open_read(path) as f:
        size = f.seek(0, 2)
        f.seek(max(0, size - _TAIL))
        return f"{size}-{hashlib.sha256(f.read(_TAIL)).hexdigest()[:16]}"


def cut(
    number: int, shard: Shard, settings: Source, texts: Sequence[str], others: Sequence[str], target: int
) -> list[RowGroup]:
    """The row groups of a shard, of about `target` bytes of text. Reads a parquet's footer, a compressed file as a whole
    (only so its size is known), nothing else.

    Raises:
        InputError: not what its name says, truncated, a column missing or of another type, a decompression bomb, empty.
    """
    if shard.format == "txt" and (others or list(texts) != [settings.text]):
        raise InputError(
            f"{shard.path}: expected columns, found plain text: it has no filters but on {settings.text!r}, no pairs"
        )
    try:
        if shard.format == "parquet":
            groups = _cut_parquet(number, shard, settings, texts, others, target)
        else:
            groups = _cut_text(number, shard, settings, target)
    except (pa.ArrowException, OSError, EOFError) as e:
        raise InputError(f"{shard.path}: expected {_kind(shard)}, as its name says, found something else: {line(e)}") from None
    if not groups:
        raise InputError(f"{shard.path}: expected documents, found an empty shard")
    return groups


def read(shard: Shard, settings: Source, group: RowGroup, texts: Sequence[str], others: Sequence[str], most: int) -> Raw:
    """The documents of a row group: columns of text, and others that filters ask for. `most`: bytes that one may have.

    Raises:
        Unreadable: the shard is damaged there.
        InputError: it is gone, or no longer the one that was cut.
    """
    try:
        if shard.format == "parquet":
            return _read_parquet(shard, group, [*texts, *others])
        return _read_text(shard, settings, group, texts, others, most)
    except (pa.ArrowException, OSError, EOFError) as e:
        raise Unreadable(f"{shard.path}: {place(shard, group)} cannot be read: {line(e)}") from None


def place(shard: Shard, group: RowGroup) -> str:
    if shard.format == "parquet":
        return f"row group {group.index}, rows {group.start}-{group.end - 1}"
    return f"bytes {group.start}-{group.end - 1}"


def line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _kind(shard: Shard) -> str:
    return {"gzip": "gzip", "zstd": "zstd", None: "a parquet file" if shard.format == "parquet" else "text"}[shard.compression]


def columns(shard: Shard) -> list[str]:
    """Of its rows; of JSON lines those of the first. Raises InputError where it is not what its name says."""
    try:
        with storage.open_read(shard.path) as f:
            if shard.format == "parquet":
                return list(pq.ParquetFile(f).schema_arrow.names)
            first = next((t for t in b"".join(_until_line(f, shard.compression)).splitlines() if t.strip()), b"{}")
            return list(_object(first)) if shard.format == "jsonl" else []
    except (pa.ArrowException, OSError, EOFError) as e:
        raise InputError(f"{shard.path}: expected {_kind(shard)}, as its name says, found something else: {line(e)}") from None
    except ValueError as e:
        raise InputError(f"{shard.path}: its first line: {line(e)}") from None


def _until_line(f: Any, compression: str | None) -> Iterator[bytes]:
    """Blocks up to the one in which the first line with text ends."""
    begun = False
    for block in _blocks(f, compression):
        yield block
        begun = begun or bool(block.strip())
        if begun and b"\n" in block.lstrip():
            return


def _cut_parquet(
    number: int, shard: Shard, settings: Source, texts: Sequence[str], others: Sequence[str], target: int
) -> list[RowGroup]:
    with storage.open_read(shard.path) as f:
        metadata = pq.ParquetFile(f).metadata
        schema = metadata.schema.to_arrow_schema()
    for column in (*texts, *others):
        if column not in schema.names:
            raise InputError(
                f"{shard.path}: expected a column {column!r}, found {', '.join(schema.names)}: name it in the source"
            )
        kind = schema.field(column).type
        if column in texts and settings.shape is None and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"{shard.path}: column {column!r}: expected strings, found {kind}")
    leaves = [j for j in range(metadata.num_columns) if metadata.schema.column(j).path.partition(".")[0] in texts]
    out = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = [group.column(j) for j in leaves]
        size = sum(c.total_uncompressed_size for c in chunks)
        if size > MOST_BYTES and size > MAX_RATIO * sum(c.total_compressed_size for c in chunks):
            raise _bomb(shard, f"row group {i}", size)
        many = settings.shape is not None and size <= SMALL_BYTES
        parts = _parts(size, target, SMALL_PARTS if many else MOST_PARTS)
        rows = -(-group.num_rows // max(1, parts))
        for start in range(0, group.num_rows, max(1, rows)):
            end = min(start + rows, group.num_rows)
            out.append(RowGroup(number, i, start, end, end - start, max(1, size * (end - start) // group.num_rows)))
    return out


def _parts(size: int, target: int, most: int = MOST_PARTS) -> int:
    """Few, since what lies before a part is decoded with it; many only where memory asks for it."""
    return max(1, min(most, round(size / (2 * target))), -(-size // MOST_BYTES))


def _read_parquet(shard: Shard, group: RowGroup, columns: Sequence[str]) -> Raw:
    with storage.open_read(shard.path) as f:
        _unchanged(shard, f)
        file = pq.ParquetFile(f, page_checksum_verification=True, buffer_size=0 if group.start == 0 else _BLOCK)
        if group.index >= file.num_row_groups:
            raise InputError(f"{shard.path}: has changed since this run began: row group {group.index} is gone")
        parts, at, size = [], 0, 0
        for batch in file.iter_batches(_ROWS, [group.index], list(columns), use_threads=False):
            part = batch[max(0, group.start - at) : max(0, group.end - at)]
            at += len(batch)
            size += part.get_total_buffer_size() if len(part) else 0
            if size > 2 * MOST_BYTES + 64 * group.bytes:
                raise _bomb(shard, place(shard, group), size)
            parts.append(part)
            if at >= group.end:
                break
    table = pa.Table.from_batches(parts)
    return Raw({c: table[c] for c in columns}, lambda i: f"row group {group.index}, row {group.start + i}")


def _bomb(shard: Shard, where: str, size: int) -> InputError:
    return InputError(
        f"{shard.path}: {where}: expected text that shrinks at most {MAX_RATIO} times, found {size:,} bytes and more: "
        "a decompression bomb? Write the shard anew, without compression"
    )


def _unchanged(shard: Shard, f: Any) -> None:
    size = f.seek(0, 2)
    f.seek(max(0, size - _TAIL))
    if shard.fingerprint != f"{size}-{hashlib.sha256(f.read(_TAIL)).hexdigest()[:16]}":
        raise InputError(
            f"{shard.path}: has changed since this run began: put it back as it was, or start a run of another name"
        )
    f.seek(0)


def _cut_text(number: int, shard: Shard, settings: Source, target: int) -> list[RowGroup]:
    documents = 0
    if shard.compression:
        size, documents = _measure(shard)
        parts = _parts(size, target)
    else:
        size = int(shard.fingerprint.partition("-")[0])
        parts = -(-size // target)
    if shard.format == "txt" and not settings.separator:
        parts, documents = min(1, size), 1
    step = -(-size // max(1, parts))
    return [
        RowGroup(number, i, start, min(start + step, size), documents // parts, min(start + step, size) - start)
        for i, start in enumerate(range(0, size, max(1, step)))
    ]


def _measure(shard: Shard) -> tuple[int, int]:
    """(bytes, lines) of a compressed file, which is read through and never kept."""
    packed = int(shard.fingerprint.partition("-")[0])
    size = lines = 0
    with storage.open_read(shard.path) as f:
        for block in _blocks(f, shard.compression):
            size += len(block)
            lines += block.count(b"\n")
            if size > MAX_SHARD_BYTES or (size > MOST_BYTES and size > MAX_RATIO * packed):
                raise _bomb(shard, f"byte {size}", size)
    return size, lines


def _blocks(f: Any, compression: str | None) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(pa.PythonFile(f, "r"), compression) if compression else f
    while block := stream.read(_BLOCK):
        yield block


def _read_text(shard: Shard, settings: Source, group: RowGroup, texts: Sequence[str], others: Sequence[str], most: int) -> Raw:
    separator = b"\n" if shard.format == "jsonl" else settings.separator.encode()
    if not separator and group.bytes > most:
        return Raw({texts[0]: pa.chunked_array([], pa.large_string())}, str, [("byte 0", _too_long(most))])
    with storage.open_read(shard.path) as f:
        _unchanged(shard, f)
        begin, data, too_long = _range(f, shard.compression, separator, group.start, group.end, most)
    bad = [] if too_long is None else [(f"byte {too_long}", _too_long(most))]
    if shard.format == "jsonl":
        return _json_lines(data, shard, begin, settings, texts, others, bad)
    return _plain(data, begin, settings, bad)


def _range(f: Any, compression: str | None, separator: bytes, start: int, end: int, most: int) -> tuple[int, bytes, int | None]:
    """The documents that begin in [start, end), whatever way the file was cut: a document begins at 0 and after each
    separator. Returns (where the first begins, the bytes, where one begins that is too long and left out)."""
    k = len(separator)
    base = max(0, start - k)
    blocks = _seek(f, compression, base)
    data = bytearray()

    def more() -> bool:
        block = next(blocks, b"")
        data.extend(block)
        return bool(block)

    while len(data) < end - base and more():
        pass
    first = 0
    if start > 0:
        at = data.find(separator)
        if at < 0 or at + k + base >= end:
            return start, b"", None
        first = at + k
    if not k:
        return start, bytes(data), None
    searched = max(0, end - k - base)  # as the next group looks for its beginning
    while (at := data.find(separator, searched)) < 0:
        searched = max(searched, len(data) - k + 1)
        before = data.rfind(separator, first, end - base)
        last = before + k if before >= 0 else first
        if len(data) - last > most:
            return base + first, bytes(data[first:last]), base + last
        if not more():
            return base + first, bytes(data[first:]), None
    return base + first, bytes(data[first : max(first, at + k)]), None


def _seek(f: Any, compression: str | None, to: int) -> Iterator[bytes]:
    if not compression:
        f.seek(to)
        yield from _blocks(f, None)
        return
    passed = 0
    for block in _blocks(f, compression):
        passed += len(block)
        if passed > to:
            yield block[max(0, to - (passed - len(block))) :]


def _too_long(most: int) -> str:
    return f"longer than {most / 1e6:g} MB (data.max_document_mb)"


def _lines_before(shard: Shard, byte: int) -> int:
    """Lines that end before this byte; the file is read through to there."""
    lines = passed = 0
    with storage.open_read(shard.path) as f:
        for block in _blocks(f, shard.compression):
            lines += block[: byte - passed].count(b"\n")
            passed += len(block)
            if passed >= byte:
                break
    return lines


def _json_lines(
    data: bytes, shard: Shard, begin: int, settings: Source, texts: Sequence[str], others: Sequence[str],
    bad: list[tuple[str, str]],
) -> Raw:  # fmt: skip
    first: list[int] = []  # counted once, where something is wrong

    def where(i: int) -> str:
        if not first:
            first.append(_lines_before(shard, begin))
        return f"line {first[0] + i + 1}"

    if data.strip():
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(data),
                pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
                pyarrow.json.ParseOptions(
                    explicit_schema=pa.schema([(c, pa.large_string()) for c in texts]),
                    unexpected_field_behavior="infer" if others else "ignore",
                ),
            )
            table.validate(full=True)
            lines = data.count(b"\n") + (
                not data.endswith(b"\n")
            )  # it also takes two objects on one, and passes over blank ones
            known = all(c in table.column_names for c in others) and not any(table[c].null_count for c in texts)
            if known and len(table) == lines:
                return Raw({c: table[c] for c in (*texts, *others)}, where, bad)
        except pa.ArrowException:
            pass  # line by line, to find which
    rows: list[dict[str, Any]] = []
    kept: list[int] = []
    for i, text in enumerate(data.split(b"\n")):
        if not text.strip():
            continue
        try:
            rows.append(_json_line(text, texts, others, settings.shape is not None))
            kept.append(i)
        except UnicodeError:
            bad.append((where(i), "not UTF-8"))
        except (ValueError, RecursionError) as e:
            bad.append((where(i), line(e)))
    columns = {
        c: pa.chunked_array([pa.array([r[c] for r in rows], pa.large_string() if c in texts else None)])
        for c in (*texts, *others)
    }
    return Raw(columns, lambda i: where(kept[i]), bad)


def _json_line(text: bytes, texts: Sequence[str], others: Sequence[str], any_type: bool) -> dict[str, Any]:
    """any_type: what is no string becomes one, as JSON, and may be missing."""
    row = _object(text)
    for key in texts:
        if any_type and not isinstance(row.get(key), str):
            row[key] = None if row.get(key) is None else json.dumps(row[key], ensure_ascii=False)
        if key not in row:
            raise ValueError(f"expected a key {key!r}, found {', '.join(map(str, row)) or 'none'}: name it in the source")
        if not isinstance(row[key], str | None):
            raise ValueError(f"key {key!r}: expected a string, found {type(row[key]).__name__}")
        (row[key] or "").encode("utf-8")  # half of a surrogate pair is no text
    return {c: row.get(c) for c in (*texts, *others)}


def _object(text: bytes) -> dict[str, Any]:
    if text.lstrip().startswith(b"["):
        raise ValueError("expected one JSON object a line, found an array: jq -c '.[]' FILE makes lines of it")
    try:
        row = json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"expected a JSON object, found something else: {e.msg}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return row


def _plain(data: bytes, begin: int, settings: Source, bad: list[tuple[str, str]]) -> Raw:
    separator = settings.separator.encode()
    pieces = data.split(separator) if separator else [data]
    texts, at = [], []
    offset = begin
    for piece in pieces:
        stripped = piece.strip(b"\r\n") if separator else piece
        if stripped:
            try:
                texts.append(stripped.decode("utf-8"))
                at.append(offset)
            except UnicodeDecodeError as e:
                bad.append((f"byte {offset + e.start}", "not UTF-8"))
        offset += len(piece) + len(separator)
    return Raw({settings.text: pa.chunked_array([pa.array(texts, pa.large_string())])}, lambda i: f"byte {at[i]}", bad)
