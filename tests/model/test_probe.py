"""Models are tried on a tiny copy before anything is started."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.objectives import SPECIAL_TOKENS, document, packed
from helpers.tiny_models import save
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives import (
    Causal,
    Objective,
    Preference,
    Seq2Seq,
    Support,
    attach_losses,
)
from sevenfold.engine.objectives.unpack import divided
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.model.probe import probe
from sevenfold.model.probe.shrink import shrunken
from sevenfold.prepare.model import check_model
from sevenfold.recipe import Recipe

CPU = torch.device("cpu")


def recipe(model: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe of a model, which is trained on no existing data."""
    tree: dict[str, Any] = {
        "name": "x",
        "data": {"sources": [{"path": "/none"}], "sequence_length": 64},
        "tokenizer": {} if "path" in model else {"vocab_size": 600},
        "model": model,
        "train": {"global_batch": 2, "micro_batch": 1, "steps": 3},
        "optimizer": {"learning_rate": 1e-3},
    }
    return Recipe.model_validate(tree).override(changes)


def small(model_type: str, **fields: Any) -> dict[str, Any]:
    """The setting `model` of a tiny new model of a type."""
    config = next(shrunken(AutoConfig.for_model(model_type, **fields))).to_diff_dict()
    known = AutoConfig.for_model(model_type).to_dict()
    ignored = ("transformers_version", "use_cache", "vocab_size", "architectures", "dtype")
    kept = {k: v for k, v in config.items() if k in known and k not in ignored}
    return {"config": {"model_type": model_type, **kept, **fields}}


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        pytest.param(
            small("bert-generation"),
            {},
            "bert-generation cannot be trained with objective causal: its prediction of a token "
            "changes",
            id="sees-ahead",
        ),
        pytest.param(
            small("fnet"),
            {"objective": "masked"},
            "fnet cannot be trained with objective masked: a token's loss differs by",
            id="mixes-padding",
        ),
        pytest.param(
            small("gemma2"),
            {"train.loss_chunk": 16},
            "train.loss_chunk does not support",
            id="capped-logits",
        ),
        pytest.param(
            small("cohere", logit_scale=0.5) | {"attention": "flex_attention"},
            {},
            None,
            id="flex-is-supported",
        ),
        pytest.param(
            small("gpt_neo") | {"attention": "flex_attention"},
            {},
            "model.attention: flex_attention: transformers' gpt_neo has eager: set it to auto",
            id="no-flex",
        ),
        pytest.param(
            {"config": {"model_type": "gemma3"}},
            {},
            "expected a model of text alone, found gemma3, which has no vocabulary of its own: "
            "choose gemma3_text",
            id="images",
        ),
        pytest.param(
            {"config": {"model_type": "dbrx"}},
            {},
            "model.config: transformers cannot build the decoder",
            id="invalid-config",
        ),
    ],
)
def test_what_cannot_be_trained_right_is_refused(
    model: dict[str, Any], changes: dict[str, Any], expected: str | None
) -> None:
    asked = recipe(model, **changes)
    if expected is None:
        check_model(asked)
        return
    with pytest.raises(InputError) as refusal:
        check_model(asked)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("length", [8, 64])
@pytest.mark.parametrize("objective", ["classify", "embed"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "opt", "t5", "bart"])
def test_padded_objectives_are_accepted(model_type: str, objective: str, length: int) -> None:
    changes: dict[str, Any] = {"objective": objective, "data.sequence_length": length}
    if objective == "classify":
        changes["data.classes"] = ["a", "b"]
    asked = recipe({"config": {"model_type": model_type}}, **changes)
    if objective == "embed" and model_type in ("t5", "bart"):
        with pytest.raises(InputError, match="expected an encoder or a decoder"):
            check_model(asked)
    else:
        assert check_model(asked).support.packing


def test_a_base_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    base = Path(save(tmp_path, "llama"))
    asked = recipe({"path": str(base)})
    check_model(asked)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"found none for 1 of them, such as model\.layers\.1\.mlp"
    ):
        check_model(asked)
    # a worker that loads a base which was not checked, such as one of the hub, finds the same
    config = build.config_of(asked, 320)
    with pytest.raises(InputError, match="which would be random numbers"):
        build.build(asked, config, weights=True)


