"""The memory that a plan predicts, in each family and layout.

Counted parts are compared with those of real workers, and extrapolated parts with traces of all
blocks, rows and ranks.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from helpers.closed_form import closed_form

from sevenfold.errors import InputError
from sevenfold.plan import memory, shape
from sevenfold.plan.layouts import Layout, layouts
from sevenfold.plan.shards import Shards, elements
from sevenfold.plan.trace import HeldBytes, Job, traces
from sevenfold.recipe import Adapter, Parallel, Recipe

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 515,
    "tie_word_embeddings": False,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 515,
}
T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 160,
    "num_layers": 5,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 515,
    "feed_forward_proj": "gated-gelu",
}


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
            "name": "plan",
            "objective": objective,
            "data": data,
            "tokenizer": {"path": "x"},
            "model": {"config": config},
            "optimizer": {"name": optimizer},
            "train": {
                "global_batch": 64,
                "micro_batch": 1,
                "steps": 1,
                "dtype": "bfloat16",
                **train,
            },
        }
    )


def with_one_micro_batch(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with one micro-batch per step and rank."""
    rows = layout.readers * layout.micro_batch
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"global_batch": rows})}
    )


slow = pytest.mark.slow  # for further cases of what a faster test covers


def full_trace_bytes(recipe: Recipe, layout: Layout, compiled: bool = False) -> float:
    """Allocated bytes by a trace of all blocks, rows and ranks, with AdamW."""
    size = shape.vocabulary(recipe)
    train = recipe.train.model_copy(
        update={
            "micro_batch": layout.micro_batch,
            "activation_checkpointing": memory.kept(recipe, layout),
        }
    )
    parallel = Parallel(replicate=layout.replicate, tensor=layout.tensor)
    depths = tuple(shape.depths(shape.build.config_of(recipe, size)).items())
    job = Job(
        recipe.model_copy(update={"train": train, "parallel": parallel}),
        size,
        depths,
        layout.gpus,
        min(2, memory.micro_batches(recipe, layout)),
        compiled=compiled,
    )
    (phases,) = traces([job])
    shards = Shards.from_recipe(recipe, size, layout.shard, layout.tensor)
    return max(held.total for held in phases.values()) + shards.optimizer


# Counted parts


