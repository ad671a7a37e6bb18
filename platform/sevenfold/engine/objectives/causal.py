"""Next-token prediction, for pretraining of decoders and supervised fine-tuning."""

from __future__ import annotations

from sevenfold.engine.objectives.base import Objective


class Causal(Objective):
    """Predicts each next token of a document that is a target.

    In fine-tuning, which tokens are targets comes with the rows.
    """