@pytest.mark.parametrize("objective", ["dpo", "embed"])
@pytest.mark.parametrize("setting", ["z_loss", "label_smoothing"])
def test_losses_of_tokens_are_refused_where_texts_are_compared(
    objective: str, setting: str, tmp_path: Path
) -> None:
    asked = recipe({"path": save(tmp_path, "llama")}, objective=objective)
    with pytest.raises(
        InputError, match=rf"train\.{setting}: objective {objective} compares whole"
    ):
        check_model(asked.override({f"train.{setting}": 0.1}))


def unpacking(objective_class: type[Objective]) -> Objective:
    """An objective for a model that does not keep packed documents apart."""
    objective = objective_class(SPECIAL_TOKENS, 0, 0.3, 2)
    objective.support = Support(packing=False)
    return objective


def random_rows(seed: int, rows: int, pairs: bool) -> Rows:
    """Rows of documents of random lengths, each at least 4 tokens; the first row is full."""
    rng = np.random.default_rng(seed)
    documents = []
    for i in range(rows):
        lengths = [4, *rng.integers(4, 16, rng.integers(1, 5)).tolist()]
        lengths = lengths if i else [64]
        documents.append([document(int(rng.integers(1000)), n) for n in lengths])
    result = packed(documents)
    if pairs:  # chosen answers, then rejected ones, in the second quarter and the last one
        result.targets = np.zeros(result.tokens.shape, bool)
        for i, row in enumerate(documents):
            start = 0
            for ids in row:
                quarter = len(ids) // 4
                for first in (quarter, len(ids) - quarter):
                    result.targets[i, start + first : start + first + quarter] = True
                start += len(ids)
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective_class", [Causal, Preference, Seq2Seq])
def test_unpacked_documents_are_divided_into_bounded_batches(
    objective_class: type[Objective], seed: int, one_rank: None
) -> None:
    objective = unpacking(objective_class)
    rows = random_rows(seed, 6, pairs=objective_class is not Causal)
    whole = objective.collate(rows, 0)
    for size in (64, 128, 1000):
        parts = divided(whole, size, CPU)
        tokens = [part.input_ids.numel() for part in parts]
        if objective_class is not Seq2Seq:
            assert max(tokens) <= size
        assert count(parts, lambda b: int((b.labels != IGNORE).sum())) == int(
            (whole.labels != IGNORE).sum()
        )
        if objective_class is Preference:
            for part in parts:
                # every pair has its two answers in its batch
                assert part.segments is not None
                found = set(part.segments.unique().tolist()) - {-1}
                assert found == set(range(2 * len(part.labels)))


def count(batches: list[Batch], number: Any) -> int:
    return sum(number(batch) for batch in batches)


@pytest.mark.parametrize("length", [4, 16, 64])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_models_of_few_positions_are_accepted(model_type: str, length: int) -> None:
    asked = recipe({"config": {"model_type": model_type}}, **{"data.sequence_length": length})
    assert check_model(asked).support.packing == (model_type != "opt")


@pytest.mark.parametrize("kind", ["opt", "falcon"])
@pytest.mark.parametrize("objective_class", [Causal, Preference])
def test_unpacked_documents_have_the_losses_of_each_alone(
    kind: str, objective_class: type[Objective], one_rank: None
) -> None:
    asked = recipe(small(kind))
    support = probe(asked, build.config_of(asked, 600))
    assert not support.packing
    model = build.build(asked, build.config_of(asked, 600), weights=True, attention="sdpa").eval()
    objective = unpacking(objective_class)
    if isinstance(objective, Preference):
        attach_losses(model, Causal(SPECIAL_TOKENS, 0, 0.3, 2))
        objective.reference = build.build(
            asked.override({"seed": 1}), build.config_of(asked, 600), weights=True
        ).eval()
        attach_losses(objective.reference, Causal(SPECIAL_TOKENS, 0, 0.3, 2))
    attach_losses(model, objective)
    rows = random_rows(0, 4, pairs=objective_class is Preference)
    with torch.no_grad():
        together = sum(
            float(model.token_losses(b).sum()) for b in objective.batches(rows, 0, 2, 4, CPU)
        )
        alone = 0.0
        for i in range(len(rows)):
            row = rows.part(i, i + 1)
            edges = [*row.starts.tolist(), int(row.used[0])]
            for start, stop in itertools.pairwise(edges):
                if start < stop:
                    targets = None if row.targets is None else row.targets[:, start:stop]
                    one = Rows(
                        row.tokens[:, start:stop],
                        np.zeros(1, np.int32),
                        np.array([stop - start], np.int32),
                        targets,
                    )
                    alone += float(model.token_losses(objective.collate(one, 0)).sum())
    assert together == pytest.approx(alone, abs=1e-3)
