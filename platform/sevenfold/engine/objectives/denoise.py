"""T5's span denoising."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch, Decoder
from sevenfold.engine.objectives import masking
from sevenfold.engine.objectives.base import Objective
from sevenfold.engine.objectives.layout import documents_of, pack_documents, same_document


class Denoise(Objective):
    """T5's span denoising, for encoder-decoders.

    The encoder reads a document with some spans removed, the decoder predicts the removed spans.
    """

    def _packed_batch(self, rows: Rows, step: int) -> Batch:
        """Builds a batch of packed encoder inputs and decoder labels."""
        pairs = self._sources_and_targets(rows, step)
        sources = [[source for source, _ in row] for row in pairs]
        targets = [[target for _, target in row] for row in pairs]
        # pretraining batches have one width; fine-tuning batches are as wide as their longest row
        width = rows.tokens.shape[1] if rows.targets is None else _longest(sources)
        input_ids, documents = pack_documents(sources, width, self.special_tokens.pad)
        labels, label_documents = pack_documents(targets, _longest(targets), IGNORE)

        # the decoder reads the labels shifted by one; each document starts with the start token
        decoder_ids = np.full_like(labels, self.special_tokens.pad)
        decoder_ids[:, 1:] = np.where(
            labels[:, :-1] == IGNORE, self.special_tokens.pad, labels[:, :-1]
        )
        decoder_ids[_starts(label_documents) & (label_documents >= 0)] = self.special_tokens.start

        edges = np.flatnonzero(_starts(documents).reshape(-1))  # padding counts as a document
        edges = np.append(edges, input_ids.size)
        positions = np.arange(input_ids.size) - np.repeat(edges[:-1], np.diff(edges))
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(positions.reshape(input_ids.shape)),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
            decoder=Decoder(torch.from_numpy(decoder_ids), torch.from_numpy(label_documents)),
        )

    def _sources_and_targets(
        self, rows: Rows, step: int
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Returns the encoder's input and the decoder's labels of each document, by row."""
        generators = [self._generator(tokens, step) for tokens in rows.tokens]
        return [
            [self._remove_spans(rng, ids) for ids, _ in row]
            for rng, row in zip(generators, documents_of(rows), strict=True)
        ]

    def _remove_spans(
        self, rng: np.random.Generator, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns a document without random spans, and the spans; special tokens always stay."""
        removable = np.flatnonzero(~np.isin(ids, self.special_tokens.special))
        noise = np.zeros(len(ids), bool)
        noise[removable] = masking.select_spans(
            rng, len(removable), self.rate, self.mean_span, len(self.special_tokens.sentinels)
        )
        if not noise.any():
            return ids, ids[:0]
        return masking.replace_spans(
            ids, noise, np.array(self.special_tokens.sentinels), self.special_tokens.end
        )

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Runs the model on a batch and returns the decoder's logits."""
        assert batch.decoder is not None
        if batch.attention_mask is not None:
            output = model.forward(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                decoder_input_ids=batch.decoder.input_ids,
                decoder_attention_mask=(batch.decoder.documents >= 0).long(),
                use_cache=False,
            )
            unpacked_logits: torch.Tensor = output.logits
            return unpacked_logits
        documents, decoder_documents = batch.documents, batch.decoder.documents
        encoded = model.encoder(
            input_ids=batch.input_ids, attention_mask=same_document(documents, documents)
        )
        length = decoder_documents.shape[1]
        device = decoder_documents.device
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        # the decoder's padding attends to everything: a softmax over nothing would be 0/0
        is_padding = (decoder_documents < 0)[:, None, :, None]
        output = model.forward(
            encoder_outputs=encoded,
            attention_mask=same_document(decoder_documents, documents) | is_padding,
            decoder_input_ids=batch.decoder.input_ids,
            decoder_attention_mask=same_document(decoder_documents, decoder_documents) & causal,
            use_cache=False,
        )
        logits: torch.Tensor = output.logits
        return logits


def _longest(rows: list[list[np.ndarray]]) -> int:
    """Returns the number of tokens of the longest row, at least 1."""
    return max(1, *(sum(map(len, row)) for row in rows))


def _starts(documents: np.ndarray) -> np.ndarray:
    """Returns where the document index changes along each row, its first token included."""
    return np.diff(documents, axis=1, prepend=-2) != 0
