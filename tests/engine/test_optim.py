"""Learning rate schedules and the parameter groups of the optimizers."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sevenfold.engine.optim import Muon, build, learning_rate
from sevenfold.recipe import Optimizer, Schedule


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5, 99: 1 / 90}),
        ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5}),
        ("wsd", {0: 0.1, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
    ],
)
def test_schedules_have_the_expected_rates(name: str, expected: dict[int, float]) -> None:
    schedule = Schedule(name=name, warmup_steps=10, decay_fraction=0.2)  # type: ignore[arg-type]
    assert {s: learning_rate(s, 100, 1.0, schedule) for s in expected} == pytest.approx(expected)
    with_floor = Schedule(name=name, warmup_steps=10, min_ratio=0.1)  # type: ignore[arg-type]
    rates = [learning_rate(s, 100, 2.0, with_floor) for s in range(10, 100)]
    assert rates == sorted(rates, reverse=True) and max(rates) == 2.0 and min(rates) >= 0.2


def test_wsd_that_decays_from_the_warmup_on_does_not_jump() -> None:
    schedule = Schedule(name="wsd", warmup_steps=10, decay_fraction=1.0)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(100)]
    assert rates[9] == rates[10] == 1.0
    assert max(abs(a - b) for a, b in pairwise(rates[9:])) < 0.012


def test_weight_decay_spares_norms_and_embeddings() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(4, 4), "norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)}
    )
    model["linear"].bias.requires_grad = False
    (optimizer,) = build(model, Optimizer(weight_decay=0.3))
    groups = optimizer.param_groups
    by_decay = {g["weight_decay"]: {id(p) for p in g["params"]} for g in groups}
    assert by_decay[0.3] == {id(model["linear"].weight)}
    assert by_decay[0.0] == {
        id(model["embed"].weight),
        id(model["norm"].weight),
        id(model["norm"].bias),
    }


@pytest.mark.parametrize("shape", [(8, 64, 32), (4, 32, 64), (1, 48, 48)])
def test_muon_makes_each_expert_orthogonal(shape: tuple[int, ...]) -> None:
    """Experts that are kept as one tensor are updated as separate matrices are."""
    torch.manual_seed(0)
    together = nn.Parameter(torch.zeros(shape))
    alone = [nn.Parameter(torch.zeros(shape[1:])) for _ in range(shape[0])]
    together.grad = torch.randn(shape)
    for p, grad in zip(alone, together.grad, strict=True):
        p.grad = grad.clone()
    Muon([together], 0.1, 0.0, 0.9).step()
    Muon(alone, 0.1, 0.0, 0.9).step()
    expected = torch.stack([p.detach() for p in alone])
    assert torch.allclose(together.detach(), expected, atol=1e-6)
    update = together.detach() / (0.1 * 0.2 * max(shape[1:]) ** 0.5)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5 and values.max() < 1.3


def test_kernels_are_no_matrices() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3, groups=8), "linear": nn.Linear(8, 8)})
    adamw, muon = build(model, Optimizer(name="muon", weight_decay=0.1))
    assert isinstance(muon, Muon) and muon.param_groups[0]["params"] == [model["linear"].weight]
    decayed = [p for g in adamw.param_groups if g["weight_decay"] for p in g["params"]]
    assert decayed == [model["conv"].weight]
