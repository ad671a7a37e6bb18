import os

import numpy as np
import pytest

from sevenfold.evaluate.compare import Compared, paired_bootstrap
from sevenfold.evaluate.metrics import bleu

WORDS = [f"word{i}" for i in range(50)]
RNG = np.random.default_rng(0)
REFERENCES = [" ".join(RNG.choice(WORDS, 12)) for _ in range(60)]


def spoiled(share: float, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS) if rng.random() < share else w for w in r.split()) for r in REFERENCES]


def by_name(rows: list[Compared]) -> dict[tuple[str, str], Compared]:
    return {(r["system"], r["measure"]): r for r in rows}


def test_a_better_system_is_told_from_an_equal_one() -> None:
    systems = {"base": spoiled(0.4, 1), "same": spoiled(0.4, 1), "as good": spoiled(0.4, 2), "better": spoiled(0.2, 3)}
    rows = by_name(paired_bootstrap(REFERENCES, systems, samples=300))
    assert len(rows) == 8
    for measure in ("BLEU", "chrF"):
        assert rows["base", measure]["p"] is None
        assert rows["same", measure]["p"] == 1.0  # sacrebleu itself says 1 / 301
        assert rows["as good", measure]["p"] > 0.05
        assert rows["better", measure]["p"] < 0.05
    for (name, measure), row in rows.items():
        whole = bleu(systems[name], REFERENCES)
        assert row["score"] == pytest.approx(whole[measure.lower()])
        assert row["low"] < row["mean"] < row["high"] and row["low"] < row["score"] < row["high"]
        assert "|bs:300|seed:12345|" in row["signature"]
        assert row["signature"].replace("bs:300|seed:12345|", "") == whole[f"{measure.lower()}_signature"]


def test_the_seed_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = {"a": spoiled(0.4, 1), "b": spoiled(0.4, 2)}
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    one = paired_bootstrap(REFERENCES, systems, seed=3, samples=50)
    assert os.environ["SACREBLEU_SEED"] == "7"
    monkeypatch.delenv("SACREBLEU_SEED")
    assert paired_bootstrap(REFERENCES, systems, seed=3, samples=50) == one
    assert "SACREBLEU_SEED" not in os.environ
    assert paired_bootstrap(REFERENCES, systems, seed=4, samples=50)[1]["mean"] != one[1]["mean"]


@pytest.mark.parametrize(
    ("systems", "options", "message"),
    [
        ({"a": ["x"]}, {}, "two systems"),
        ({"a": ["x"], "b": ["x", "y"]}, {}, "expected 1 predictions of b, as there are references, found 2"),
        ({"a": ["x"], "b": ["x"]}, {"seed": 0}, "seed above 0"),
        ({"a": ["x"], "b": ["x"]}, {"tokenize": "german"}, "tokenizer"),
    ],
)
def test_bad_calls(systems: dict[str, list[str]], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(["x"], systems, **options)


def test_no_sentences() -> None:
    with pytest.raises(ValueError, match="found none"):
        paired_bootstrap([], {"a": [], "b": []})
