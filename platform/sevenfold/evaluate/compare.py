"""Statistical significance of the difference between systems."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict

from sevenfold.evaluate.metrics import References, corpus_metrics


class Compared(TypedDict):
    """A system's score by one metric, and whether it differs from the baseline system's.

    Attributes:
        system: The system's name.
        measure: "BLEU" or "chrF".
        score: The score on all sentences.
        mean: The mean score of the resamples.
        low: The lower end of the 95% interval of the resampled scores.
        high: The upper end of that interval.
        p: The p-value of the difference from the baseline; None for the baseline itself.
        signature: sacrebleu's description of the metric and the test.
    """

    system: str
    measure: str
    score: float
    mean: float
    low: float
    high: float
    p: float | None
    signature: str


def paired_bootstrap(
    references: References,
    systems: Mapping[str, Sequence[str]],
    seed: int = 12345,
    samples: int = 1000,
    tokenize: str | None = None,
) -> list[Compared]:
    """Compares the BLEU and chrF2 of systems with those of the first one (Koehn, 2004).

    This is sacrebleu's PairedTest, with one correction: for a system whose score equals the
    baseline's, sacrebleu reports the least possible p, since all resamples are equal; here p is 1.
    With few sentences no p-value means much. All resamples are in memory, about 70 kB per sentence.

    Args:
        references: The reference of each sentence, or its several references.
        systems: Predictions by the system's name. The first system is the baseline.
        seed: The seed of the resampling, 1 or more.
        samples: The number of resamples.
        tokenize: BLEU's tokenizer; see `metrics.bleu`.

    Returns:
        A row per metric and system.

    Raises:
        ValueError: There are fewer than two systems or no sentences, numbers of sentences differ,
            the seed is below 1, or the tokenizer is unknown.
    """
    from sacrebleu.significance import PairedTest, Result

    _check_input(references, systems, seed)
    metrics = corpus_metrics(references, tokenize)
    with _sacrebleu_seed(seed):
        test = PairedTest(
            [(name, list(predictions)) for name, predictions in systems.items()],
            metrics,
            None,
            test_type="bs",
            n_samples=samples,
        )
        signatures, scores = test()
    rows: list[Compared] = []
    for measure, (key, signature) in zip(metrics, signatures.items(), strict=True):
        results = [r for r in scores[key] if isinstance(r, Result)]
        for name, r in zip(systems, results, strict=True):
            assert r.mean is not None and r.ci is not None
            p = 1.0 if r.p_value is not None and r.score == results[0].score else r.p_value
            rows.append(
                {
                    "system": name,
                    "measure": measure,
                    "score": float(r.score),
                    "mean": float(r.mean),
                    "low": float(r.mean - r.ci),
                    "high": float(r.mean + r.ci),
                    "p": p,
                    "signature": str(signature),
                }
            )
    return rows


def _check_input(references: References, systems: Mapping[str, Sequence[str]], seed: int) -> None:
    """Raises ValueError if systems cannot be compared, or for a bad seed."""
    if len(systems) < 2:
        raise ValueError(f"expected two systems or more, found {list(systems)}")
    if not references:
        raise ValueError("expected sentences to compare, found none")
    for name, predictions in systems.items():
        if len(predictions) != len(references):
            raise ValueError(
                f"{name}: expected {len(references)} predictions, one per reference, "
                f"found {len(predictions)}"
            )
    if seed < 1:
        raise ValueError(f"expected a seed above 0 (sacrebleu treats 0 as no seed), found {seed}")


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """Sets sacrebleu's seed, which it reads from the environment only, within the block."""
    previous = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if previous is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = previous
