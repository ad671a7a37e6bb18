"""Splits packed rows into documents, and packs documents into rows."""

from __future__ import annotations

import numpy as np
import torch

from sevenfold.data.rows import Rows


def documents_of(rows: Rows) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Splits packed rows into their documents.

    Returns:
        For each row a list of (ids, is_target), one pair per document: int64 and bool [tokens].
    """
    result = []
    for i, tokens in enumerate(rows.tokens):
        is_target = np.ones(len(tokens), bool) if rows.targets is None else rows.targets[i]
        starts = rows.starts[rows.bounds[i] : rows.bounds[i + 1]].tolist()
        used = int(rows.used[i])
        documents = []
        for start, next_start in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if start < used:  # what starts later is padding
                stop = min(next_start, used)
                documents.append((tokens[start:stop].astype(np.int64), is_target[start:stop]))
        result.append(documents)
    return result


def same_document(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns the attention mask that keeps packed documents apart.

    Args:
        queries: The document index of each query token: int64 [rows, queries].
        keys: The document index of each key token: int64 [rows, keys].

    Returns:
        True where a query may attend to a key: bool [rows, 1, queries, keys].
    """
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def pack_documents(
    rows: list[list[np.ndarray]], width: int, fill: int
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates the documents of each row and pads the rows with `fill`.

    Returns:
        The ids, and the index of each token's document in its row, -1 for padding: int64
        [rows, width] each.
    """
    ids = np.full((len(rows), width), fill, np.int64)
    document_index = np.full((len(rows), width), -1, np.int64)
    for i, documents in enumerate(rows):
        flat = np.concatenate([np.zeros(0, np.int64), *documents])
        lengths = [len(document) for document in documents]
        ids[i, : len(flat)] = flat
        document_index[i, : len(flat)] = np.repeat(np.arange(len(documents)), lengths)
    return ids, document_index
