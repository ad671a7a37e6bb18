"""Whether one system is better than another, or only luckier."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict

from sevenfold.evaluate.metrics import References, corpus_metrics


class Compared(TypedDict):
    """A system by a measure. p is None for the baseline; low to high is the 95% interval of the resampled scores."""

    system: str
    measure: str
    score: float
    mean: float
    low: float
    high: float
    p: float | None
    signature: str


def paired_bootstrap(
    references: References, systems: Mapping[str, Sequence[str]], seed: int = 12345, samples: int = 1000, tokenize: str = "13a"
) -> list[Compared]:
    """BLEU and chrF2 of each system, and how likely chance alone sets it as far from the first one (Koehn, 2004).

    sacrebleu's own PairedTest. It gives a system compared with its equal the least p there is, since no resample differs
    from the others; here a difference of zero has p = 1. Of a few sentences no p means much. The resamples are held at
    once: some 70 kB a sentence.

    Args:
        references: of each sentence its reference, or its several.
        systems: names to predictions; the first one is the baseline.
        seed: above 0.

    Raises:
        ValueError: fewer than two systems, no sentences, lengths that differ, a seed below 1, an unknown tokenizer.
    """
    from sacrebleu.significance import PairedTest, Result

    if len(systems) < 2:
        raise ValueError(f"expected two systems or more, found {list(systems)}")
    if not references:
        raise ValueError("expected sentences to compare, found none")
    for name, made in systems.items():
        if len(made) != len(references):
            raise ValueError(f"expected {len(references)} predictions of {name}, as there are references, found {len(made)}")
    if seed < 1:
        raise ValueError(f"expected a seed above 0 (sacrebleu takes 0 for none), found {seed}")
    metrics = corpus_metrics(references, tokenize)
    with _seeded(seed):
        test = PairedTest([(n, list(p)) for n, p in systems.items()], metrics, None, test_type="bs", n_samples=samples)
        signatures, scores = test()
    rows: list[Compared] = []
    for measure, (key, signature) in zip(metrics, signatures.items(), strict=True):
        results = [r for r in scores[key] if isinstance(r, Result)]
        for name, r in zip(systems, results, strict=True):
            assert r.mean is not None and r.ci is not None
            p = 1.0 if r.p_value is not None and r.score == results[0].score else r.p_value
            rows.append(
                {"system": name, "measure": measure, "score": float(r.score), "mean": float(r.mean),
                 "low": float(r.mean - r.ci), "high": float(r.mean + r.ci), "p": p, "signature": str(signature)}
            )  # fmt: skip
    return rows


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """sacrebleu takes its seed from the environment alone."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