def held_bytes(tree: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, gradients and optimizer states after a real step."""
    from helpers.training import LENGTH, ROWS, rows_of

    from sevenfold.engine import optim
    from sevenfold.engine.batch import micro_batches, to_batch
    from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
    from sevenfold.model import build, parallel

    assert LENGTH == 64
    recipe = Recipe.model_validate(tree)
    model: Any = build.build(
        recipe, build.config_of(recipe, 515), weights=torch.distributed.get_rank() == 0
    )
    attach_losses(model, Causal(SpecialTokens(515), 0, 0.15, 3))
    parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
    optimizers = optim.build(model, recipe.optimizer)
    (batch,) = micro_batches(rows_of(0), ROWS, 1, to_batch, torch.device("cpu"))
    model.token_losses(batch).mean().backward()
    gradients = [p.grad for p in model.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    states = [
        tensor
        for optimizer in optimizers
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    ]

    def size(tensors: list[Any]) -> int:
        return sum(_local(tensor).numel() * tensor.element_size() for tensor in tensors)

    return size(list(model.parameters())), size(gradients), size(states)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ({"tensor": 2}, "adamw"),
        ({}, "muon"),
        pytest.param({}, "adamw", marks=slow),
        pytest.param({"replicate": 2}, "adamw", marks=slow),
    ],
)
def test_shards_are_counted_to_the_byte(
    tmp_path: Path, layout: dict[str, int], optimizer: str
) -> None:
    recipe = recipe_of(LLAMA, optimizer=optimizer, dtype="float32")
    tree = recipe.model_dump(mode="json") | {"parallel": layout, "cluster": {"num_workers": 2}}
    first, second = run_ranks(2, tmp_path / "store", held_bytes, tree)
    planned = Layout(2, **layout)
    counted = Shards.from_recipe(recipe, 515, planned.shard, planned.tensor)
    assert (counted.parameters, counted.gradients, counted.optimizer) == first
    assert sum(second) <= sum(first)


def peak_of_second_step(tree: dict[str, Any], rows: int) -> int:
    """Peak bytes that torch's allocator holds in a second step, above those held before it."""
    from sevenfold.engine import optim
    from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel

    recipe = Recipe.model_validate(tree)
    model: Any = build.build(
        recipe, build.config_of(recipe, 515), weights=torch.distributed.get_rank() == 0
    )
    attach_losses(model, Causal(SpecialTokens(515), 0, 0.15, 3))
    parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
    optimizers = optim.build(model, recipe.optimizer)
    train = recipe.train.model_copy(update={"micro_batch": rows})
    batch = shape.dummy_batch(recipe.model_copy(update={"train": train}))
    train_step(model, [batch], optimizers, 1e-3, 1.0)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        train_step(model, [batch], optimizers, 1e-3, 1.0)
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


@slow
@pytest.mark.parametrize("checkpointing", ["full", "none", "selective"])
def test_a_real_step_allocates_what_the_trace_predicts(tmp_path: Path, checkpointing: str) -> None:
    recipe = recipe_of(
        LLAMA, dtype="float32", activation_checkpointing=checkpointing, lanes=2, global_batch=8
    )
    tree = recipe.model_dump(mode="json") | {"cluster": {"num_workers": 2}}
    layout = Layout(2, micro_batch=4, activation_checkpointing=checkpointing)
    peak = max(run_ranks(2, tmp_path / "store", peak_of_second_step, tree, 4))
    predicted = memory.measured(recipe, layout, device="cpu")
    assert predicted.allocated - predicted.parameters - predicted.optimizer == pytest.approx(
        peak, rel=0.1
    )


# Extrapolation along lines from small traces


@pytest.mark.parametrize(
    "checkpointing",
    ["none", pytest.param("full", marks=slow), pytest.param("selective", marks=slow)],
)
def test_few_blocks_rows_and_ranks_predict_the_full_trace(checkpointing: str) -> None:
    layout = Layout(16, micro_batch=4, activation_checkpointing=checkpointing)
    recipe = with_one_micro_batch(recipe_of(LLAMA), layout)
    assert memory.measured(recipe, layout).allocated == pytest.approx(
        full_trace_bytes(recipe, layout), rel=0.03
    )


@pytest.mark.parametrize(
    "layout",
    [
        Layout(8, replicate=2),
        Layout(8, tensor=2),
        pytest.param(Layout(8, replicate=2, tensor=2), marks=slow),
    ],
)
def test_replicas_and_tensor_parallelism_are_predicted(layout: Layout) -> None:
    recipe = with_one_micro_batch(recipe_of(LLAMA), layout)
    assert memory.measured(recipe, layout).allocated == pytest.approx(
        full_trace_bytes(recipe, layout), rel=0.03
    )


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
def test_other_model_families_are_predicted(config: dict[str, Any], objective: str) -> None:
    tree = recipe_of(config).model_dump(mode="json") | {"objective": objective}
    tree["data"] |= {
        "packing": "best_fit",
        "classes": ["a", "b"] if objective == "classify" else [],
    }
    layout = Layout(4, micro_batch=1)
    recipe = with_one_micro_batch(Recipe.model_validate(tree), layout)
    assert memory.measured(recipe, layout).allocated == pytest.approx(
        full_trace_bytes(recipe, layout), rel=0.03
    )


def test_only_an_adapter_has_gradients_and_optimizer_states() -> None:
    recipe = recipe_of(LLAMA).model_copy(update={"adapter": Adapter(rank=4)})
    without_adapter, shards = (
        Shards.from_recipe(recipe_of(LLAMA), 515, 4, 1),
        Shards.from_recipe(recipe, 515, 4, 1),
    )
    adapter_bytes = shards.parameters - without_adapter.parameters  # the adapter's parameters
    assert (
        shards.gradients == adapter_bytes > 0
        and 2 * adapter_bytes < shards.optimizer < 2.2 * adapter_bytes
    )
    layout = Layout(4)
    recipe = with_one_micro_batch(recipe, layout)
    predicted = memory.measured(recipe, layout)
    assert predicted.optimizer == shards.optimizer
    assert predicted.allocated == pytest.approx(full_trace_bytes(recipe, layout), rel=0.03)


def test_several_micro_batches_keep_full_gradients() -> None:
    config = LLAMA | {"num_hidden_layers": 2}
    one, two, many = (
        memory.measured(recipe_of(config, global_batch=count * 16, lanes=16), Layout(16))
        for count in (1, 2, 5)
    )
    full_gradients = 4 * sum(
        elements(parameter, 1, 1) for parameter in shape.parameters(recipe_of(config), 515)
    )
    assert two == many and two.gradients > 0.9 * full_gradients > 4 * one.gradients


def test_compiled_blocks_need_less_memory_than_eager_ones() -> None:
    plain, config = Layout(4, micro_batch=8), LLAMA | {"num_hidden_layers": 4}
    eager, compiled = (
        memory.measured(with_one_micro_batch(recipe_of(config, compile=c), plain), plain)
        for c in (False, True)
    )
    ways = [replace(plain, activation_checkpointing=how) for how in ("full", "selective")]
    full, selective = (
        memory.measured(with_one_micro_batch(recipe_of(config, compile=True), plain), way)
        for way in ways
    )
    assert full.allocated < selective.allocated < compiled.allocated < eager.allocated


def test_logits_are_counted_and_chunks_avoid_them() -> None:
    config, layout = LLAMA | {"vocab_size": 40000, "num_hidden_layers": 2}, Layout(4, micro_batch=8)
    unchunked, chunked = (
        memory.measured(with_one_micro_batch(recipe_of(config, loss_chunk=chunk), layout), layout)
        for chunk in (None, 64)
    )
    # float32 logits, their log softmax and their gradient
    assert unchunked.logits == 3 * 4 * 8 * 128 * 40000
    assert chunked.logits < unchunked.logits / 8 and chunked.activations < unchunked.total


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
)
def test_the_closed_form_is_close_to_the_trace(recipe: Recipe, layout: Layout) -> None:
    closed, traced = closed_form(recipe, layout), memory.measured(recipe, layout)
    assert closed.allocated == pytest.approx(traced.allocated, rel=0.25), (closed, traced)
    assert (closed.parameters, closed.optimizer) == (traced.parameters, traced.optimizer)


