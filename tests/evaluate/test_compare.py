"""The comparison of systems by paired bootstrap."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import RECIPE

from sevenfold.evaluate.compare import Compared, paired_bootstrap
from sevenfold.evaluate.metrics import bleu
from sevenfold.recipe import Recipe

WORDS = [f"word{i}" for i in range(50)]
RNG = np.random.default_rng(0)
REFERENCES = [" ".join(RNG.choice(WORDS, 12)) for _ in range(60)]


def with_replaced_words(share: float, seed: int) -> list[str]:
    """The references with this share of their words replaced."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in reference.split())
        for reference in REFERENCES
    ]


def by_system_and_measure(rows: list[Compared]) -> dict[tuple[str, str], Compared]:
    return {(row["system"], row["measure"]): row for row in rows}


def test_a_better_system_is_distinguished_from_an_equal_one() -> None:
    systems = {
        "base": with_replaced_words(0.4, 1),
        "same": with_replaced_words(0.4, 1),
        "as good": with_replaced_words(0.4, 2),
        "better": with_replaced_words(0.2, 3),
    }
    rows = by_system_and_measure(paired_bootstrap(REFERENCES, systems, samples=300))
    assert len(rows) == 8
    for measure in ("BLEU", "chrF"):
        assert rows["base", measure]["p"] is None
        assert rows["same", measure]["p"] == 1.0  # sacrebleu itself says 1 / 301
        assert rows["as good", measure]["p"] > 0.05
        assert rows["better", measure]["p"] < 0.05
    for (name, measure), row in rows.items():
        scores = bleu(systems[name], REFERENCES)
        assert row["score"] == pytest.approx(scores[measure.lower()])
        assert row["low"] < row["mean"] < row["high"] and row["low"] < row["score"] < row["high"]
        assert "|bs:300|seed:12345|" in row["signature"]
        assert (
            row["signature"].replace("bs:300|seed:12345|", "")
            == scores[f"{measure.lower()}_signature"]
        )


def test_the_seed_argument_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = {"a": with_replaced_words(0.4, 1), "b": with_replaced_words(0.4, 2)}
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    first = paired_bootstrap(REFERENCES, systems, seed=3, samples=50)
    assert os.environ["SACREBLEU_SEED"] == "7"
    monkeypatch.delenv("SACREBLEU_SEED")
    assert paired_bootstrap(REFERENCES, systems, seed=3, samples=50) == first
    assert "SACREBLEU_SEED" not in os.environ
    assert paired_bootstrap(REFERENCES, systems, seed=4, samples=50)[1]["mean"] != first[1]["mean"]


@pytest.mark.parametrize(
    ("systems", "options", "message"),
    [
        ({"a": ["x"]}, {}, "two systems"),
        (
            {"a": ["x"], "b": ["x", "y"]},
            {},
            "b: expected 1 predictions, one per reference, found 2",
        ),
        ({"a": ["x"], "b": ["x"]}, {"seed": 0}, "seed above 0"),
        ({"a": ["x"], "b": ["x"]}, {"tokenize": "german"}, "tokenizer"),
    ],
)
def test_bad_calls_are_refused(systems: dict[str, list[str]], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(["x"], systems, **options)


def test_an_empty_test_set_is_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        paired_bootstrap([], {"a": [], "b": []})


def test_few_prompts_are_said_to_be_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    from sevenfold.evaluate.run import _compare

    systems = {"a": with_replaced_words(0.4, 1), "b": with_replaced_words(0.4, 2)}
    _compare(REFERENCES, systems, None)
    assert "60 prompts are too few to say which run is better" in capsys.readouterr().out
    _compare(REFERENCES * 2, {name: texts * 2 for name, texts in systems.items()}, None)
    assert "too few" not in capsys.readouterr().out


def test_baselines_that_predict_the_same_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    from sevenfold.evaluate.evaluators import _evaluate_baselines

    def refuse() -> list[str]:
        raise ValueError("no words")

    predictors = {"copy": lambda: ["a"], "lead": lambda: ["a"], "other": lambda: ["b"]}
    results = _evaluate_baselines({**predictors, "none": refuse}, lambda p: {"first": p[0]})
    assert results == {"copy": {"first": "a"}, "other": {"first": "b"}}
    output = capsys.readouterr().out
    assert "lead: it predicts the same as: copy" in output and "none: no words" in output


def test_a_baseline_whose_files_are_gone_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sevenfold.evaluate.evaluators import BASE, _evaluate_baselines, _with_absolute_base

    base = str(tmp_path / "gone")
    data = RECIPE["data"] | {"sources": [{"path": str(tmp_path)}]}
    changes = {"data": data, "model": {"path": base}, "tokenizer": {}}
    recipe = Recipe.model_validate(RECIPE | changes)
    predictors = {BASE: lambda: _with_absolute_base(recipe), "copy": lambda: ["a"]}
    assert _evaluate_baselines(predictors, lambda p: {"first": p[0]}) == {"copy": {"first": "a"}}
    assert f"baseline skipped: {BASE}: {base}: expected a run" in capsys.readouterr().out
