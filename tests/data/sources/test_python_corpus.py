"""The corpus built from the Python standard library."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sevenfold.data.sources import python_corpus
from sevenfold.errors import InputError


def test_the_corpus_is_split_by_document(tmp_path: Path) -> None:
    corpus = python_corpus.build_python(str(tmp_path / "python"), max_mb=6)
    train, heldout, summaries, summaries_heldout = (
        pq.read_table(p) for p in python_corpus.Corpus.paths(corpus.root)
    )
    assert len(list((tmp_path / "python/train").iterdir())) == python_corpus.SHARDS
    assert len(train) + len(heldout) == corpus.documents and 5 < corpus.text_mb <= 6
    assert train.column_names == ["id", "text", "source"]
    ids, heldout_ids = set(train["id"].to_pylist()), set(heldout["id"].to_pylist())
    # split by document, without duplicates
    assert heldout_ids and not ids & heldout_ids and len(ids | heldout_ids) == corpus.documents
    sources = train["source"].to_pylist()
    assert not [s for s in sources if "/tests/" in s or "/test/" in s or s.endswith("_pb2.py")]
    assert len(summaries) + len(summaries_heldout) == corpus.summaries > 50
    held_sources = set(heldout["source"].to_pylist())
    # the summaries of a document are in the same split as the document
    assert set(summaries_heldout["source"].to_pylist()) <= held_sources
    assert not set(summaries["source"].to_pylist()) & held_sources
    row = summaries.slice(0, 1).to_pylist()[0]
    assert (
        row["completion"]
        and row["completion"] not in row["prompt"]
        and "\n" not in row["completion"]
    )


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one that exists"):
        python_corpus.build_python(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
