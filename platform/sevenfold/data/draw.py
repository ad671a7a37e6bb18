"""Draws held-out rows and documents from all over the data, for validations during training.

The first documents of a file would not do: files are often sorted, such as by class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sevenfold.data.build_chunk import build_rows
from sevenfold.data.permutation import shuffled
from sevenfold.data.rows import Rows
from sevenfold.data.sources.documents import Documents, texts

if TYPE_CHECKING:
    from sevenfold.data.stream import Stream

# MB of files that are read; of larger data this much, or more if few of its documents are held out,
# in row groups that are drawn
DRAWN_MB = 64.0
_BYTES_PER_TOKEN = 8  # more than a token has, so that enough is read
_DRAW = 0x64726177  # "draw": makes these permutations differ from others with the same seed
_FIRST_SHARE = 1.2  # of the documents that are expected to fill the rows, encoded at first


class _Drawn:
    """Documents of a stream in a random order, which depends on the stream's seed alone.

    Args:
        stream: The stream.
        min_documents: The number of documents that are needed, if there are as many.
        min_bytes: The bytes of text that are needed, if there are as many.

    Attributes:
        documents: Documents of each row group.
        keys: float64 [documents] of each row group, between 0 and 1: the order.
    """

    def __init__(self, stream: Stream, min_documents: int = 0, min_bytes: int = 0):
        manifest, seed = stream.order.manifest, stream.order.seed
        self.documents: list[Documents] = []
        self.keys: list[np.ndarray] = []
        read = size = found = 0
        for group in shuffled(len(manifest), seed, _DRAW).tolist():
            documents = stream.selection.read(manifest, group)
            self.documents.append(documents)
            count = len(documents.origin)
            self.keys.append((shuffled(count, seed, _DRAW, group) + _offset(group)) / max(1, count))
            read += manifest.group(group).bytes
            size += sum(column.nbytes for column in documents.fields)
            found += count
            if read >= DRAWN_MB * 1e6 and size >= min_bytes and found >= min_documents:
                break

    def between(self, low: float, high: float) -> list[Documents]:
        """Returns the documents of each row group whose keys are in [low, high)."""
        return [
            _take(documents, np.flatnonzero((keys >= low) & (keys < high)))
            for documents, keys in zip(self.documents, self.keys, strict=True)
        ]


def _offset(group: int) -> float:
    """Returns a number between 0 and 1, so that the keys of different row groups differ."""
    return float(shuffled(4096, _DRAW, group)[0]) / 4096


def _take(documents: Documents, indices: np.ndarray) -> Documents:
    return replace(
        documents,
        fields=[column.take(pa.array(indices)) for column in documents.fields],
        origin=documents.origin[indices],
    )


def draw_rows(stream: Stream, limit: int) -> Rows:
    """Returns packed rows of documents that are drawn from all over a stream.

    Args:
        stream: The stream.
        limit: The maximum number of rows; fewer if the stream has fewer.
    """
    needed = limit * stream.sequence_length
    drawn = _Drawn(stream, min_bytes=_BYTES_PER_TOKEN * needed)
    parts, tokens, low = [], 0, 0.0
    expected = max(1.0, stream.order.tokens)
    high = min(1.0, _FIRST_SHARE * needed / expected)
    while low < 1.0 and tokens < needed:
        parts += stream.encoder.encode(drawn.between(low, high))
        tokens = sum(len(part.ids) for part in parts)
        low, high = high, min(1.0, 2 * high)
    rows = build_rows(
        parts, stream.encoder, stream.sequence_length, stream.packing, stream.order.seed
    )
    return rows.part(0, min(limit, len(rows)))


def draw_documents(
    stream: Stream, limit: int, convert: Callable[[list[list[str]]], list[tuple[str, str, str]]]
) -> list[tuple[str, str, str]]:
    """Returns documents that are drawn from all over a stream.

    Args:
        stream: The stream.
        limit: The maximum number of documents.
        convert: Converts the fields of documents, such as to prompts and references.
    """
    drawn = _Drawn(stream, min_documents=limit)
    keys = np.sort(np.concatenate(drawn.keys))
    high = keys[limit] if limit < len(keys) else np.inf
    chosen: list[tuple[float, tuple[str, str, str]]] = []
    for documents, group_keys in zip(drawn.documents, drawn.keys, strict=True):
        indices = np.flatnonzero(group_keys < high)
        converted = convert(texts(_take(documents, indices)))
        chosen += zip(group_keys[indices].tolist(), converted, strict=True)
    return [document for _, document in sorted(chosen, key=lambda item: item[0])]
