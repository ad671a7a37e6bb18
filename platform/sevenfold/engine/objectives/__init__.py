"""Training objectives: each has a collator and computes losses from a batch.

All objectives share one training step. The random draws of a collator depend on the seed, the step
and the row's own tokens, never on the rank that holds the row.
"""

from sevenfold.engine.objectives.base import Objective, Scoring, Support
from sevenfold.engine.objectives.causal import Causal
from sevenfold.engine.objectives.classify import Classify
from sevenfold.engine.objectives.contrastive import Contrastive
from sevenfold.engine.objectives.denoise import Denoise
from sevenfold.engine.objectives.layout import documents_of
from sevenfold.engine.objectives.losses import CPU_LOGITS, attach_losses
from sevenfold.engine.objectives.masked import Masked
from sevenfold.engine.objectives.padding import padded_batch
from sevenfold.engine.objectives.preference import Preference, preference_margins
from sevenfold.engine.objectives.seq2seq import Seq2Seq
from sevenfold.engine.objectives.special_tokens import SpecialTokens
from sevenfold.engine.objectives.table import OBJECTIVES, build_objective
from sevenfold.engine.objectives.unpack import unpacked

__all__ = [
    "CPU_LOGITS",
    "OBJECTIVES",
    "Causal",
    "Classify",
    "Contrastive",
    "Denoise",
    "Masked",
    "Objective",
    "Preference",
    "Scoring",
    "Seq2Seq",
    "SpecialTokens",
    "Support",
    "attach_losses",
    "build_objective",
    "documents_of",
    "padded_batch",
    "preference_margins",
    "unpacked",
]
