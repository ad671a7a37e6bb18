"""Learning rate schedules and the parameter groups of the optimizers."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

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


def test_muon_leaves_routers_and_classifiers_heads_to_adamw() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    shared = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, num_experts=4, moe_intermediate_size=8, decoder_sparse_step=1)
    )
    classifier = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=3))
    expected = {
        experts: {"lm_head.weight", "model.layers.0.mlp.gate.weight"},
        shared: {
            "lm_head.weight",
            "model.layers.0.mlp.gate.weight",
            "model.layers.0.mlp.shared_expert_gate.weight",
        },
        classifier: {"score.weight"},
    }
    for model, names in expected.items():
        adamw, muon = build(model, Optimizer(name="muon", weight_decay=0.1))
        by_id = {id(p): name for name, p in model.named_parameters()}
        decayed = adamw.param_groups[0]
        assert decayed["weight_decay"] and {by_id[id(p)] for p in decayed["params"]} == names
        matrices = {by_id[id(p)] for p in muon.param_groups[0]["params"]}
        assert "model.layers.0.self_attn.q_proj.weight" in matrices and not matrices & names


def test_mambas_decay_rates_are_not_decayed() -> None:
    model = MambaForCausalLM(
        MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=64)
    )
    (adamw,) = build(model, Optimizer(weight_decay=0.1))
    spared = {id(p) for p in adamw.param_groups[1]["params"]}
    assert adamw.param_groups[1]["weight_decay"] == 0
    rates = [p for name, p in model.named_parameters() if name.endswith("A_log")]
    assert rates and all(p.ndim == 2 and id(p) in spared for p in rates)
