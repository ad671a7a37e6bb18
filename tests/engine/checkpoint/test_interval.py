"""The interval between saves: Young's formula on what rank 0 measured, the same on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

from sevenfold.engine import optim
from sevenfold.engine.checkpoint import CheckpointManager
from sevenfold.engine.checkpoint.interval import Interval, optimal_interval
from sevenfold.recipe import Checkpoint, Recipe


@pytest.mark.parametrize(
    ("cost", "mtbf_hours", "committed", "seconds"),
    [
        (2.0, 1, 0, 120.0),  # sqrt(2 * 2 * 3600)
        (8.0, 1, 0, 240.0),  # four times the cost, or the time between failures: twice the interval
        (2.0, 4, 0, 240.0),
        (5.0, 3, 60, 328.6),
        (0.5, 0.25, 31, 31.0),  # sqrt(900) = 30 s: the previous save would not be finished
    ],
)
def test_youngs_formula(cost: float, mtbf_hours: float, committed: float, seconds: float) -> None:
    assert optimal_interval(cost, mtbf_hours * 3600, committed) == pytest.approx(seconds, abs=0.05)


def test_the_best_interval_is_a_minimum() -> None:
    def lost(seconds: float) -> float:
        return 3 / seconds + seconds / 2 / 7200

    best = optimal_interval(3, 7200, 0)
    assert lost(best) < min(lost(best * 0.9), lost(best * 1.1))


SaveResult = tuple[list[int], list[str], list[int]]


def save_at_intervals(
    tree: dict[str, Any], folder: str, cases: list[dict[str, Any]]
) -> list[SaveResult]:
    """For each case's run of 200 steps: the steps saved, the messages, and the steps in the folder.

    By rank 0's clock a step takes 1 s, or 3 s where a save is in progress when it begins. Each save
    is committed before that step ends. Rank 1 measures 50 times as long.
    """
    from helpers.training import sharded_model

    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    optimizers = optim.build(model, recipe.optimizer)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results: list[SaveResult] = []
    for settings in cases:
        case_folder, messages, saved = Path(folder, str(len(results))), list[str](), list[int]()
        case_folder.mkdir(parents=True, exist_ok=True)
        saver = CheckpointManager(str(case_folder), keep=99)
        interval = Interval(Checkpoint(**settings), world, 0, saver, messages.append)
        for step in range(1, 201):
            saver.wait()
            interval.add((3.0 if step - 1 in saved else 1.0) * (1 if rank == 0 else 50))
            if interval.due(step):
                saved.append(step)
                with interval.saving(step):
                    saver.save(step, model, optimizers, {})
        saver.close()
        results.append((saved, messages, sorted(int(p.name[5:13]) for p in case_folder.iterdir())))
    return results


def test_all_ranks_use_the_interval_that_rank_0_measured(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    # two workers: 900 s between failures; a save costs 2 s and its stall
    cases: list[dict[str, Any]] = [
        {"every": "auto", "mtbf_hours": 0.5},
        {"every": "auto", "mtbf_hours": 1e9, "keep_every": 75},
        {"every": 80},
        {},
    ]
    results, results_of_rank_1 = run_ranks(
        2, tmp_path / "pg" / "store", save_at_intervals, tree, str(tmp_path / "c"), cases
    )
    assert results == results_of_rank_1 and all(
        saved == in_folder for saved, _, in_folder in results
    )
    (often, messages, _), *others = results
    # sqrt(2 * 2 * 900) = 60, and more for the stall
    assert often[:3] == [10, 20, 30] and often[3] - 30 >= 61
    assert f"saving every {often[3] - 30} steps (" in messages[0]
    assert [saved for saved, _, _ in others] == [[10, 20, 30, 75, 150], [80, 160], []]
