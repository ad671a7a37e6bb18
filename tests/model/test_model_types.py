"""Model families: trained as transformers' own model is, or refused before anything is started."""

from pathlib import Path
from typing import Any

import pytest
from conftest import run_ranks
from helpers.families import examine, model_types

PACKED, PADDED = True, False
# a type for each kind of attention, of position and of layer, and whether its documents are packed
SAMPLE = {
    "decoders": [
        ("causal", "llama", PACKED),  # rotary positions
        ("causal", "gpt2", PACKED),  # learned positions
        ("causal", "qwen2", PACKED),  # a sliding window in some layers
        ("causal", "gemma2", PACKED),  # capped logits, eager attention
        ("causal", "mixtral", PACKED),  # experts
        ("causal", "gpt_neo", PACKED),  # local attention
        ("causal", "phi3", PACKED),  # one matrix for queries, keys and values
        ("causal", "opt", PADDED),  # positions by the attention mask
        ("causal", "bloom", PADDED),  # ALiBi
        ("causal", "falcon", PADDED),
    ],
    "recurrent": [
        ("causal", "mamba", PADDED),
        ("causal", "lfm2", PADDED),  # short convolutions
        ("causal", "jamba", PADDED),  # Mamba, attention and experts
        ("causal", "gpt_oss", PADDED),  # attention sinks
        ("causal", "bert", PADDED),  # an encoder's type as a decoder
    ],
    "encoders": [
        ("masked", "bert", PACKED),
        ("masked", "roberta", PACKED),  # positions after that of padding
        ("masked", "modernbert", PACKED),  # windows in some layers
        ("masked", "deberta-v2", PADDED),
        ("masked", "longformer", PADDED),  # windows of its own
        ("denoise", "t5", PACKED),
        ("denoise", "bart", PADDED),
        ("denoise", "m2m_100", PADDED),
        ("denoise", "pegasus", PADDED),
    ],
}
ALL = sorted(model_types())
PART = 12  # types per nightly test


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLE)
def test_a_type_is_trained_as_by_transformers(kind: str, tmp_path: Path) -> None:
    sample = SAMPLE[kind]
    (outcomes,) = run_ranks(1, tmp_path / "store", examine_all, [t[:2] for t in sample])
    found = {t[1]: (o.refused, o.packed, o.problems) for t, o in zip(sample, outcomes, strict=True)}
    assert found == {name: ("", packed, []) for _, name, packed in sample}


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(0, len(ALL), PART))
def test_every_accepted_type_is_right(part: int, tmp_path: Path) -> None:
    types = ALL[part : part + PART]
    (outcomes,) = run_ranks(1, tmp_path / "store", examine_all, types)
    assert {t: o.problems for t, o in zip(types, outcomes, strict=True) if o.problems} == {}


def examine_all(types: list[tuple[str, str]]) -> list[Any]:
    """Examines types in this process, which is one rank."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return [examine(*t) for t in types]
