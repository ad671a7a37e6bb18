"""The interval between saves: Young's, from what rank 0 measured, the same on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine import optim
from sevenfold.engine.interval import Interval, best_seconds
from sevenfold.recipe import Checkpoint, Recipe


@pytest.mark.parametrize(
    ("cost", "mtbf_hours", "committed", "seconds"),
    [
        (2.0, 1, 0, 120.0),  # sqrt(2 * 2 * 3600)
        (8.0, 1, 0, 240.0),  # four times the cost or the time between failures: twice the interval
        (2.0, 4, 0, 240.0),
        (5.0, 3, 60, 328.6),
        (0.5, 0.25, 31, 31.0),  # sqrt(900): the one before would not be written yet
    ],
)
def test_young(cost: float, mtbf_hours: float, committed: float, seconds: float) -> None:
    assert best_seconds(cost, mtbf_hours * 3600, committed) == pytest.approx(seconds, abs=0.05)


def test_the_best_is_a_minimum() -> None:
    def lost(seconds: float) -> float:
        return 3 / seconds + seconds / 2 / 7200

    best = best_seconds(3, 7200, 0)
    assert lost(best) < min(lost(best * 0.9), lost(best * 1.1))


Saves = tuple[list[int], list[str], list[int]]


def saves(tree: dict[str, Any], folder: str, cases: list[dict[str, Any]]) -> list[Saves]:
    """Of each settings' run of 200 steps: the steps that were saved, what was told, the steps in the folder. By rank 0's clock
    a step takes 1 s, and 3 s where a save is under way when it begins; each is committed before that step ends. Rank 1's
    clock says otherwise."""
    from test_step import sharded

    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    optimizers = optim.build(model, recipe.optimizer)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    out: list[Saves] = []
    for settings in cases:
        at, told, saved = Path(folder, str(len(out))), list[str](), list[int]()
        at.mkdir(parents=True, exist_ok=True)
        saver = ckpt.Saver(str(at), keep=99)
        interval = Interval(Checkpoint(**settings), world, 0, saver, told.append)
        for step in range(1, 201):
            saver.wait()
            interval.add((3.0 if step - 1 in saved else 1.0) * (1 if rank == 0 else 50))
            if interval.due(step):
                saved.append(step)
                with interval.saving(step):
                    saver.save(step, model, optimizers, {})
        saver.close()
        out.append((saved, told, sorted(int(p.name[5:13]) for p in at.iterdir())))
    return out


def test_all_ranks_settle_on_what_rank_0_measured(tree: dict[str, Any], tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"every": "auto", "mtbf_hours": 0.5},  # of two workers: 900 s between failures; a save costs 2 s and its stall
        {"every": "auto", "mtbf_hours": 1e9, "keep_every": 75},
        {"every": 80},
        {},
    ]
    found, others = run_ranks(2, tmp_path / "pg" / "store", saves, tree, str(tmp_path / "c"), cases)
    assert found == others and all(saved == there for saved, _, there in found)
    (often, told, _), *rest = found
    assert often[:3] == [10, 20, 30] and often[3] - 30 >= 61  # sqrt(2 * 2 * 900) and more
    assert f"a save each {often[3] - 30} steps (" in told[0]
    assert [saved for saved, _, _ in rest] == [[10, 20, 30, 75, 150], [80, 160], []]
