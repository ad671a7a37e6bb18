"""Every scheduler brings every sweep to its end, and stops no trial before its grace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from helpers.simulated_tune import Curve, Simulation

from sevenfold.recipe import Sweep

STEPS, EVERY = 18, 2
SCHEDULERS = ("asha", "hyperband", "bohb", "median", "pbt", "none")


def sweep(scheduler: str, **changes: Any) -> Sweep:
    space = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}}
    algorithm = "tpe" if scheduler == "bohb" else "random"
    tree = {"trials": 9, "space": space, "scheduler": scheduler, "algorithm": algorithm}
    return Sweep.model_validate(tree | changes)


# How a metric goes with the steps; each trial has a level of its own.
CURVES: dict[str, Callable[[random.Random, float, int], float]] = {
    "better": lambda r, level, step: level + 1 / (step + 1),
    "worse": lambda r, level, step: level + step,
    "equal": lambda r, level, step: 1.0,
    "noise": lambda r, level, step: r.random(),
    "sometimes not a number": lambda r, level, step: r.choice([r.random(), math.nan, math.inf]),
    "never a number": lambda r, level, step: math.nan,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", CURVES)
def test_every_sweep_ends(scheduler: str, kind: str) -> None:
    for seed in range(24):
        r = random.Random(seed)
        trials, concurrent = r.choice([1, 2, 3, 4, 9, 13]), r.choice([1, 2, 3, 16])
        grace, eta, quantile = (
            r.choice([0.1, 0.2, 0.5, 1.0]),
            r.choice([2, 3, 4]),
            r.choice([0.25, 0.5]),
        )
        settings = sweep(scheduler, grace=grace, eta=eta, quantile=quantile, trials=trials)
        curves = [partial(CURVES[kind], r, r.random()) for _ in range(trials)]
        fails = r.choice([0.0, 0.0, 0.05])
        simulation = Simulation(settings, curves, STEPS, EVERY, concurrent, seed, fails)
        every_report = trials * math.ceil(STEPS / EVERY)
        simulation.run(max_reports=every_report)
        first_stop = math.ceil(grace * STEPS)
        for trial in simulation.trials:
            stopped = trial.status == "TERMINATED" and simulation.steps[trial.trial_id] < STEPS
            if stopped:
                assert scheduler not in ("pbt", "none"), seed
                assert simulation.steps[trial.trial_id] >= first_stop, (seed, grace, eta)


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "bohb", "median"])
def test_bad_trials_are_stopped_and_the_best_one_is_not(scheduler: str) -> None:
    values = random.Random(3).sample(range(9), 9)
    curves: list[Curve] = [lambda step, a=a: a + 1 / step for a in values]
    simulation = Simulation(sweep(scheduler), curves, STEPS, EVERY, 3, 3)
    simulation.run(9 * 9)
    best = simulation.trials[values.index(0)].trial_id
    assert simulation.steps[best] == STEPS
    assert sum(simulation.steps.values()) < 9 * STEPS


def test_a_trial_of_a_population_takes_over_a_better_one() -> None:
    curves: list[Curve] = [lambda step, a=a: a + 1 / step for a in range(4)]
    replaced = 0
    for seed in range(10):
        simulation = Simulation(sweep("pbt", trials=4), curves, STEPS, EVERY, 2, seed)
        simulation.run(40)
        replaced += simulation.scheduler._num_perturbations > 0
        assert set(simulation.steps.values()) == {STEPS}
    assert replaced > 5


@pytest.mark.parametrize("values", [(0, 1), (1, 0)])
def test_the_worse_of_two_takes_turns_with_the_better_one(values: tuple[int, int]) -> None:
    """One trial at a time: the worse one is never always the first to report."""
    curves: list[Curve] = [lambda step, a=a: a + 1 / step for a in values]
    for seed in range(20):
        settings = sweep("pbt", trials=2, quantile=0.5, grace=0.1)
        simulation = Simulation(settings, curves, 20, 4, 1, seed)
        simulation.run(10)
        assert simulation.scheduler._num_perturbations > 0, seed
