"""Shows rows as the model will see them (--preview)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from sevenfold.data.rows import Rows
from sevenfold.data.stream import Stream
from sevenfold.data.tokenizer import load_tokenizer

_NOTES = {
    "masked": "tokens are masked at random at each step, after this",
    "denoise": "spans are removed at random at each step, after this",
}


def preview(stream: Stream, tokenizer: str, objective: str, count: int) -> list[str]:
    """Returns lines that show the first rows of the training data.

    Each document of a row is shown in parts: what the model only reads, and what it learns to
    predict. Special tokens are shown as they are written.

    Args:
        stream: The training data.
        tokenizer: The folder of the tokenizer.
        objective: The recipe's objective.
        count: The number of rows.
    """
    rows = stream.chunk(0).rows
    decoder = load_tokenizer(tokenizer)
    lines = [f"note: {_NOTES[objective]}"] if objective in _NOTES else []
    classes = stream.encoder.classes if objective == "classify" else None  # type: ignore[attr-defined]
    for index in range(min(count, len(rows))):
        row = rows.part(index, index + 1)
        used = int(row.used[0])
        learned = used if row.targets is None else int(row.targets.sum())
        documents = list(_documents(row))
        lines.append(
            f"row {index + 1}: {len(documents)} documents, {used} of {row.tokens.shape[1]} tokens "
            f"used, {learned} of them learned"
        )
        for number, (begin, end) in enumerate(documents, 1):
            lines.append(f"  document {number}: tokens {begin} to {end - 1}")
            lines += [
                f"    {kind} {text!r}" for kind, text in _parts(row, begin, end, decoder, classes)
            ]
    if count > len(rows):
        lines.append(f"the first chunk of the data has only {len(rows)} rows")
    return lines


def _documents(row: Rows) -> Iterator[tuple[int, int]]:
    """Yields the bounds of the documents of a row; padding is left out."""
    used = int(row.used[0])
    starts = [int(start) for start in row.starts if start < used]
    yield from itertools.pairwise([*starts, used])


def _parts(
    row: Rows, begin: int, end: int, tokenizer: Any, classes: list[str] | None
) -> Iterator[tuple[str, str]]:
    """Yields the parts of a document: whether they are read or learned, and their text."""
    ids = row.tokens[0, begin:end].tolist()
    targets = [True] * len(ids) if row.targets is None else row.targets[0, begin:end].tolist()
    position = 0
    for is_target, run in itertools.groupby(targets):
        length = len(list(run))
        part = ids[position : position + length]
        position += length
        if is_target and classes is not None:  # the class is stored as if it was a token
            yield "learns", ", ".join(classes[index] for index in part)
        else:
            yield ("learns" if is_target else "reads "), str(tokenizer.decode(part))
