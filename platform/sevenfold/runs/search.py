"""Search by meaning: the texts of a corpus that are nearest to a query. In this process, without Ray or an index on disk."""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sevenfold.data.records import records
from sevenfold.errors import InputError
from sevenfold.evaluate.embed import Embedder
from sevenfold.report.console import counting, say, table

CHUNK = 1024  # texts embedded and ranked at once: memory holds no more of a corpus
SHOWN = 200  # characters of a text in the table


@dataclass(frozen=True, order=True)
class Found:
    """A text of the corpus beside a query; `order`: -its number, so that of equal scores the first one counts more."""

    score: float
    order: int
    id: str
    text: str


def run(
    path: str, corpus: str, queries: Sequence[str], top: int = 10, text: str | None = None, key: str | None = None,
    as_json: bool = False,
) -> list[list[Found]]:  # fmt: skip
    """Prints the `top` texts nearest to each query, by the cosine of their vectors (see evaluate.embed), and returns them.
    Every call embeds the corpus anew.

    Args:
        corpus: file, folder or glob of texts (see data.records).
        text, key: columns of text and id; default: one of records.TEXT_COLUMNS, and file and row.

    Raises:
        InputError: no such model or corpus, a row without its text or id, an empty query.
    """
    if top < 1:
        raise InputError(f"--top: expected 1 or more, found {top}")
    if not all(q.strip() for q in queries):
        raise InputError("--query: expected text, found none")
    embed = Embedder(path)
    asked = embed(queries)  # float32 [queries, width]
    best: list[list[Found]] = [[] for _ in queries]
    count = 0
    with counting("embedding the corpus", "texts") as told:
        rows = _rows(corpus, text, key)
        while chunk := list(itertools.islice(rows, CHUNK)):
            for begin in range(0, len(chunk), 128):
                part = chunk[begin : begin + 128]
                scores = asked @ embed([t for _, t in part]).T
                for q, row in enumerate(scores):
                    made = [Found(float(s), -(count + i), *part[i]) for i, s in enumerate(row)]
                    best[q] = heapq.nlargest(top, [*best[q], *made])
                count += len(part)
                told(count)
    if not count:
        raise InputError(f"{corpus}: expected texts, found none")
    _show(queries, best, count, as_json)
    return best


def _rows(corpus: str, text: str | None, key: str | None) -> Iterator[tuple[str, str]]:
    """(id, text) of each row."""
    for record in records(corpus):
        try:
            if key and key not in record.columns:
                raise ValueError(f"expected a column {key!r}, found {', '.join(record.columns) or 'none'}")
            yield str(record.columns[key]) if key else record.place, record.text(text, whole=False)
        except ValueError as e:
            raise InputError(f"{record.place}: {e}: name the columns by --text and --id, or mend the row") from None


def _show(queries: Sequence[str], best: list[list[Found]], count: int, as_json: bool) -> None:
    if as_json:
        told: list[dict[str, Any]] = [
            {"query": q, "results": [{"rank": i, "score": f.score, "id": f.id, "text": f.text} for i, f in enumerate(found, 1)]}
            for q, found in zip(queries, best, strict=True)
        ]
        print(json.dumps({"texts": count, "queries": told}, ensure_ascii=False, indent=1))
        return
    for query, found in zip(queries, best, strict=True):
        rows = [(i, f"{f.score:.4f}", f.id, " ".join(f.text.split())[:SHOWN]) for i, f in enumerate(found, 1)]
        table(query, ["rank", "score", "id", "text"], rows, left=["id", "text"])
    say(f"{count:,} texts; they are embedded anew at each call")
