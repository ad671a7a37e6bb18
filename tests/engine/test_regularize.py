"""L1, dropout, label smoothing: each does what its formula says, where it should, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks
from test_objectives import BERT, ROWS, T5, VOCAB, WORDS
from torch import nn

from sevenfold.engine import optim, tuning
from sevenfold.engine.batch import IGNORE, micro_batches, to_batch
from sevenfold.engine.objectives import Causal, attach
from sevenfold.engine.step import evaluate, train_step
from sevenfold.errors import InputError
from sevenfold.model import attention, build
from sevenfold.recipe import Optimizer, Recipe

CPU = torch.device("cpu")
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_l1_is_the_proximal_step_after_the_optimizers(name: Any) -> None:
    def stepped(l1: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "norm": nn.LayerNorm(4), "linear": nn.Linear(4, 6)})
        optimizers = optim.build(model, Optimizer(name=name, l1=l1, weight_decay=0.1))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.step()
        return model.state_dict()

    plain, drawn = stepped(0.0), stepped(0.4)
    found = drawn.pop("linear.weight")
    before = plain.pop("linear.weight")
    assert torch.equal(found, before.sign() * (before.abs() - 0.5 * 0.4).clamp(min=0)) and 0 < (found == 0).sum() < 24
    assert all(torch.equal(drawn[k], v) for k, v in plain.items())  # as weight decay, not on these


def drawn(tree: dict[str, Any]) -> tuple[list[float], float, float]:
    """Losses, the sparsity, and the same by whole tensors."""
    from test_step import ROWS as MANY
    from test_step import rows_of, sharded

    recipe = Recipe.model_validate(tree)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size() // recipe.parallel.tensor
    rank //= recipe.parallel.tensor
    model, losses = sharded(recipe), []
    optimizers = optim.build(model, recipe.optimizer)
    for step in range(6):
        mine = rows_of(step).part(rank * MANY // world, (rank + 1) * MANY // world)
        batches = micro_batches(mine, 4, -(-MANY // world // 4), to_batch, CPU)
        losses.append(train_step(model, batches, optimizers, 1e-2, 1.0, recipe.parallel.tensor).loss)
    whole = [p.full_tensor() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    zeros = sum(int((w == 0).sum()) for w in whole) / sum(w.numel() for w in whole)
    return losses, optim.sparsity(optimizers), zeros


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_l1_and_its_zeros_are_the_same_on_any_number_of_ranks(tree: dict[str, Any], tmp_path: Path, name: str) -> None:
    tree["optimizer"] = {"name": name, "l1": 0.1}
    (one,) = run_ranks(1, tmp_path / "1", drawn, tree)
    assert one[1] == pytest.approx(one[2]) and 0.01 < one[1] < 0.9
    layouts: list[dict[str, int]] = [{"replicate": 2}, {"tensor": 2}] if name == "adamw" else [{}]
    for i, layout in enumerate(layouts):
        more = tree | {"parallel": layout, "cluster": {"num_workers": 2}}
        for losses, sparsity, zeros in run_ranks(2, tmp_path / f"2-{i}", drawn, more):
            assert losses == pytest.approx(one[0], rel=1e-5) and sparsity == pytest.approx(zeros)
            assert sparsity == pytest.approx(one[1], abs=2e-3)  # rounding moves some across the edge


@pytest.mark.parametrize("chunk", [None, 10])
def test_label_smoothing_is_in_the_gradient_alone(tree: dict[str, Any], chunk: int | None) -> None:
    recipe = Recipe.model_validate(tree)
    model: Any = build.build(recipe, build.config_of(recipe, VOCAB), weights=True)
    objective = Causal(WORDS, 0, 0.3, 3.0)
    batch = objective.collate(ROWS, 0)
    plain = attach(model, objective)(batch)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.flatten(0, 1)
    F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=0.2).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = attach(model, objective, chunk, 0.0, 0.2)(batch)
    losses.sum().backward()
    assert torch.allclose(losses, plain, atol=1e-5)
    for p, g in zip(model.parameters(), wanted, strict=True):
        assert (p.grad - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GPT2, {"attn_pdrop", "resid_pdrop", "embd_pdrop", "summary_first_dropout"}),
        (BERT, {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"}),
        (T5, {"dropout_rate", "classifier_dropout"}),
        ({"model_type": "llama"}, {"attention_dropout"}),
        ({"model_type": "bart"}, {"dropout", "attention_dropout", "activation_dropout", "classifier_dropout"}),
    ],
)
def test_dropout_is_put_into_every_field_that_the_family_has(
    tree: dict[str, Any], config: dict[str, Any], names: set[str]
) -> None:
    tree["model"] = {"config": config}
    as_it_was = build.config_of(Recipe.model_validate(tree), VOCAB).to_dict()
    tree["train"]["dropout"] = 0.25
    made = build.config_of(Recipe.model_validate(tree), VOCAB).to_dict()
    assert {k for k in made if made[k] != as_it_was[k]} == names and all(made[k] == 0.25 for k in names)


def test_a_family_without_dropout_says_so(tree: dict[str, Any]) -> None:
    tree["model"] = {"config": {"model_type": "mamba"}}
    tree["train"]["dropout"] = 0.1
    with pytest.raises(InputError, match=r"train\.dropout: mamba has no dropout"):
        build.config_of(Recipe.model_validate(tree), VOCAB)


def test_attention_with_dropout_goes_where_there_is_one(tree: dict[str, Any]) -> None:
    cuda = torch.device("cuda")

    def chosen(**train: Any) -> str:
        recipe = Recipe.model_validate(tree | {"train": tree["train"] | train})
        return build.attention(recipe, cuda, build.config_of(recipe, VOCAB))

    assert (chosen(), chosen(dropout=0.0), chosen(dropout=0.1)) == ("flex_attention", "flex_attention", "sdpa")
    tree["model"]["attention"], tree["train"]["dropout"] = "flex_attention", 0.1
    with pytest.raises(InputError, match="flex_attention: it has no dropout"):
        build.check(Recipe.model_validate(tree), VOCAB)


def acting(trees: list[dict[str, Any]]) -> list[tuple[bool, bool, bool]]:
    """Of each recipe's model, its queries attended to whole and in chunks: whether two forward passes differ in training, in
    training where they are seeded alike, and in validation."""
    return [_acting(Recipe.model_validate(tree), queries) for tree in trees for queries in (128, 16)]


def _acting(recipe: Recipe, queries: int) -> tuple[bool, bool, bool]:
    attention.CHUNK = queries
    config = build.config_of(recipe, VOCAB)
    model: Any = build.build(recipe, config, weights=True, attention=build.attention(recipe, CPU, config))
    assert (model.config._attn_implementation == attention.NAME) == (recipe.objective != "denoise")
    objective = tuning.OBJECTIVES[recipe.objective](WORDS, 0, 0.3, 3.0)
    losses, batch = attach(model, objective), objective.collate(ROWS, 0)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(losses(batch).sum())

    model.train()
    alike = loss(0) != loss(0)
    first, second = (evaluate(model, [batch], torch.ones(VOCAB, dtype=torch.int64)) for _ in range(2))
    return loss(0) != loss(1), alike, first != second  # training goes on as before


def test_dropout_acts_in_training_alone(tree: dict[str, Any], tmp_path: Path) -> None:
    llama = tree["model"]["config"]
    kinds = {"causal": llama | {"initializer_range": 0.3}, "masked": BERT, "denoise": T5}
    trees = [tree | {"objective": k, "model": {"config": c}} for k, c in kinds.items()] + [tree | {"model": {"config": GPT2}}]
    dropped = [t | {"train": t["train"] | {"dropout": 0.2}} for t in trees]
    (found,) = run_ranks(1, tmp_path / "store", acting, dropped + trees)
    assert found == [(True, False, False)] * 8 + [(False, False, False)] * 6 + [(True, False, False)] * 2  # GPT-2's own


def test_a_base_is_given_the_dropout_and_keeps_its_own_else(tree: dict[str, Any], tmp_path: Path) -> None:
    base = build.build(first := Recipe.model_validate(tree), build.config_of(first, VOCAB), weights=True)
    base.config.attention_dropout = 0.125
    base.save_pretrained(tmp_path / "base")
    tree["model"], tree["tokenizer"] = {"path": str(tmp_path / "base")}, {}
    for wanted, found in ((None, 0.125), (0.0, 0.0), (0.3, 0.3)):
        tree["train"]["dropout"] = wanted
        recipe = Recipe.model_validate(tree)
        model: Any = build.build(recipe, build.config_of(recipe, VOCAB), weights=True)
        assert model.config.attention_dropout == found == model.model.layers[0].self_attn.attention_dropout
