"""The training step.

The distribution of rows over ranks does not change the losses; packed documents do not see each
other.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from helpers.training import LENGTH, ROWS, VOCAB, rows_of, sharded_model, train_losses

from sevenfold.engine import optim
from sevenfold.engine.batch import IGNORE, Batch, micro_batches, to_batch
from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
from sevenfold.engine.signals import Signal
from sevenfold.engine.step import evaluate, train_step
from sevenfold.errors import RunError
from sevenfold.model import build
from sevenfold.recipe import Recipe


@pytest.fixture(scope="module")
def single_rank_losses(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    from conftest import RECIPE

    tree = {**RECIPE, "data": {"sources": [{"path": "x"}], "sequence_length": LENGTH, "lanes": 4}}
    (losses,) = run_ranks(1, tmp_path_factory.mktemp("pg") / "store", train_losses, tree, ROWS)
    # the model learns, so equal curves are meaningful
    assert losses[-1] < losses[0] - 0.3
    return losses


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (2, 6), (2, 2), (3, 4), (4, 2), (5, 2)])
def test_the_number_of_workers_does_not_change_the_losses(
    single_rank_losses: list[float],
    tree: dict[str, Any],
    tmp_path: Path,
    world: int,
    micro_batch: int,
) -> None:
    tree["cluster"] = {"num_workers": min(world, 4)}
    for losses in run_ranks(world, tmp_path / "store", train_losses, tree, micro_batch):
        assert np.allclose(losses, single_rank_losses, rtol=1e-5, atol=0), np.abs(
            np.array(losses) / single_rank_losses - 1
        ).max()


def step_with_nan_gradient(tree: dict[str, Any]) -> bool:
    """Whether a step with a non-finite gradient changes no weight, and the next step is applied."""
    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    batches = micro_batches(rows_of(0), ROWS, 1, to_batch, torch.device("cpu"))
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    hook = model.lm_head.register_forward_hook(lambda *a: a[-1] * float("nan"))
    assert not train_step(model, batches, optimizer, 1e-2, 1.0).applied
    hook.remove()
    same = all(
        torch.equal(p.full_tensor(), before[n].full_tensor()) for n, p in model.state_dict().items()
    )
    return same and train_step(model, batches, optimizer, 1e-2, 1.0).applied


def test_a_gradient_that_is_not_finite_changes_no_weight(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    assert run_ranks(2, tmp_path / "store", step_with_nan_gradient, tree) == [True, True]


def signals_seen(tree: dict[str, Any]) -> list[Signal]:
    """The signals that this rank sees in three steps; rank 1 is asked to stop in the second."""
    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    batches = micro_batches(rows_of(0), ROWS, 1, to_batch, torch.device("cpu"))
    is_rank_1 = torch.distributed.get_rank() == 1
    return [
        train_step(
            model,
            batches,
            optimizer,
            1e-2,
            1.0,
            signal=Signal.STOP if is_rank_1 and step == 1 else Signal.NONE,
        ).signal
        for step in range(3)
    ]


def test_a_stop_signal_on_one_rank_reaches_every_rank(tree: dict[str, Any], tmp_path: Path) -> None:
    assert (
        run_ranks(2, tmp_path / "store", signals_seen, tree)
        == [[Signal.NONE, Signal.STOP, Signal.NONE]] * 2
    )


def step_without_target(tree: dict[str, Any]) -> str:
    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    (batch,) = micro_batches(rows_of(0).part(0, 1), 1, 1, to_batch, torch.device("cpu"))
    with pytest.raises(RunError, match="at least one target token"):
        train_step(model, [batch], optim.build(model, recipe.optimizer), 1e-2, 1.0)
    return "refused"


def test_a_step_without_a_target_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    assert run_ranks(1, tmp_path / "store", step_without_target, tree) == ["refused"]


def test_packed_documents_do_not_see_each_other(tree: dict[str, Any]) -> None:
    tree["model"]["config"]["initializer_range"] = 0.5
    recipe = Recipe.model_validate(tree)
    model = build.build(recipe, build.config_of(recipe, VOCAB), weights=True).eval()
    ids = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    boundary = 23
    position_ids = torch.cat([torch.arange(boundary), torch.arange(LENGTH - boundary)])[None]
    with torch.no_grad():
        alone = model(input_ids=ids[:, boundary:], use_cache=False).logits
        packed = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[
            :, boundary:
        ]
        control = model(input_ids=ids, use_cache=False).logits[:, boundary:]
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (control - alone).abs().max() > 0.1

    labels = torch.full_like(ids, IGNORE)
    labels[:, boundary:-1] = ids[:, boundary + 1 :]
    with torch.no_grad():
        losses = attach_losses(model, Causal(SpecialTokens(VOCAB), 0, 0.15, 3))(
            Batch(ids, position_ids, labels, torch.tensor([0, boundary, LENGTH], dtype=torch.int32))
        )
    assert (losses[:, :boundary] == 0).all() and (losses[:, boundary:-1] > 0).all()


def evaluate_rows(tree: dict[str, Any]) -> tuple[float, int, int]:
    recipe = Recipe.model_validate(tree)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = sharded_model(recipe)
    rows = rows_of(0).part(rank * ROWS // world, (rank + 1) * ROWS // world)
    return evaluate(
        model,
        micro_batches(rows, 4, -(-ROWS // world // 4), to_batch, torch.device("cpu")),
        torch.arange(VOCAB),
    )


def test_evaluation_is_the_same_on_any_number_of_ranks(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    (single,) = run_ranks(1, tmp_path / "one", evaluate_rows, tree)
    for result in run_ranks(3, tmp_path / "three", evaluate_rows, tree):
        assert result[1:] == single[1:] and result[0] == pytest.approx(single[0], rel=1e-6)
