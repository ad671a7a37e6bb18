"""The step: how its rows are dealt out does not show; packed documents do not see each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks

from sevenfold.data.rows import Rows, labels
from sevenfold.engine import optim
from sevenfold.engine.batch import IGNORE, Batch, micro_batches, to_batch
from sevenfold.engine.notice import Notice
from sevenfold.engine.objectives import Causal, Words, attach
from sevenfold.engine.step import evaluate, train_step
from sevenfold.errors import RunError
from sevenfold.model import build, parallel
from sevenfold.recipe import Recipe

VOCAB, LENGTH, ROWS, STEPS = 512, 64, 12, 8


def rows_of(step: int) -> Rows:
    """Rows of documents of many lengths, some with few targets and one with none."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(3, VOCAB, (ROWS, LENGTH)).astype(np.uint16)
    tokens[:, 1::2] = (tokens[:, ::2] * 7 + 5) % VOCAB  # something to learn
    begins = rng.random((ROWS, LENGTH)) < 0.05
    begins[:, 0] = True
    begins[1, 11:] = False
    begins[1, 10] = True  # padding
    used = np.full(ROWS, LENGTH, np.int32)
    used[1] = 10
    targets = np.ones((ROWS, LENGTH), bool)
    targets[0] = False
    return Rows(tokens, np.nonzero(begins)[1].astype(np.int32), used, targets)


def sharded(recipe: Recipe) -> Any:
    """The recipe's model, with its losses, laid over the ranks."""
    model = build.build(recipe, build.config_of(recipe, VOCAB), weights=torch.distributed.get_rank() == 0)
    attach(model, Causal(Words(VOCAB), 0, 0.15, 3), recipe.train.loss_chunk)
    return parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)


def losses(tree: dict[str, Any], micro_batch: int) -> list[float]:
    recipe = Recipe.model_validate(tree)
    tensor = recipe.parallel.tensor
    place = parallel.Place.of(torch.distributed.get_rank(), torch.distributed.get_world_size(), tensor)
    rank, world = place.rank, place.world_size
    model = sharded(recipe)
    optimizers = optim.build(model, recipe.optimizer)
    out = []
    for step in range(STEPS):
        mine = rows_of(step).part(rank * ROWS // world, (rank + 1) * ROWS // world)
        share = -(-ROWS // world)
        count = -(-share // micro_batch)
        batches = micro_batches(mine, micro_batch, count, to_batch, torch.device("cpu"))
        done = train_step(model, batches, optimizers, 1e-2, 1.0, tensor)
        assert done.applied and done.targets == int((labels(rows_of(step)) >= 0).sum())
        out.append(done.loss)
    return out


@pytest.fixture(scope="module")
def alone(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    from conftest import RECIPE

    tree = {**RECIPE, "data": {"sources": [{"path": "x"}], "sequence_length": LENGTH, "lanes": 4}}
    (found,) = run_ranks(1, tmp_path_factory.mktemp("pg") / "store", losses, tree, ROWS)
    assert found[-1] < found[0] - 0.3  # it learns: equal curves mean something
    return found


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (2, 6), (2, 2), (3, 4), (4, 2), (5, 2)])
def test_the_number_of_workers_does_not_change_the_losses(
    alone: list[float], tree: dict[str, Any], tmp_path: Path, world: int, micro_batch: int
) -> None:
    tree["cluster"] = {"num_workers": min(world, 4)}
    for found in run_ranks(world, tmp_path / "store", losses, tree, micro_batch):
        assert np.allclose(found, alone, rtol=1e-5, atol=0), np.abs(np.array(found) / alone - 1).max()


def not_finite(tree: dict[str, Any]) -> bool:
    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    batches = micro_batches(rows_of(0), ROWS, 1, to_batch, torch.device("cpu"))
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    hook = model.lm_head.register_forward_hook(lambda *a: a[-1] * float("nan"))
    assert not train_step(model, batches, optimizer, 1e-2, 1.0).applied
    hook.remove()
    same = all(torch.equal(p.full_tensor(), before[n].full_tensor()) for n, p in model.state_dict().items())
    return same and train_step(model, batches, optimizer, 1e-2, 1.0).applied


def test_a_gradient_that_is_not_finite_changes_no_weight(tree: dict[str, Any], tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path / "store", not_finite, tree) == [True, True]


def noticed(tree: dict[str, Any]) -> list[Notice]:
    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    batches, second = micro_batches(rows_of(0), ROWS, 1, to_batch, torch.device("cpu")), torch.distributed.get_rank() == 1
    return [
        train_step(model, batches, optimizer, 1e-2, 1.0, notice=Notice.END if second and step == 1 else Notice.NONE).noticed
        for step in range(3)
    ]


def test_a_notice_to_one_rank_is_every_ranks(tree: dict[str, Any], tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path / "store", noticed, tree) == [[Notice.NONE, Notice.END, Notice.NONE]] * 2


def no_target(tree: dict[str, Any]) -> str:
    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    (batch,) = micro_batches(rows_of(0).part(0, 1), 1, 1, to_batch, torch.device("cpu"))
    with pytest.raises(RunError, match="without a single target"):
        train_step(model, [batch], optim.build(model, recipe.optimizer), 1e-2, 1.0)
    return "refused"


def test_a_step_without_a_target_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    assert run_ranks(1, tmp_path / "store", no_target, tree) == ["refused"]


def test_packed_documents_do_not_see_each_other(tree: dict[str, Any]) -> None:
    tree["model"]["config"]["initializer_range"] = 0.5
    recipe = Recipe.model_validate(tree)
    model = build.build(recipe, build.config_of(recipe, VOCAB), weights=True).eval()
    ids = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    cut = 23
    apart = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])[None]
    with torch.no_grad():
        alone = model(input_ids=ids[:, cut:], use_cache=False).logits
        packed = model(input_ids=ids, position_ids=apart, use_cache=False).logits[:, cut:]
        control = model(input_ids=ids, use_cache=False).logits[:, cut:]
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (control - alone).abs().max() > 0.1

    wanted = torch.full_like(ids, IGNORE)
    wanted[:, cut:-1] = ids[:, cut + 1 :]
    with torch.no_grad():
        both = attach(model, Causal(Words(VOCAB), 0, 0.15, 3))(
            Batch(ids, apart, wanted, torch.tensor([0, cut, LENGTH], dtype=torch.int32))
        )
    assert (both[:, :cut] == 0).all() and (both[:, cut:-1] > 0).all()


def measured(tree: dict[str, Any]) -> tuple[float, int, int]:
    recipe = Recipe.model_validate(tree)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = sharded(recipe)
    rows = rows_of(0).part(rank * ROWS // world, (rank + 1) * ROWS // world)
    return evaluate(model, micro_batches(rows, 4, -(-ROWS // world // 4), to_batch, torch.device("cpu")), torch.arange(VOCAB))


def test_evaluation_is_the_same_on_any_number(tree: dict[str, Any], tmp_path: Path) -> None:
    (one,) = run_ranks(1, tmp_path / "one", measured, tree)
    for many in run_ranks(3, tmp_path / "three", measured, tree):
        assert many[1:] == one[1:] and many[0] == pytest.approx(one[0], rel=1e-6)