# Layouts


def test_sensible_layouts_are_listed() -> None:
    all_layouts = layouts(recipe_of(LLAMA, global_batch=128), 32, 8)
    assert len(set(all_layouts)) == len(all_layouts) and all_layouts[0] == Layout(32)
    # 4 heads cannot be split 8 ways
    assert {(x.replicate, x.tensor) for x in all_layouts} == {
        (1, 1),
        (2, 1),
        (4, 1),
        (1, 2),
        (1, 4),
    }
    assert {x.activation_checkpointing for x in all_layouts} == {"none", "selective", "full"}
    # divisors of 4 rows
    assert {x.micro_batch for x in all_layouts if x.tensor == 1} == {1, 2, 4}
    assert {x.micro_batch for x in all_layouts if x.tensor == 4} == {1, 2, 4, 8}
    assert all(x.replicate * x.shard * x.tensor == 32 for x in all_layouts)


def test_impossible_layouts_are_left_out() -> None:
    # BERT has no tensor-parallel plan
    assert {x.tensor for x in layouts(recipe_of(BERT, "masked"), 8, 8)} == {1}
    # 64 lanes feed at most 64 readers
    assert {x.tensor for x in layouts(recipe_of(LLAMA), 128, 8)} == {2, 4}
    with pytest.raises(InputError, match=r"64 lanes feed 64 at most"):
        layouts(recipe_of(BERT, "masked"), 128, 8)


def test_an_unknown_vocabulary_size_is_refused() -> None:
    recipe = recipe_of({k: v for k, v in LLAMA.items() if k != "vocab_size"})
    with pytest.raises(InputError, match=r"model\.config\.vocab_size"):
        memory.measured(recipe, Layout(2))
    assert shape.vocabulary(recipe, 515) == shape.vocabulary(recipe_of(LLAMA)) == 515


def test_traces_are_combined_linearly() -> None:
    low, high = HeldBytes(activations=10.0, buffers=4.0), HeldBytes(activations=30.0, buffers=1.0)
    assert HeldBytes.mix((0.5, low), (0.5, high)) == HeldBytes(activations=20.0, buffers=2.5)
    assert HeldBytes.mix((-1.0, low), (2.0, high)) == HeldBytes(activations=50.0)  # clipped at 0
