"""Predicted hours, money and checkpoints, and the model that a budget can train."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.plans import VOCABULARY, h100, small_recipe

from sevenfold.engine import optim
from sevenfold.engine.checkpoint.interval import optimal_interval
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.plan import budget, cost, hardware, speed
from sevenfold.plan.layouts import Layout
from sevenfold.recipe import Recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import goodput

HOUR = 3600.0


def cost_of(recipe: Recipe, fleet: hardware.Fleet, step: float = 1.0) -> cost.Cost:
    """The cost of the recipe on this fleet, at `step` seconds per step."""
    size, tokens = speed.size(recipe, VOCABULARY), recipe.tokens_per_step / step
    return cost.cost(
        recipe, size, speed.Speed(step, tokens, fleet.gpus, 0.4, {}), Layout(fleet.gpus), fleet
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_predicted_size_of_a_checkpoint_equals_the_saved_bytes(name: str) -> None:
    recipe = small_recipe(dtype="float32").override({"optimizer.name": name})
    model = build.build(recipe, build.config_of(recipe, VOCABULARY), weights=True)
    optimizers = optim.build(model, recipe.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    tensors = [*model.parameters()] + [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    ]
    assert cost.checkpoint_bytes(speed.size(recipe, VOCABULARY)) == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors
    )


def test_hours_and_money() -> None:
    recipe, fleet = small_recipe(steps=360_000).override({"checkpoint.every": "auto"}), h100(16)
    predicted = cost_of(recipe, fleet)
    assert predicted.tokens == recipe.steps * recipe.tokens_per_step
    assert (
        predicted.hours == pytest.approx(100 / predicted.goodput) and 0.99 < predicted.goodput < 1
    )
    assert predicted.usd == pytest.approx((predicted.hours or 0) * 2 * 55.04)
    assert predicted.mtbf_hours == pytest.approx(50_700 / 16)
    assert cost_of(recipe, replace(fleet, hourly=None)).usd is None
    assert predicted.data_cpus == 4 and predicted.cores == pytest.approx(
        recipe.tokens_per_step / 23e6
    )


def test_a_recipe_without_steps_has_no_predicted_hours() -> None:
    recipe = small_recipe().override({"train.steps": None, "data.epochs": 1})
    predicted = cost_of(recipe, h100(8))
    assert predicted.hours is None and predicted.usd is None and predicted.checkpoint > 0


def test_goodput_falls_on_spot_machines_and_with_fewer_saves() -> None:
    recipe, fleet = small_recipe(steps=360_000).override({"checkpoint.every": "auto"}), h100(64)
    spot = replace(fleet, spot=True)
    assert cost_of(recipe, spot).mtbf_hours < 60 < cost_of(recipe, fleet).mtbf_hours
    often, seldom, never = (
        cost_of(recipe.override({"checkpoint.every": every}), spot).goodput
        for every in ("auto", 30_000, None)
    )
    assert often > seldom > never
    assert (cost_of(recipe, spot).save_every or 0) < 30_000 and cost_of(
        recipe.override({"checkpoint.every": None}), spot
    ).save_every is None


def test_the_closed_form_agrees_with_simulations() -> None:
    policy, mtbf = cost.Policy(600, 2, 30, 150), 20 * HOUR
    simulated = [goodput.simulated(policy, mtbf, 100, seed) for seed in range(100)]
    assert cost.expected_goodput(policy, mtbf) == pytest.approx(sum(simulated) / 100, abs=0.002)
    assert cost.expected_goodput(cost.Policy(1e6 * HOUR, 2, 30, 150), HOUR) == 0.0


def test_the_interval_is_optimal() -> None:
    size, fleet, mtbf = int(84e9), h100(64), 50 * HOUR
    best = cost.policy(size, fleet, mtbf)
    assert best.interval == optimal_interval(best.cost, mtbf, best.committed)
    for factor in (0.3, 0.6, 1.6, 3.0):
        assert (
            cost.expected_goodput(best._replace(interval=best.interval * factor), mtbf)
            < cost.expected_goodput(best, mtbf) + 1e-5
        )


def trained_model(parameters: float, tokens: float) -> Any:
    """A model of this many parameters, trained on this many tokens."""
    size = speed.Size(int(parameters), 0, 0, (), 1, 1, 1.0)
    loss = budget.predicted_loss(parameters, tokens)
    return budget.Trained({}, size, h100(8), Layout(8), None, tokens, 1.0, loss)  # type: ignore[arg-type]


def test_the_optimum_agrees_with_the_scaling_law() -> None:
    flops = 1e21
    trained = [
        trained_model(parameters, flops / 6 / parameters)
        for parameters in (1e8, 3e8, 1e9, 3e9, 1e10)
    ]
    (first, tokens), (second, _) = budget.optimum(trained)
    assert first == pytest.approx(math.sqrt(flops / 120), rel=0.01) and tokens == pytest.approx(
        20 * first, rel=0.01
    )
    # arXiv 2203.15556, eq. 4
    g = (budget.ALPHA * budget.A / (budget.BETA * budget.B)) ** (1 / (budget.ALPHA + budget.BETA))
    assert second == pytest.approx(
        g * (flops / 6) ** (budget.BETA / (budget.ALPHA + budget.BETA)), rel=0.01
    )
    optimum_of_small = budget.optimum(trained[:2])
    assert optimum_of_small[0][0] == pytest.approx(3e8)  # the largest model considered


@pytest.mark.slow
def test_a_budget_trains_the_optimal_size_for_it() -> None:
    fleet = hardware.of_gpus(hardware.load(), "h100-80gb", 8)
    trained = budget.train(20, [fleet])
    assert all(
        option.tokens == pytest.approx(option.hours * HOUR * option.speed.tokens, rel=0.01)
        for option in trained
    )
    assert all(option.hours == pytest.approx(20 / 55.04) for option in trained)
    (parameters, tokens), _ = budget.optimum(trained)
    assert tokens == pytest.approx(20 * parameters, rel=0.01)
    # the bounds are 20 USD of H100s at 15% and at 50% of their peak
    assert (
        math.sqrt(0.15 * 8 * 989e12 * 1308 / 120)
        < parameters
        < math.sqrt(0.5 * 8 * 989e12 * 1308 / 120)
    )
    with pytest.raises(InputError, match="no price is known"):
        budget.train(20, [replace(fleet, hourly=None)])
    with pytest.raises(InputError, match="above 0"):
        budget.train(0, [fleet])


def test_models_that_can_be_fine_tuned() -> None:
    options = {
        option.name: option
        for option in budget.tune(hardware.of_gpus(hardware.load(), "a100-40gb", 32))
    }
    assert options["Llama 3.1 8B"].whole == 8 and options["Llama 3.1 8B"].adapter == 1
    assert options["Llama 3.3 70B"].whole is None and options["Llama 3.3 70B"].adapter is not None
    assert all((option.adapter or 99) <= (option.whole or 99) for option in options.values())
