"""Hours, money, checkpoints; what a sum of money trains."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_speed import VOCABULARY, h100, small

from sevenfold.engine import optim
from sevenfold.engine.interval import best_seconds
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.plan import budget, cost, hardware, speed
from sevenfold.plan.layouts import Layout
from sevenfold.recipe import Recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import goodput

HOUR = 3600.0


def spent(recipe: Recipe, fleet: hardware.Fleet, step: float = 1.0) -> cost.Cost:
    size, tokens = speed.size(recipe, VOCABULARY), recipe.tokens_per_step / step
    return cost.cost(recipe, size, speed.Speed(step, tokens, fleet.gpus, 0.4, {}), Layout(fleet.gpus), fleet)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoints_bytes_are_those_that_are_saved(name: str) -> None:
    recipe = small(dtype="float32").override({"optimizer.name": name})
    model = build.build(recipe, build.config_of(recipe, VOCABULARY), weights=True)
    optimizers = optim.build(model, recipe.optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for o in optimizers:
        o.step()
    tensors = [*model.parameters()] + [v for o in optimizers for s in o.state.values() for v in s.values() if v.ndim]
    assert cost.checkpoint_bytes(speed.size(recipe, VOCABULARY)) == sum(t.numel() * t.element_size() for t in tensors)


def test_hours_and_money() -> None:
    recipe, fleet = small(steps=360_000).override({"checkpoint.every": "auto"}), h100(16)
    found = spent(recipe, fleet)
    assert found.tokens == recipe.steps * recipe.tokens_per_step
    assert found.hours == pytest.approx(100 / found.effective) and 0.99 < found.effective < 1
    assert found.usd == pytest.approx((found.hours or 0) * 2 * 55.04)
    assert found.mtbf == pytest.approx(50_700 / 16)
    assert spent(recipe, replace(fleet, hourly=None)).usd is None
    assert found.asked == 4 and found.cores == pytest.approx(recipe.tokens_per_step / 23e6)


def test_a_recipe_without_an_end_has_no_hours() -> None:
    recipe = small().override({"train.steps": None, "data.epochs": 1})
    assert (found := spent(recipe, h100(8))).hours is None and found.usd is None and found.checkpoint > 0


def test_spot_loses_more_and_seldom_saves_lose_the_most() -> None:
    recipe, fleet = small(steps=360_000).override({"checkpoint.every": "auto"}), h100(64)
    spot = replace(fleet, spot=True)
    assert spent(recipe, spot).mtbf < 60 < spent(recipe, fleet).mtbf
    often, seldom, never = (spent(recipe.override({"checkpoint.every": e}), spot).effective for e in ("auto", 30_000, None))
    assert often > seldom > never
    assert (spent(recipe, spot).every or 0) < 30_000 and spent(recipe.override({"checkpoint.every": None}), spot).every is None


def test_the_closed_form_is_what_is_simulated() -> None:
    p, mtbf = cost.Policy(600, 2, 30, 150), 20 * HOUR
    drawn = [goodput.simulated(p, mtbf, 100, seed) for seed in range(100)]
    assert cost.closed(p, mtbf) == pytest.approx(sum(drawn) / 100, abs=0.002)
    assert cost.closed(cost.Policy(1e6 * HOUR, 2, 30, 150), HOUR) == 0.0


def test_the_interval_is_the_best_of_all() -> None:
    size, fleet, mtbf = int(84e9), h100(64), 50 * HOUR
    best = cost.policy(size, fleet, mtbf)
    assert best.interval == best_seconds(best.cost, mtbf, best.committed)
    for factor in (0.3, 0.6, 1.6, 3.0):
        assert cost.closed(best._replace(interval=best.interval * factor), mtbf) < cost.closed(best, mtbf) + 1e-5


def made(parameters: float, tokens: float) -> Any:
    size = speed.Size(int(parameters), 0, 0, (), 1, 1, 1.0)
    return budget.Trained({}, size, h100(8), Layout(8), None, tokens, 1.0, budget.law(parameters, tokens))  # type: ignore[arg-type]


def test_the_optimum_is_where_the_law_says() -> None:
    flops = 1e21
    found = [made(n, flops / 6 / n) for n in (1e8, 3e8, 1e9, 3e9, 1e10)]
    (first, tokens), (second, _) = budget.optimum(found)
    assert first == pytest.approx(math.sqrt(flops / 120), rel=0.01) and tokens == pytest.approx(20 * first, rel=0.01)
    g = (budget.ALPHA * budget.A / (budget.BETA * budget.B)) ** (1 / (budget.ALPHA + budget.BETA))  # arXiv 2203.15556, eq. 4
    assert second == pytest.approx(g * (flops / 6) ** (budget.BETA / (budget.ALPHA + budget.BETA)), rel=0.01)
    small_ones = budget.optimum(found[:2])
    assert small_ones[0][0] == pytest.approx(3e8)  # the end of what was looked at


@pytest.mark.slow
def test_money_trains_the_size_that_it_lasts_for() -> None:
    fleet = hardware.of_gpus(hardware.load(), "h100-80gb", 8)
    found = budget.train(20, [fleet])
    assert all(t.tokens == pytest.approx(t.hours * HOUR * t.speed.tokens, rel=0.01) for t in found)
    assert all(t.hours == pytest.approx(20 / 55.04) for t in found)
    (parameters, tokens), _ = budget.optimum(found)
    assert tokens == pytest.approx(20 * parameters, rel=0.01)
    # 20 USD of H100s at 15% to 50% of their peak
    assert math.sqrt(0.15 * 8 * 989e12 * 1308 / 120) < parameters < math.sqrt(0.5 * 8 * 989e12 * 1308 / 120)
    with pytest.raises(InputError, match="no price is known"):
        budget.train(20, [replace(fleet, hourly=None)])
    with pytest.raises(InputError, match="above 0"):
        budget.train(0, [fleet])


def test_what_can_be_fine_tuned() -> None:
    found = {t.name: t for t in budget.tune(hardware.of_gpus(hardware.load(), "a100-40gb", 32))}
    assert found["Llama 3.1 8B"].whole == 8 and found["Llama 3.1 8B"].adapter == 1
    assert found["Llama 3.3 70B"].whole is None and found["Llama 3.3 70B"].adapter is not None
    assert all((t.adapter or 99) <= (t.whole or 99) for t in found.values())
