"""Batches of padded texts, one per row, and the objectives that read them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives.base import Objective
from sevenfold.engine.objectives.divide import bounded_batches, largest_on_any_rank


def padded_batch(texts: list[np.ndarray], pad: int) -> Batch:
    """Builds a batch of one text per row, padded on the right, without labels.

    Without any text the batch is one row of padding.

    Args:
        texts: The token ids of each text.
        pad: The padding token.
    """
    texts = texts or [np.zeros(0, np.int64)]
    width = max(1, *map(len, texts))
    ids = np.full((len(texts), width), pad, np.int64)
    mask = np.zeros((len(texts), width), bool)
    mask[:, 0] = True  # even of an empty text: a softmax over nothing would be 0/0
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
        mask[i, : len(text)] = True
    input_ids = torch.from_numpy(ids)
    return Batch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(texts), -1).contiguous(),
        labels=torch.full_like(input_ids, IGNORE),
        cu_seqlens=torch.arange(0, ids.size + 1, width, dtype=torch.int32),
        attention_mask=torch.from_numpy(mask),
    )


@dataclass
class Texts:
    """The texts that are read from packed rows.

    Attributes:
        ids: The token ids of each text.
        labels: int64 [texts], IGNORE for a text without a label.
    """

    ids: list[np.ndarray]
    labels: np.ndarray

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """A hash of the tokens of each text: int64 [texts], never negative."""
        hashes = [xxh3_64_intdigest(ids.astype(np.int64).data) >> 1 for ids in self.ids]
        return np.array(hashes, np.int64)


class Padded(Objective):
    """The base class of objectives that read one padded text per row of a batch.

    Packed rows may hold many short texts. Padded to the longest one, those of `micro_batch` rows
    would need memory without bound. The texts of all of a rank's rows are therefore divided into
    micro-batches anew.
    """

    def texts(self, rows: Rows) -> Texts:
        """Returns the texts of packed rows, with their labels."""
        raise NotImplementedError

    def batch(self, texts: Texts, indices: list[int], max_texts: int) -> Batch:
        """Builds a batch of some of a rank's texts.

        Args:
            texts: The texts that this rank has in the step.
            indices: Those of the batch; if there are none, it is one row of padding.
            max_texts: The largest number of texts that any rank has in the step.
        """
        batch = padded_batch([texts.ids[i] for i in indices], self.special_tokens.pad)
        labels = texts.labels[indices] if indices else np.array([IGNORE])
        return replace(batch, labels=torch.from_numpy(labels))

    def collate(self, rows: Rows, step: int) -> Batch:
        """Builds one batch of all texts of some rows, in their order."""
        texts = self.texts(rows)
        return self.batch(texts, list(range(len(texts.ids))), len(texts.ids))

    def batches(
        self, rows: Rows, step: int, micro_batch: int, max_rows: int, device: torch.device
    ) -> list[Batch]:
        """Divides the texts of this rank's rows into micro-batches, as many as on every other rank.

        A micro-batch has at most as many tokens, padding included, as `micro_batch` rows. A rank
        that needs fewer micro-batches than another one has some of a single token of padding.
        """
        texts = self.texts(rows)
        parts = bounded_batches([len(ids) for ids in texts.ids], micro_batch * rows.tokens.shape[1])
        count, max_texts = largest_on_any_rank(device, len(parts), len(texts.ids))
        parts += [[] for _ in range(max(1, count) - len(parts))]
        return [self.batch(texts, part, max_texts).to(device) for part in parts]
