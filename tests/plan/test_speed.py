"""Operations are counted exactly, and what a step takes follows from them; published rows are met."""

import sys
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import published

from sevenfold.errors import InputError
from sevenfold.plan import hardware, ops, shape, speed
from sevenfold.plan.layouts import Layout
from sevenfold.recipe import Recipe, parse

TABLE = hardware.load()
WIDTH, FFN, LAYERS, VOCABULARY, LENGTH = 128, 256, 5, 1000, 64
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
}  # fmt: skip
IN_BLOCKS = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
HEAD = WIDTH * VOCABULARY


def small(**train: Any) -> Recipe:
    return Recipe.model_validate({
        "name": "small", "data": {"sources": [{"path": "text"}], "sequence_length": LENGTH, "lanes": 64},
        "tokenizer": {"path": "none"}, "model": {"config": LLAMA},
        "train": {"steps": 100, "global_batch": 64, "micro_batch": 1, "dtype": "bfloat16"} | train,
    })  # fmt: skip


BERT = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
T5 = {"model_type": "t5", "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 5, "num_heads": 2}


def h100(gpus: int) -> hardware.Fleet:
    return hardware.of_gpus(TABLE, "h100-80gb", gpus)


@pytest.mark.parametrize(("how", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_products_and_attention_are_counted_to_the_flop(how: str, again: int) -> None:
    rows = 3
    tokens = rows * LENGTH
    found = ops.of(small(), VOCABULARY, rows, how)
    assert found.forward.products == 2 * tokens * IN_BLOCKS
    not_again = LAYERS * WIDTH * FFN  # a block's last product: nothing in its backward pass asks for what it gave
    assert found.backward.products == 2 * tokens * (2 * IN_BLOCKS + again * (IN_BLOCKS - not_again))
    assert found.rest_forward.products == 2 * tokens * HEAD
    assert found.rest_backward.products == 4 * tokens * HEAD
    attention = LAYERS * 2 * 2 * rows * LENGTH * LENGTH * WIDTH / 2  # two products, the causal half
    assert found.forward.attention == attention
    assert found.backward.attention == attention * (2.5 + again)


def test_what_is_computed_again_in_chunks_of_logits_counts() -> None:
    plain, parts = (ops.of(small(loss_chunk=chunk), VOCABULARY, 2, "none") for chunk in (None, 32))
    assert parts.rest_backward.products == plain.rest_backward.products + 2 * 2 * LENGTH * HEAD


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LLAMA, id="llama"),
        pytest.param(BERT, id="bert", marks=pytest.mark.slow),
        pytest.param(T5, id="t5", marks=pytest.mark.slow),
        pytest.param({"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2}, id="gpt2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("how", ["none", "full"])
def test_few_layers_and_rows_say_what_all_do(config: dict[str, Any], how: str) -> None:
    objective = {"bert": "masked", "t5": "denoise"}.get(config["model_type"], "causal")
    recipe = small().override({"model.config": config | {"vocab_size": VOCABULARY}, "objective": objective})
    found = ops.of(recipe, VOCABULARY, 4, how)
    depth = shape.depths(shape.build.config_of(recipe, VOCABULARY))
    forward, backward = ops._run(recipe, VOCABULARY, depth, 4, how)
    for said, real in ((found.forward + found.rest_forward, forward), (found.backward + found.rest_backward, backward)):
        assert real.products > 0
        assert said.products == pytest.approx(real.products, rel=1e-9)
        assert said.attention == pytest.approx(real.attention, rel=1e-9)
        assert said.bytes == pytest.approx(real.bytes, rel=0.02)
        assert said.kernels == pytest.approx(real.kernels, rel=0.02)


def test_mfu_is_the_meters() -> None:
    recipe, layout = small(), Layout(1)
    said = speed.estimate(recipe, VOCABULARY, layout, h100(1))
    size = speed.size(recipe, VOCABULARY)
    assert size.flops_per_token == 6 * (IN_BLOCKS + HEAD) + 12 * LAYERS * WIDTH * LENGTH
    assert said.mfu == pytest.approx(said.tokens * size.flops_per_token / 989e12)
    assert said.step == pytest.approx(recipe.tokens_per_step / said.tokens) == pytest.approx(sum(said.parts.values()))
    assert said.range[0] < said.tokens < said.range[1]


def big(*overrides: str) -> Recipe:
    return parse(str(ROOT / "jobs/recipes/llama-7b.yaml"), ["data.lanes=1024", *overrides])


def rate(recipe: Recipe, layout: Layout, fleet: hardware.Fleet | None = None) -> speed.Speed:
    return speed.estimate(recipe, 32_000, layout, fleet or h100(layout.gpus))


def test_what_a_layout_costs() -> None:
    recipe, full = big(), "full"
    whole = rate(recipe, Layout(64, micro_batch=2, activation_checkpointing=full))
    one = rate(recipe, Layout(8, micro_batch=2, activation_checkpointing=full))
    assert 0.8 * one.per_gpu < whole.per_gpu < one.per_gpu  # more GPUs: more in all, less each
    split = rate(recipe, Layout(64, tensor=8, micro_batch=2, activation_checkpointing=full))
    assert split.parts["communication"] > 2 * whole.parts["communication"] and split.tokens < whole.tokens
    slow = replace(h100(64), network=1e9)
    assert rate(recipe, Layout(64, micro_batch=2, activation_checkpointing=full), slow).tokens < 0.2 * whole.tokens
    # a network that is too slow to gather parameters by is not for a copy a node
    copies = rate(recipe, Layout(64, replicate=8, micro_batch=2, activation_checkpointing=full), slow)
    assert copies.tokens > 3 * rate(recipe, Layout(64, micro_batch=2, activation_checkpointing=full), slow).tokens
    assert rate(recipe, Layout(64, micro_batch=2), None).tokens > whole.tokens  # nothing is computed again


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_selective_checkpointing_makes_no_product_again(compiled: str) -> None:
    ways = ("none", "selective", "full")
    none, selective, full = (
        rate(big(f"train.compile={compiled}"), Layout(8, activation_checkpointing=how)).parts["products"] for how in ways
    )
    assert none == selective < full


def test_muon_takes_longer_than_adamw() -> None:
    adamw, muon = (rate(big(f"optimizer.name={n}"), Layout(8)).parts["optimizer"] for n in ("adamw", "muon"))
    assert muon > adamw > 0


def test_a_dtype_that_the_gpu_lacks_is_told() -> None:
    with pytest.raises(InputError, match="bfloat16: t4 has no fast products"):
        rate(big(), Layout(8), hardware.of_gpus(TABLE, "t4", 8))


PICKED = [
    r for r in published.ROWS
    if (r.source == published.TITAN and r.gpus == 128) or (r.source != published.TITAN and r.model.endswith(" 7B"))
]  # fmt: skip


@pytest.mark.parametrize("row", PICKED, ids=lambda r: f"{r.model}-{r.gpu}-{r.gpus}-{r.length}-{r.checkpointing}-{r.compiled}")
def test_published_rates_are_met(row: published.Row) -> None:
    assert published.predicted(row).per_gpu == pytest.approx(row.given, rel=0.15)
