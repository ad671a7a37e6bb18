from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_shards

from sevenfold.data.manifest import Manifest, scan
from sevenfold.errors import InputError
from sevenfold.recipe import Source


def test_scan_and_read(texts: Path) -> None:
    found = scan([Source(path=str(texts / "train"))], ("text",))
    read = [t for g in found.groups for t in found.read(g)[0].to_pylist()]
    assert len(read) == found.documents and 0.3 * found.bytes < sum(map(len, read)) < 3 * found.bytes
    assert Manifest.from_json(found.to_json()) == found
    pairs = scan([Source(path=str(texts / "pairs"))], ("prompt", "completion"))
    assert len(pairs.read(pairs.groups[0])) == 2


def bad_garbage(at: Path) -> None:
    (at / "a.parquet").write_bytes(b"not parquet at all" * 10)


def bad_column(at: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), at / "a.parquet")


def bad_type(at: Path) -> None:
    pq.write_table(pa.table({"text": [1]}), at / "a.parquet")


def bad_empty(at: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), at / "a.parquet")


def bad_no_shards(at: Path) -> None:
    (at / "a.csv").write_text("x")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bad_garbage, "a.parquet: expected a parquet file"),
        (bad_column, "a.parquet: expected a column 'text', found body"),
        (bad_type, "expected strings, found int64"),
        (bad_empty, "without a single row"),
        (bad_no_shards, "expected shards"),
    ],
)
def test_bad_sources(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError) as e:
        scan([Source(path=str(tmp_path))], ("text",))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_source_that_changed_under_a_run(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [{"text": "a" * 50}, {"text": "b"}])
    before = scan([Source(path=str(tmp_path / "s"))], ("text",))
    before.check_unchanged(scan([Source(path=str(tmp_path / "s"))], ("text",)))
    pq.write_table(pa.table({"text": ["changed"]}), tmp_path / "s/shard-00001.parquet")
    with pytest.raises(InputError, match=r"shard-00001.parquet: has changed"):
        before.check_unchanged(scan([Source(path=str(tmp_path / "s"))], ("text",)))
    (tmp_path / "s/shard-00001.parquet").unlink()
    with pytest.raises(InputError, match="is gone"):
        before.check_unchanged(scan([Source(path=str(tmp_path / "s"))], ("text",)))


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(5000))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet", write_page_checksum=True, compression="none")
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[2000] ^= 4
    (tmp_path / "a.parquet").write_bytes(raw)
    found = scan([Source(path=str(tmp_path))], ("text",))
    with pytest.raises(InputError, match=r"a.parquet: row group 0 cannot be read"):
        found.read(found.groups[0])
