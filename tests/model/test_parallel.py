"""Layouts of a model over ranks: each gives the losses of a single rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RECIPE, run_ranks
from helpers.training import LENGTH, ROWS, VOCAB, rows_of, sharded_model, train_losses

from sevenfold.engine import optim
from sevenfold.engine.batch import micro_batches, to_batch
from sevenfold.engine.step import clip_grad_norm
from sevenfold.errors import InputError
from sevenfold.model import build, parallel
from sevenfold.recipe import Recipe


def recipe_of(
    train: dict[str, Any], layout: dict[str, Any], workers: int, optimizer: str = "adamw"
) -> dict[str, Any]:
    return {
        **RECIPE,
        "data": {"sources": [{"path": "x"}], "sequence_length": LENGTH, "lanes": 4},
        "train": RECIPE["train"] | train,
        "parallel": layout,
        "cluster": {"num_workers": workers},
        "optimizer": {"name": optimizer, "learning_rate": 1e-2},
    }


@pytest.fixture(scope="module")
def single_rank_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    losses = {}
    for optimizer in ("adamw", "muon"):
        store = tmp_path_factory.mktemp("pg") / "store"
        (losses[optimizer],) = run_ranks(
            1, store, train_losses, recipe_of({}, {}, 1, optimizer), ROWS
        )
        assert losses[optimizer][-1] < losses[optimizer][0] - 0.3
    return losses


@pytest.mark.parametrize(
    ("train", "layout", "world", "optimizer", "most"),
    [
        ({}, {"replicate": 2}, 2, "adamw", 1e-5),
        ({}, {"replicate": 2}, 4, "adamw", 1e-5),
        ({}, {"tensor": 2}, 2, "adamw", 1e-4),
        ({}, {"tensor": 2}, 4, "adamw", 1e-4),
        ({}, {"tensor": 2, "replicate": 2}, 4, "muon", 1e-4),
        ({"activation_checkpointing": "full", "loss_chunk": 50}, {}, 2, "adamw", 1e-5),
        ({"activation_checkpointing": "selective"}, {}, 2, "adamw", 1e-5),
        ({"activation_checkpointing": "full"}, {"tensor": 2}, 2, "adamw", 1e-4),
        ({"dtype": "bfloat16"}, {}, 2, "adamw", 5e-3),
        ({}, {}, 2, "muon", 1e-5),
        ({}, {}, 3, "muon", 1e-5),
    ],
)
def test_the_layout_does_not_change_the_losses(
    single_rank_losses: dict[str, list[float]],
    tmp_path: Path,
    train: dict[str, Any],
    layout: dict[str, Any],
    world: int,
    optimizer: str,
    most: float,
) -> None:
    for losses in run_ranks(
        world, tmp_path / "store", train_losses, recipe_of(train, layout, world, optimizer), 4
    ):
        assert np.allclose(losses, single_rank_losses[optimizer], rtol=most, atol=0), np.abs(
            np.array(losses) / single_rank_losses[optimizer] - 1
        ).max()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(
    single_rank_losses: dict[str, list[float]], tmp_path: Path
) -> None:
    for losses in run_ranks(
        2, tmp_path / "store", train_losses, recipe_of({"compile": True}, {}, 2), 4
    ):
        assert np.allclose(losses, single_rank_losses["adamw"], rtol=1e-5, atol=0)


def norms(tree: dict[str, Any]) -> tuple[float, float, float]:
    """The norm before clipping to 0.1, after it, and computed by hand from the full gradients."""
    model = sharded_model(Recipe.model_validate(tree))
    (batch,) = micro_batches(rows_of(0), ROWS, 1, to_batch, torch.device("cpu"))
    model.token_losses(batch).mean().backward()
    gradients = torch.cat(
        [parameter.grad.full_tensor().flatten() for parameter in model.parameters()]
    )
    before = clip_grad_norm(model.parameters(), 0.1)
    after = torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])
    return float(before), float(after.norm()), float(gradients.norm())


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"replicate": 2}])
def test_gradients_are_clipped_by_their_global_norm(tmp_path: Path, layout: dict[str, Any]) -> None:
    for before, after, expected in run_ranks(
        2, tmp_path / "store", norms, recipe_of({}, layout, 2)
    ):
        assert (
            before == pytest.approx(expected, rel=1e-5)
            and before > 0.2
            and after == pytest.approx(0.1, rel=1e-4)
        )


@pytest.mark.parametrize(
    ("config", "ways", "says"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48},
            2,
            r"num_attention_heads \(3\)",
        ),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, 2, r"num_key_value_heads \(1\)"),
        ({"intermediate_size": 63}, 2, r"intermediate_size \(63\)"),
        ({"model_type": "qwen3"}, 2, "qwen3 does not support tensor parallelism"),
    ],
)
def test_models_that_tensor_parallelism_cannot_split_are_refused(
    tree: dict[str, Any], config: dict[str, Any], ways: int, says: str
) -> None:
    tree["model"]["config"] |= config
    tree |= {"parallel": {"tensor": ways}, "cluster": {"num_workers": ways}}
    with pytest.raises(InputError, match=says):
        build.check_model(Recipe.model_validate(tree), VOCAB)


def test_blocks_are_found_in_every_family() -> None:
    from transformers import AutoConfig

    for kind, objective, count in (
        ("llama", "causal", 2),
        ("gpt2", "causal", 2),
        ("bert", "masked", 2),
        ("t5", "denoise", 4),
    ):
        config = AutoConfig.for_model(kind, num_hidden_layers=2)
        config.num_decoder_layers = 2
        config.tie_word_embeddings = True
        with torch.device("meta"):
            model = build.MODEL_CLASSES[objective][0].from_config(config)
        blocks = parallel.blocks(model)
        assert len(blocks) == count
        embeddings = {
            id(parameter)
            for parameter in optim.embedding_parameters(model)
            if parameter.shape[0] == config.vocab_size
        }
        assert not any(
            id(parameter) in embeddings for block in blocks for parameter in block.parameters()
        )
