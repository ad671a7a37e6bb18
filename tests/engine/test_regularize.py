"""L1, dropout and label smoothing follow their formulas, and act only where they should."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks
from helpers.objectives import BERT, ROWS, SPECIAL_TOKENS, T5, VOCAB
from torch import nn

from sevenfold.engine import optim
from sevenfold.engine.batch import IGNORE, micro_batches, to_batch
from sevenfold.engine.objectives import OBJECTIVES, Causal, attach_losses
from sevenfold.engine.step import evaluate, train_step
from sevenfold.errors import InputError
from sevenfold.model import attention, build
from sevenfold.recipe import Adapter, Optimizer, Recipe

CPU = torch.device("cpu")
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_l1_is_the_proximal_step_after_the_optimizers(name: Any) -> None:
    def state_after_step(l1: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"embed": nn.Embedding(4, 4), "norm": nn.LayerNorm(4), "linear": nn.Linear(4, 6)}
        )
        optimizers = optim.build(model, Optimizer(name=name, l1=l1, weight_decay=0.1))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.step()
        return model.state_dict()

    plain, shrunk = state_after_step(0.0), state_after_step(0.4)
    result = shrunk.pop("linear.weight")
    unshrunk = plain.pop("linear.weight")
    assert (
        torch.equal(result, unshrunk.sign() * (unshrunk.abs() - 0.5 * 0.4).clamp(min=0))
        and 0 < (result == 0).sum() < 24
    )
    # like weight decay, L1 does not apply to these
    assert all(torch.equal(shrunk[key], tensor) for key, tensor in plain.items())


def train_with_l1(tree: dict[str, Any]) -> tuple[list[float], float, float]:
    """Trains with L1; returns losses, reported sparsity, and the sparsity of the full tensors."""
    from helpers.training import ROWS as TRAINING_ROWS
    from helpers.training import rows_of, sharded_model

    recipe = Recipe.model_validate(tree)
    rank = torch.distributed.get_rank() // recipe.parallel.tensor
    world = torch.distributed.get_world_size() // recipe.parallel.tensor
    model, losses = sharded_model(recipe), []
    optimizers = optim.build(model, recipe.optimizer)
    for step in range(6):
        rows = rows_of(step).part(
            rank * TRAINING_ROWS // world, (rank + 1) * TRAINING_ROWS // world
        )
        batches = micro_batches(rows, 4, -(-TRAINING_ROWS // world // 4), to_batch, CPU)
        losses.append(
            train_step(model, batches, optimizers, 1e-2, 1.0, tensor=recipe.parallel.tensor).loss
        )
    full_weights = [
        parameter.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    ]
    zeros = sum(int((weight == 0).sum()) for weight in full_weights) / sum(
        weight.numel() for weight in full_weights
    )
    return losses, optim.sparsity(optimizers), zeros


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_l1_and_its_zeros_are_the_same_on_any_number_of_ranks(
    tree: dict[str, Any], tmp_path: Path, name: str
) -> None:
    tree["optimizer"] = {"name": name, "l1": 0.1}
    (single,) = run_ranks(1, tmp_path / "1", train_with_l1, tree)
    assert single[1] == pytest.approx(single[2]) and 0.01 < single[1] < 0.9
    layouts: list[dict[str, int]] = [{"replicate": 2}, {"tensor": 2}] if name == "adamw" else [{}]
    for i, layout in enumerate(layouts):
        changed_tree = tree | {"parallel": layout, "cluster": {"num_workers": 2}}
        for losses, sparsity, zeros in run_ranks(
            2, tmp_path / f"2-{i}", train_with_l1, changed_tree
        ):
            assert losses == pytest.approx(single[0], rel=1e-5) and sparsity == pytest.approx(zeros)
            # rounding moves some weights across the threshold
            assert sparsity == pytest.approx(single[1], abs=2e-3)


@pytest.mark.parametrize("chunk", [None, 10])
def test_an_adapter_of_the_output_layer_enters_the_loss(
    tree: dict[str, Any], chunk: int | None
) -> None:
    recipe = Recipe.model_validate(tree)
    model: Any = build.build(recipe, build.config_of(recipe, VOCAB), weights=True)
    adapter = Adapter(rank=2, target_modules=["lm_head"])
    build.with_adapter(model, recipe.model_copy(update={"adapter": adapter}))
    torch.nn.init.normal_(model.lm_head.lora_B["default"].weight)
    objective = Causal(SPECIAL_TOKENS, 0, 0.3, 3.0)
    batch = objective.collate(ROWS, 0)
    losses = attach_losses(model, objective, chunk)(batch)
    losses.sum().backward()
    logits = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits
    expected = F.cross_entropy(logits.mT, batch.labels, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(losses, expected, atol=1e-4)
    assert model.lm_head.lora_A["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("chunk", [None, 10])
def test_label_smoothing_only_changes_the_gradient(tree: dict[str, Any], chunk: int | None) -> None:
    recipe = Recipe.model_validate(tree)
    model: Any = build.build(recipe, build.config_of(recipe, VOCAB), weights=True)
    objective = Causal(SPECIAL_TOKENS, 0, 0.3, 3.0)
    batch = objective.collate(ROWS, 0)
    plain = attach_losses(model, objective)(batch)
    logits = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits.flatten(0, 1)
    F.cross_entropy(
        logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=0.2
    ).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = attach_losses(model, objective, chunk, 0.0, 0.2)(batch)
    losses.sum().backward()
    assert torch.allclose(losses, plain, atol=1e-5)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GPT2, {"attn_pdrop", "resid_pdrop", "embd_pdrop", "summary_first_dropout"}),
        (BERT, {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"}),
        (T5, {"dropout_rate", "classifier_dropout"}),
        ({"model_type": "llama"}, {"attention_dropout"}),
        (
            {"model_type": "bart"},
            {"dropout", "attention_dropout", "activation_dropout", "classifier_dropout"},
        ),
    ],
)
def test_dropout_sets_every_dropout_field_of_the_config(
    tree: dict[str, Any], config: dict[str, Any], names: set[str]
) -> None:
    tree["model"] = {"config": config}
    before = build.config_of(Recipe.model_validate(tree), VOCAB).to_dict()
    tree["train"]["dropout"] = 0.25
    after = build.config_of(Recipe.model_validate(tree), VOCAB).to_dict()
    assert {key for key in after if after[key] != before[key]} == names and all(
        after[key] == 0.25 for key in names
    )


def test_dropout_for_a_family_without_it_is_refused(tree: dict[str, Any]) -> None:
    tree["model"] = {"config": {"model_type": "mamba"}}
    tree["train"]["dropout"] = 0.1
    with pytest.raises(InputError, match=r"train\.dropout: mamba has no dropout"):
        build.config_of(Recipe.model_validate(tree), VOCAB)


def test_dropout_selects_an_attention_that_supports_it(tree: dict[str, Any]) -> None:
    cuda = torch.device("cuda")

    def chosen_attention(**train: Any) -> str:
        recipe = Recipe.model_validate(tree | {"train": tree["train"] | train})
        return build.choose_attention(recipe, cuda, build.config_of(recipe, VOCAB))

    assert (chosen_attention(), chosen_attention(dropout=0.0), chosen_attention(dropout=0.1)) == (
        "flex_attention",
        "flex_attention",
        "sdpa",
    )
    tree["model"]["attention"], tree["train"]["dropout"] = "flex_attention", 0.1
    with pytest.raises(InputError, match="flex_attention does not support attention dropout"):
        build.check_model(Recipe.model_validate(tree), VOCAB)


def dropout_effects(trees: list[dict[str, Any]]) -> list[tuple[bool, bool, bool]]:
    """How dropout acts on each recipe's model, with attention computed at once and in chunks.

    For each case: whether two forward passes differ in training with different seeds, in training
    with the same seed, and in validation.
    """
    return [
        _dropout_effect(Recipe.model_validate(tree), queries)
        for tree in trees
        for queries in (128, 16)
    ]


def _dropout_effect(recipe: Recipe, queries: int) -> tuple[bool, bool, bool]:
    attention.CHUNK = queries
    config = build.config_of(recipe, VOCAB)
    model: Any = build.build(
        recipe, config, weights=True, attention=build.choose_attention(recipe, CPU, config)
    )
    assert (model.config._attn_implementation == attention.NAME) == (recipe.objective != "denoise")
    objective = OBJECTIVES[recipe.objective](SPECIAL_TOKENS, 0, 0.3, 3.0)
    losses, batch = attach_losses(model, objective), objective.collate(ROWS, 0)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(losses(batch).sum())

    model.train()
    differs_with_same_seed = loss(0) != loss(0)
    first, second = (
        evaluate(model, [batch], torch.ones(VOCAB, dtype=torch.int64)) for _ in range(2)
    )
    # the evaluations leave the model in training mode
    return loss(0) != loss(1), differs_with_same_seed, first != second


def test_dropout_acts_only_in_training(tree: dict[str, Any], tmp_path: Path) -> None:
    llama = tree["model"]["config"]
    configs = {"causal": llama | {"initializer_range": 0.3}, "masked": BERT, "denoise": T5}
    trees = [tree | {"objective": k, "model": {"config": c}} for k, c in configs.items()] + [
        tree | {"model": {"config": GPT2}}
    ]
    with_dropout = [
        one_tree | {"train": one_tree["train"] | {"dropout": 0.2}} for one_tree in trees
    ]
    (effects,) = run_ranks(1, tmp_path / "store", dropout_effects, with_dropout + trees)
    # GPT-2's default config has dropout of its own
    assert (
        effects
        == [(True, False, False)] * 8 + [(False, False, False)] * 6 + [(True, False, False)] * 2
    )


def test_dropout_overrides_the_setting_of_a_base_model(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(tree)
    base = build.build(recipe, build.config_of(recipe, VOCAB), weights=True)
    base.config.attention_dropout = 0.125
    base.save_pretrained(tmp_path / "base")
    tree["model"], tree["tokenizer"] = {"path": str(tmp_path / "base")}, {}
    for setting, expected in ((None, 0.125), (0.0, 0.0), (0.3, 0.3)):
        tree["train"]["dropout"] = setting
        recipe = Recipe.model_validate(tree)
        model: Any = build.build(recipe, build.config_of(recipe, VOCAB), weights=True)
        assert (
            model.config.attention_dropout
            == expected
            == model.model.layers[0].self_attn.attention_dropout
        )
