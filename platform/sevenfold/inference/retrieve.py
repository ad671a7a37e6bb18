"""The command `retrieve`: the texts of a corpus that are most similar to a query.

It runs without Ray and without an index on disk.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sevenfold import storage
from sevenfold.data.sources.records import records
from sevenfold.errors import InputError
from sevenfold.inference.embed import Embedder
from sevenfold.recipe import Source
from sevenfold.report.console import counting, print_json, say, table

CHUNK = 1024  # texts of the corpus that are in memory at once
BATCH = 128  # texts that are embedded and ranked at once
SHOWN_CHARACTERS = 200  # characters of a text that are shown in the table


@dataclass(frozen=True, order=True)
class Hit:
    """A text that was found for a query; hits sort by score.

    Attributes:
        score: The cosine similarity to the query.
        order: -1 times the text's index, so that of equal scores the earlier text is better.
        id: The text's id.
        text: The text.
    """

    score: float
    order: int
    id: str
    text: str


def run(
    path: str,
    corpus: str,
    queries: Sequence[str],
    top: int = 10,
    text: str | None = None,
    key: str | None = None,
    as_json: bool = False,
) -> list[list[Hit]]:
    """Prints the texts that are most similar to each query, best first.

    The similarity is the cosine of the vectors of `Embedder`. Every call embeds the whole corpus.

    Args:
        path: A run or a Hugging Face directory.
        corpus: A file, folder or glob with the texts; see `records`.
        queries: The queries.
        top: The number of texts per query.
        text: The column of the text. None: one of `records.TEXT_COLUMNS`.
        key: The column of the id. None: file and row are the id.
        as_json: Prints JSON instead of a table.

    Returns:
        For each query the texts, best first.

    Raises:
        InputError: There is no such model or corpus, a row has no text or id, or a query is empty.
    """
    if top < 1:
        raise InputError(f"--top: expected 1 or more, found {top}")
    if not all(q.strip() for q in queries):
        raise InputError("--query: expected text, found none")
    embed = Embedder(path)
    query_vectors = embed(queries)  # float32 [queries, width]
    best: list[list[Hit]] = [[] for _ in queries]
    count = 0
    with counting("embedding the corpus", "texts") as show_count:
        rows = _rows(corpus, text, key)
        while chunk := list(itertools.islice(rows, CHUNK)):
            for start in range(0, len(chunk), BATCH):
                batch = chunk[start : start + BATCH]
                scores = query_vectors @ embed([t for _, t in batch]).T  # [queries, batch]
                for q, row in enumerate(scores):
                    hits = [Hit(float(s), -(count + i), *batch[i]) for i, s in enumerate(row)]
                    best[q] = heapq.nlargest(top, [*best[q], *hits])
                count += len(batch)
                show_count(count)
    if not count:
        raise InputError(f"{corpus}: expected texts, found none")
    if as_json:
        _print_json(queries, best, count)
    else:
        _print_tables(queries, best, count)
    return best


def _rows(corpus: str, text: str | None, key: str | None) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of each row."""
    for record in records(Source(path=corpus)):
        try:
            if key and key not in record.columns:
                raise ValueError(
                    f"expected a column {key!r}, found {', '.join(record.columns) or 'none'}"
                )
            yield (
                str(record.columns[key]) if key else record.location,
                record.text(text, whole=False),
            )
        except ValueError as e:
            raise InputError(
                f"{record.location}: {e}: name the columns with --text and --id, or fix the row"
            ) from None


def _print_json(queries: Sequence[str], best: list[list[Hit]], count: int) -> None:
    results: list[dict[str, Any]] = [
        {
            "query": query,
            "results": [
                {"rank": i, "score": hit.score, "id": hit.id, "text": hit.text}
                for i, hit in enumerate(hits, 1)
            ],
        }
        for query, hits in zip(queries, best, strict=True)
    ]
    print_json(storage.to_json({"texts": count, "queries": results}, indent=1))


def _print_tables(queries: Sequence[str], best: list[list[Hit]], count: int) -> None:
    for query, hits in zip(queries, best, strict=True):
        rows = [
            (i, f"{hit.score:.4f}", hit.id, " ".join(hit.text.split())[:SHOWN_CHARACTERS])
            for i, hit in enumerate(hits, 1)
        ]
        table(query, ["rank", "score", "id", "text"], rows, left=["id", "text"])
    say(f"searched {count:,} texts (each call embeds the corpus again)")
