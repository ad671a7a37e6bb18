from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sevenfold.data import corpus
from sevenfold.errors import InputError


def test_python_corpus(tmp_path: Path) -> None:
    made = corpus.build_python(str(tmp_path / "python"), max_mb=6)
    train, heldout, summaries, summaries_heldout = (pq.read_table(p) for p in corpus.Corpus.paths(made.root))
    assert len(list((tmp_path / "python/train").iterdir())) == corpus.SHARDS
    assert len(train) + len(heldout) == made.documents and 5 < made.text_mb <= 6
    assert train.column_names == ["id", "text", "source"]
    ids, held = set(train["id"].to_pylist()), set(heldout["id"].to_pylist())
    assert held and not ids & held and len(ids | held) == made.documents  # split by document, none twice
    sources = train["source"].to_pylist()
    assert not [s for s in sources if "/tests/" in s or "/test/" in s or s.endswith("_pb2.py")]
    assert len(summaries) + len(summaries_heldout) == made.summaries > 50
    held_sources = set(heldout["source"].to_pylist())
    assert set(summaries_heldout["source"].to_pylist()) <= held_sources  # a document's docstrings share its split
    assert not set(summaries["source"].to_pylist()) & held_sources
    row = summaries.slice(0, 1).to_pylist()[0]
    assert row["completion"] and row["completion"] not in row["prompt"] and "\n" not in row["completion"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one that exists"):
        corpus.build_python(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
