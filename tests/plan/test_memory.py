"""Memory of a plan: counted parts against real workers', lines against whole traces, each family and layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

from sevenfold.errors import InputError
from sevenfold.plan import memory, shape
from sevenfold.plan.layouts import Layout, layouts
from sevenfold.plan.memory import Shards
from sevenfold.plan.trace import Held, Job, traces
from sevenfold.recipe import Adapter, Parallel, Recipe

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 515, "tie_word_embeddings": False,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4,
    "vocab_size": 515,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 5, "num_decoder_layers": 2, "num_heads": 4,
    "vocab_size": 515, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def recipe_of(
    config: dict[str, Any],
    objective: str = "causal",
    optimizer: str = "adamw",
    lanes: int = 64,
    length: int = 128,
    **train: Any,
) -> Recipe:
    data = {"sources": [{"path": "x"}], "sequence_length": length, "lanes": lanes}
    return Recipe.model_validate(
        {
            "name": "plan", "objective": objective, "data": data, "tokenizer": {"path": "x"}, "model": {"config": config},
            "optimizer": {"name": optimizer},
            "train": {"global_batch": 64, "micro_batch": 1, "steps": 1, "dtype": "bfloat16", **train},
        }
    )  # fmt: skip


def fed(recipe: Recipe, layout: Layout) -> Recipe:
    """With one micro-batch a step."""
    rows = layout.readers * layout.micro_batch
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch": rows})})


slow = pytest.mark.slow  # what is the same way once more


def whole(recipe: Recipe, layout: Layout, compiled: bool = False) -> float:
    """Bytes allocated, by a trace of all blocks, rows and ranks; AdamW."""
    size = shape.vocabulary(recipe)
    train = recipe.train.model_copy(
        update={"micro_batch": layout.micro_batch, "activation_checkpointing": memory.kept(recipe, layout)}
    )
    laid = Parallel(replicate=layout.replicate, tensor=layout.tensor)
    depths = tuple(shape.depths(shape.build.config_of(recipe, size)).items())
    job = Job(
        recipe.model_copy(update={"train": train, "parallel": laid}), size, depths, layout.gpus,
        min(2, memory.micro_batches(recipe, layout)), compiled=compiled,
    )  # fmt: skip
    (phases,) = traces([job])
    shards = Shards.of(recipe, size, layout.shard, layout.tensor)
    return max(held.total for held in phases.values()) + shards.optimizer


# Counted


def really_held(tree: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, gradients and optimizer states after a step."""
    from test_step import LENGTH, ROWS, rows_of

    from sevenfold.engine import optim
    from sevenfold.engine.batch import micro_batches, to_batch
    from sevenfold.engine.objectives import Causal, Words, attach
    from sevenfold.model import build, parallel

    assert LENGTH == 64
    recipe = Recipe.model_validate(tree)
    model: Any = build.build(recipe, build.config_of(recipe, 515), weights=torch.distributed.get_rank() == 0)
    attach(model, Causal(Words(515), 0, 0.15, 3))
    parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
    optimizers = optim.build(model, recipe.optimizer)
    (batch,) = micro_batches(rows_of(0), ROWS, 1, to_batch, torch.device("cpu"))
    model.token_losses(batch).mean().backward()
    gradients = [p.grad for p in model.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    held = list(model.parameters()), gradients, states
    return tuple(sum(_local(t).numel() * t.element_size() for t in ts) for ts in held)  # type: ignore[return-value]


def _local(t: Any) -> torch.Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ({"tensor": 2}, "adamw"),
        ({}, "muon"),
        pytest.param({}, "adamw", marks=slow),
        pytest.param({"replicate": 2}, "adamw", marks=slow),
    ],
)
def test_shards_are_counted_to_the_byte(tmp_path: Path, layout: dict[str, int], optimizer: str) -> None:
    recipe = recipe_of(LLAMA, optimizer=optimizer, dtype="float32")
    tree = recipe.model_dump(mode="json") | {"parallel": layout, "cluster": {"num_workers": 2}}
    first, second = run_ranks(2, tmp_path / "store", really_held, tree)
    way = Layout(2, **layout)
    counted = Shards.of(recipe, 515, way.shard, way.tensor)
    assert (counted.parameters, counted.gradients, counted.optimizer) == first
    assert sum(second) <= sum(first)


