"""Operations are counted exactly, step times follow from them, and published rates are met."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers.plans import FFN, LAYERS, LENGTH, LLAMA, TABLE, VOCABULARY, WIDTH, h100, small_recipe
from transformers import AutoConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
import published

from sevenfold.errors import InputError
from sevenfold.plan import hardware, ops, shape, speed
from sevenfold.plan.layouts import Layout
from sevenfold.recipe import Recipe, parse

BLOCK_PARAMETERS = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
HEAD_PARAMETERS = WIDTH * VOCABULARY


BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_layers": 3,
    "num_decoder_layers": 5,
    "num_heads": 2,
}


@pytest.mark.parametrize(("how", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_matmuls_and_attention_are_counted_to_the_flop(how: str, again: int) -> None:
    rows = 3
    tokens = rows * LENGTH
    counted = ops.count_operations(small_recipe(), VOCABULARY, rows, how)
    assert counted.forward.matmul == 2 * tokens * BLOCK_PARAMETERS
    # the last matmul of a block is not recomputed: the backward pass does not need its output
    last_matmuls = LAYERS * WIDTH * FFN
    assert counted.backward.matmul == 2 * tokens * (
        2 * BLOCK_PARAMETERS + again * (BLOCK_PARAMETERS - last_matmuls)
    )
    assert counted.rest_forward.matmul == 2 * tokens * HEAD_PARAMETERS
    assert counted.rest_backward.matmul == 4 * tokens * HEAD_PARAMETERS
    attention = LAYERS * 2 * 2 * rows * LENGTH * LENGTH * WIDTH / 2  # two matmuls, the causal half
    assert counted.forward.attention == attention
    assert counted.backward.attention == attention * (2.5 + again)


def test_recomputed_chunks_of_logits_are_counted() -> None:
    unchunked, chunked = (
        ops.count_operations(small_recipe(loss_chunk=chunk), VOCABULARY, 2, "none")
        for chunk in (None, 32)
    )
    assert (
        chunked.rest_backward.matmul
        == unchunked.rest_backward.matmul + 2 * 2 * LENGTH * HEAD_PARAMETERS
    )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LLAMA, id="llama"),
        pytest.param(BERT, id="bert", marks=pytest.mark.slow),
        pytest.param(T5, id="t5", marks=pytest.mark.slow),
        pytest.param(
            {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2},
            id="gpt2",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("how", ["none", "full"])
def test_few_layers_and_rows_predict_the_full_model(config: dict[str, Any], how: str) -> None:
    objective = {"bert": "masked", "t5": "denoise"}.get(config["model_type"], "causal")
    recipe = small_recipe().override(
        {"model.config": config | {"vocab_size": VOCABULARY}, "objective": objective}
    )
    estimated = ops.count_operations(recipe, VOCABULARY, 4, how)
    depth = shape.depths(shape.build.config_of(recipe, VOCABULARY))
    forward, backward = ops._run(recipe, VOCABULARY, depth, 4, how)
    for predicted, counted in (
        (estimated.forward + estimated.rest_forward, forward),
        (estimated.backward + estimated.rest_backward, backward),
    ):
        assert counted.matmul > 0
        assert predicted.matmul == pytest.approx(counted.matmul, rel=1e-9)
        assert predicted.attention == pytest.approx(counted.attention, rel=1e-9)
        assert predicted.bytes == pytest.approx(counted.bytes, rel=0.02)
        assert predicted.kernels == pytest.approx(counted.kernels, rel=0.02)


def test_the_predicted_mfu_is_defined_as_in_the_meter() -> None:
    recipe, layout = small_recipe(), Layout(1)
    predicted = speed.estimate(recipe, VOCABULARY, layout, h100(1))
    size = speed.size(recipe, VOCABULARY)
    assert (
        size.flops_per_token
        == 6 * (BLOCK_PARAMETERS + HEAD_PARAMETERS) + 12 * LAYERS * WIDTH * LENGTH
    )
    assert predicted.mfu == pytest.approx(predicted.tokens * size.flops_per_token / 989e12)
    assert (
        predicted.step
        == pytest.approx(recipe.tokens_per_step / predicted.tokens)
        == pytest.approx(sum(predicted.parts.values()))
    )
    assert predicted.range[0] < predicted.tokens < predicted.range[1]


def llama_7b(*overrides: str) -> Recipe:
    return parse(str(ROOT / "jobs/recipes/llama-7b.yaml"), ["data.lanes=1024", *overrides])


def predicted_speed(
    recipe: Recipe, layout: Layout, fleet: hardware.Fleet | None = None
) -> speed.Speed:
    return speed.estimate(recipe, 32_000, layout, fleet or h100(layout.gpus))


def test_the_costs_of_layouts_are_ordered() -> None:
    recipe, checkpointing = llama_7b(), "full"
    large = predicted_speed(
        recipe, Layout(64, micro_batch=2, activation_checkpointing=checkpointing)
    )
    small = predicted_speed(
        recipe, Layout(8, micro_batch=2, activation_checkpointing=checkpointing)
    )
    # more GPUs: more in total, less per GPU
    assert 0.8 * small.per_gpu < large.per_gpu < small.per_gpu
    tensor_parallel = predicted_speed(
        recipe, Layout(64, tensor=8, micro_batch=2, activation_checkpointing=checkpointing)
    )
    assert (
        tensor_parallel.parts["communication"] > 2 * large.parts["communication"]
        and tensor_parallel.tokens < large.tokens
    )
    slow = replace(h100(64), network=1e9)
    assert (
        predicted_speed(
            recipe, Layout(64, micro_batch=2, activation_checkpointing=checkpointing), slow
        ).tokens
        < 0.2 * large.tokens
    )
    # with a network too slow to gather parameters, one replica per node is much faster
    replicated = predicted_speed(
        recipe, Layout(64, replicate=8, micro_batch=2, activation_checkpointing=checkpointing), slow
    )
    assert (
        replicated.tokens
        > 3
        * predicted_speed(
            recipe, Layout(64, micro_batch=2, activation_checkpointing=checkpointing), slow
        ).tokens
    )
    # nothing is recomputed
    assert predicted_speed(recipe, Layout(64, micro_batch=2), None).tokens > large.tokens


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_selective_checkpointing_recomputes_no_matmul(compiled: str) -> None:
    ways = ("none", "selective", "full")
    none, selective, full = (
        predicted_speed(
            llama_7b(f"train.compile={compiled}"), Layout(8, activation_checkpointing=how)
        ).parts["products"]
        for how in ways
    )
    assert none == selective < full


def test_muon_takes_longer_than_adamw() -> None:
    adamw, muon = (
        predicted_speed(llama_7b(f"optimizer.name={name}"), Layout(8)).parts["optimizer"]
        for name in ("adamw", "muon")
    )
    assert muon > adamw > 0


def test_a_dtype_that_the_gpu_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="bfloat16: t4 has no fast matmuls"):
        predicted_speed(llama_7b(), Layout(8), hardware.of_gpus(TABLE, "t4", 8))


CHECKED_ROWS = [
    r
    for r in published.ROWS
    if (r.source == published.TITAN and r.gpus == 128)
    or (r.source != published.TITAN and r.model.endswith(" 7B"))
]


@pytest.mark.parametrize(
    "row",
    CHECKED_ROWS,
    ids=lambda r: f"{r.model}-{r.gpu}-{r.gpus}-{r.length}-{r.checkpointing}-{r.compiled}",
)
def test_published_rates_are_met(row: published.Row) -> None:
    assert published.predicted(row).per_gpu == pytest.approx(row.given, rel=0.15)


@pytest.mark.parametrize("how", ["none", "full"])
def test_a_classifying_decoder_is_counted(how: str) -> None:
    tree = small_recipe().model_dump(mode="json") | {"objective": "classify"}
    tree["data"]["classes"] = ["a", "b"]
    counted = ops.count_operations(Recipe.model_validate(tree), VOCABULARY, 2, how)
    assert counted.forward.matmul > 0 and counted.backward.matmul > 0


@pytest.mark.parametrize("how", ["none", "full"])
def test_an_adapter_is_counted(how: str, tmp_path: Path) -> None:
    AutoConfig.for_model(**LLAMA).save_pretrained(tmp_path)
    recipe = small_recipe().model_dump(mode="json")
    recipe |= {"model": {"path": str(tmp_path)}, "adapter": {"rank": 4}}
    counted = ops.count_operations(Recipe.model_validate(recipe), VOCABULARY, 2, how)
    assert counted.forward.matmul > 0 and counted.backward.matmul > 0
