"""Embeddings of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sevenfold.errors import InputError
from sevenfold.inference.load import load


class Embedder:
    """Embeds texts: the mean of the last hidden states over a text's tokens (arXiv 1908.10084).

    Vectors are scaled to length 1, so that a dot product is the cosine similarity.

    A text is framed as in training: [head] text [tail], as `TextEncoder` frames documents. A text
    that is too long is cut at its end. The model should be an encoder. Of an encoder-decoder the
    encoder is used, of a decoder its hidden states.

    Args:
        folder: A run or a Hugging Face directory.
        batch_size: Texts per forward pass.
        max_length: The maximum number of tokens of a text; the model's own limit also applies.

    Attributes:
        width: The number of dimensions of a vector.
        max_length: The maximum number of tokens of a text, including head and tail. None: no limit.

    Raises:
        InputError: The model cannot be loaded, as in `load`, or max_length leaves no room for text.
    """

    def __init__(self, folder: str, batch_size: int = 32, max_length: int | None = None):
        self._loaded = load(folder, head=False)
        self._batch_size = batch_size
        model = self._loaded.model
        self._model = model.get_encoder() if self._loaded.family == "encoder-decoder" else model
        limits = [m for m in (max_length, self._loaded.positions) if m is not None]
        self.max_length = min(limits) if limits else None
        encoder = self._loaded.encoder
        frame_tokens = sum(i is not None for i in (encoder.head, encoder.tail))
        if self.max_length is not None and self.max_length <= frame_tokens:
            raise InputError(
                f"max_length: expected more than the {frame_tokens} tokens before and after a "
                f"text, found {self.max_length}"
            )
        self.width = int(model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the vectors of texts, in their order: float32 [texts, width].

        Texts of about the same length share a batch.
        """
        rows = [self._framed(ids) for ids in self._loaded.encoder.ids(texts)] if texts else []
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        vectors = np.zeros((len(rows), self.width), np.float32)
        for start in range(0, len(by_length), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            vectors[batch] = self._embed([rows[i] for i in batch])
        return vectors

    def _framed(self, ids: list[int]) -> list[int]:
        encoder = self._loaded.encoder
        head, tail = ([] if i is None else [i] for i in (encoder.head, encoder.tail))
        room = None if self.max_length is None else self.max_length - len(head) - len(tail)
        return [*head, *ids[:room], *tail]

    def _embed(self, rows: list[list[int]]) -> np.ndarray:
        """Returns the vectors of a batch, float32 [rows, width]."""
        length, pad = max(map(len, rows)), self._loaded.tokenizer.pad_token_id or 0
        device = self._loaded.device
        ids = torch.tensor([r + [pad] * (length - len(r)) for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows], device=device)
        outputs = self._model(input_ids=ids, attention_mask=mask)
        states = outputs.last_hidden_state.float()  # [rows, length, width]
        weights = mask[:, :, None].float()  # 0 for padding
        mean = (states * weights).sum(1) / weights.sum(1)
        vectors: np.ndarray = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return vectors