def peak_of_a_step(tree: dict[str, Any], rows: int) -> int:
    """Bytes that torch's allocator gave out and had not back, at most, in a second step, over what there was before it."""
    from sevenfold.engine import optim
    from sevenfold.engine.objectives import Causal, Words, attach
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel

    recipe = Recipe.model_validate(tree)
    model: Any = build.build(recipe, build.config_of(recipe, 515), weights=torch.distributed.get_rank() == 0)
    attach(model, Causal(Words(515), 0, 0.15, 3))
    parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
    optimizers = optim.build(model, recipe.optimizer)
    train = recipe.train.model_copy(update={"micro_batch": rows})
    batch = shape.batch_of(recipe.model_copy(update={"train": train}))
    train_step(model, [batch], optimizers, 1e-3, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_step(model, [batch], optimizers, 1e-3, 1.0)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@slow
@pytest.mark.parametrize("checkpointing", ["full", "none", "selective"])
def test_a_real_step_allocates_what_the_trace_says(tmp_path: Path, checkpointing: str) -> None:
    recipe = recipe_of(LLAMA, dtype="float32", activation_checkpointing=checkpointing, lanes=2, global_batch=8)
    tree = recipe.model_dump(mode="json") | {"cluster": {"num_workers": 2}}
    layout = Layout(2, micro_batch=4, activation_checkpointing=checkpointing)
    found = max(run_ranks(2, tmp_path / "store", peak_of_a_step, tree, 4))
    plan = memory.measured(recipe, layout, device="cpu")
    assert plan.allocated - plan.parameters - plan.optimizer == pytest.approx(found, rel=0.1)


# Lines


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("full", marks=slow), pytest.param("selective", marks=slow)])
def test_few_blocks_rows_and_ranks_stand_for_all(checkpointing: str) -> None:
    layout = Layout(16, micro_batch=4, activation_checkpointing=checkpointing)
    recipe = fed(recipe_of(LLAMA), layout)
    assert memory.measured(recipe, layout).allocated == pytest.approx(whole(recipe, layout), rel=0.03)


@pytest.mark.parametrize(
    "layout", [Layout(8, replicate=2), Layout(8, tensor=2), pytest.param(Layout(8, replicate=2, tensor=2), marks=slow)]
)
def test_copies_and_tensor_parallelism(layout: Layout) -> None:
    recipe = fed(recipe_of(LLAMA), layout)
    assert memory.measured(recipe, layout).allocated == pytest.approx(whole(recipe, layout), rel=0.03)


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (BERT, "masked"),
        (T5, "denoise"),
        pytest.param(BERT, "embed", marks=slow),
        pytest.param(BERT, "classify", marks=slow),
        pytest.param(T5, "seq2seq", marks=slow),
    ],
)
def test_the_other_families(config: dict[str, Any], objective: str) -> None:
    tree = recipe_of(config).model_dump(mode="json") | {"objective": objective}
    tree["data"] |= {"packing": "best_fit", "classes": ["a", "b"] if objective == "classify" else []}
    layout = Layout(4, micro_batch=1)
    recipe = fed(Recipe.model_validate(tree), layout)
    assert memory.measured(recipe, layout).allocated == pytest.approx(whole(recipe, layout), rel=0.03)


def test_of_an_adapter_alone_there_are_gradients_and_states() -> None:
    recipe = recipe_of(LLAMA).model_copy(update={"adapter": Adapter(rank=4)})
    plain, shards = Shards.of(recipe_of(LLAMA), 515, 4, 1), Shards.of(recipe, 515, 4, 1)
    extra = shards.parameters - plain.parameters  # the adapter's own
    assert shards.gradients == extra > 0 and 2 * extra < shards.optimizer < 2.2 * extra
    layout = Layout(4)
    recipe = fed(recipe, layout)
    held = memory.measured(recipe, layout)
    assert held.optimizer == shards.optimizer
    assert held.allocated == pytest.approx(whole(recipe, layout), rel=0.03)


def test_micro_batches_keep_gradients_whole_until_the_last() -> None:
    config = LLAMA | {"num_hidden_layers": 2}
    one, two, many = (memory.measured(recipe_of(config, global_batch=n * 16, lanes=16), Layout(16)) for n in (1, 2, 5))
    everything = 4 * sum(memory.elements(p, 1, 1) for p in shape.parameters(recipe_of(config), 515))
    assert two == many and two.gradients > 0.9 * everything > 4 * one.gradients


