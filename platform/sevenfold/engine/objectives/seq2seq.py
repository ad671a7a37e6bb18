"""Sequence-to-sequence fine-tuning of encoder-decoders."""

from __future__ import annotations

import numpy as np

from sevenfold.data.rows import Rows
from sevenfold.engine.objectives.denoise import Denoise
from sevenfold.engine.objectives.layout import documents_of


class Seq2Seq(Denoise):
    """The encoder reads the source, the decoder predicts the target (the tokens marked as such)."""

    def _sources_and_targets(
        self, rows: Rows, step: int
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        return [
            [(ids[~is_target], ids[is_target]) for ids, is_target in row]
            for row in documents_of(rows)
        ]
