"""Texts as vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sevenfold.errors import InputError
from sevenfold.model.load import load


class Embedder:
    """A model that makes a vector of each text: the mean of the last hidden states over its tokens (arXiv 1908.10084), scaled
    to length 1, so that a dot product is the cosine.

    A text is read as in training: [head] text [tail], as data.encode.TextEncoder frames documents; what is too long loses its
    end. Encoders are meant; of an encoder-decoder the encoder is taken, of a decoder its hidden states.

    Attributes:
        width: numbers of a vector.
        max_length: tokens of a text that are read, those of the frame among them; None: all.
    """

    def __init__(self, folder: str, batch_size: int = 32, max_length: int | None = None):
        """folder: a run or a Hugging Face directory. Raises InputError as model.load, or where max_length leaves no room."""
        self._loaded = load(folder, head=False)
        self._batch = batch_size
        model = self._loaded.model
        self._model = model.get_encoder() if self._loaded.family == "encoder-decoder" else model
        limits = [m for m in (max_length, self._loaded.positions) if m is not None]
        self.max_length = min(limits) if limits else None
        frame = sum(i is not None for i in (self._loaded.encoder.head, self._loaded.encoder.tail))
        if self.max_length is not None and self.max_length <= frame:
            raise InputError(f"max_length: expected more than the {frame} tokens of a frame, found {self.max_length}")
        self.width = int(model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width], in the order given. Rows of about the same length are read together."""
        rows = [self._framed(ids) for ids in self._loaded.encoder.ids(texts)] if texts else []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = np.zeros((len(rows), self.width), np.float32)
        for begin in range(0, len(order), self._batch):
            chosen = order[begin : begin + self._batch]
            out[chosen] = self._embed([rows[i] for i in chosen])
        return out

    def _framed(self, ids: list[int]) -> list[int]:
        head, tail = ([] if i is None else [i] for i in (self._loaded.encoder.head, self._loaded.encoder.tail))
        room = None if self.max_length is None else self.max_length - len(head) - len(tail)
        return [*head, *ids[:room], *tail]

    def _embed(self, rows: list[list[int]]) -> np.ndarray:
        """float32 [rows, width]."""
        width, pad = max(map(len, rows)), self._loaded.tokenizer.pad_token_id or 0
        device = self._loaded.device
        ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [rows, width, hidden]
        real = mask[:, :, None].float()
        mean = (states * real).sum(1) / real.sum(1)
        made: np.ndarray = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return made