def test_compiled_blocks_keep_less_than_eager_ones() -> None:
    plain, config = Layout(4, micro_batch=8), LLAMA | {"num_hidden_layers": 4}
    eager, compiled = (memory.measured(fed(recipe_of(config, compile=c), plain), plain) for c in (False, True))
    ways = [replace(plain, activation_checkpointing=how) for how in ("full", "selective")]
    full, selective = (memory.measured(fed(recipe_of(config, compile=True), plain), way) for way in ways)
    assert full.allocated < selective.allocated < compiled.allocated < eager.allocated


def test_logits_are_told_apart_and_chunks_spare_them() -> None:
    config, layout = LLAMA | {"vocab_size": 40000, "num_hidden_layers": 2}, Layout(4, micro_batch=8)
    held, chunked = (memory.measured(fed(recipe_of(config, loss_chunk=c), layout), layout) for c in (None, 64))
    assert held.logits == 3 * 4 * 8 * 128 * 40000  # float32 logits, their log softmax, their gradient
    assert chunked.logits < held.logits / 8 and chunked.activations < held.total


# The closed form


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        (recipe_of(LLAMA, length=512), Layout(8, 1, 1, 8, "full")),
        (recipe_of(BERT, "masked", length=512), Layout(8, 1, 1, 8)),
        pytest.param(recipe_of(LLAMA, length=512), Layout(8, micro_batch=2), marks=slow),
        pytest.param(recipe_of(LLAMA, length=512), Layout(8, 1, 1, 4, "selective"), marks=slow),
        pytest.param(recipe_of(LLAMA, length=512, compile=True), Layout(8, 1, 1, 4), marks=slow),
        pytest.param(recipe_of(LLAMA, length=512), Layout(8, 2, 1, 8), marks=slow),
    ],
)  # fmt: skip
def test_the_closed_form_is_near(recipe: Recipe, layout: Layout) -> None:
    closed, traced = memory.closed_form(recipe, layout), memory.measured(recipe, layout)
    assert closed.allocated == pytest.approx(traced.allocated, rel=0.25), (closed, traced)
    assert (closed.parameters, closed.optimizer) == (traced.parameters, traced.optimizer)


# Layouts


def test_layouts_that_are_sensible() -> None:
    found = layouts(recipe_of(LLAMA, global_batch=128), 32, 8)
    assert len(set(found)) == len(found) and found[0] == Layout(32)
    assert {(x.replicate, x.tensor) for x in found} == {(1, 1), (2, 1), (4, 1), (1, 2), (1, 4)}  # 4 heads: not 8 ways
    assert {x.activation_checkpointing for x in found} == {"none", "selective", "full"}
    assert {x.micro_batch for x in found if x.tensor == 1} == {1, 2, 4}  # of 4 rows
    assert {x.micro_batch for x in found if x.tensor == 4} == {1, 2, 4, 8}
    assert all(x.replicate * x.shard * x.tensor == 32 for x in found)


def test_layouts_that_are_not() -> None:
    assert {x.tensor for x in layouts(recipe_of(BERT, "masked"), 8, 8)} == {1}  # has no plan for it
    assert {x.tensor for x in layouts(recipe_of(LLAMA), 128, 8)} == {2, 4}  # 64 lanes feed 64 readers
    with pytest.raises(InputError, match=r"64 lanes feed 64 at most"):
        layouts(recipe_of(BERT, "masked"), 128, 8)


def test_a_vocabulary_that_nothing_tells() -> None:
    recipe = recipe_of({k: v for k, v in LLAMA.items() if k != "vocab_size"})
    with pytest.raises(InputError, match=r"model\.config\.vocab_size"):
        memory.measured(recipe, Layout(2))
    assert shape.vocabulary(recipe, 515) == shape.vocabulary(recipe_of(LLAMA)) == 515


def test_what_is_held_is_mixed_along_lines() -> None:
    low, high = Held(activations=10.0, buffers=4.0), Held(activations=30.0, buffers=1.0)
    assert Held.mix((0.5, low), (0.5, high)) == Held(activations=20.0, buffers=2.5)
    assert Held.mix((-1.0, low), (2.0, high)) == Held(activations=50.0)  # nothing below 0
