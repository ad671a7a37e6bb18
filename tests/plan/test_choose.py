"""The choice among the layouts that fit."""

from dataclasses import replace

import pytest
from helpers.plans import h100, small_recipe

from sevenfold.errors import InputError
from sevenfold.plan import choose, hardware
from sevenfold.plan.choose import Candidate
from sevenfold.plan.layouts import Layout
from sevenfold.plan.memory import Memory
from sevenfold.plan.speed import Speed

GIB = 2**30
FLEET = h100(8)
GPU_MEMORY = FLEET.gpu.memory


def candidate(layout: Layout, bytes_needed: float, rate: float) -> Candidate:
    """A layout that needs `bytes_needed` and, where it fits, reaches `rate` tokens per second."""
    memory = Memory(bytes_needed / 2, 0, 0, bytes_needed / 2, 0, 0)
    predicted = Speed(1.0, rate, layout.gpus, 0.4, {}) if bytes_needed <= GPU_MEMORY else None
    return Candidate(layout, memory, FLEET, predicted)


def chosen_layout(*candidates: Candidate) -> Layout:
    return choose.best(candidates, small_recipe(), hardware.load()).layout


def test_the_fastest_layout_with_memory_to_spare_is_chosen() -> None:
    slow, quick = Layout(8, micro_batch=1), Layout(8, micro_batch=2)
    tight, large = Layout(8, micro_batch=4), Layout(8, micro_batch=8)
    candidates = [
        candidate(slow, 0.5 * GPU_MEMORY, 100),
        candidate(quick, 0.6 * GPU_MEMORY, 120),
        candidate(tight, 0.97 * GPU_MEMORY, 140),
        candidate(large, 1.2 * GPU_MEMORY, 0),
    ]
    assert chosen_layout(*candidates) == quick
    assert "3 of 4 layouts fit, 2 with 5% to spare; the fastest of them, by 20.0%" in choose.why(
        candidates[1], candidates
    )
    # without a better one, a layout with little to spare is chosen
    assert chosen_layout(*candidates[2:]) == tight and "tight" in choose.why(
        candidates[2], candidates[2:]
    )


def test_of_equally_fast_layouts_the_simplest_is_chosen() -> None:
    plain, copies, split = Layout(8), Layout(8, replicate=2), Layout(8, tensor=2)
    assert (
        chosen_layout(
            candidate(split, 9, 102), candidate(copies, 9, 101), candidate(plain, 9, 100.5)
        )
        == plain
    )
    assert chosen_layout(candidate(split, 9, 110), candidate(plain, 9, 100)) == split


def test_a_recipe_that_fits_nowhere_is_refused_with_the_closest_layout() -> None:
    near, far = (
        candidate(Layout(8, activation_checkpointing="full"), 100 * GIB, 0),
        candidate(Layout(8), 200 * GIB, 0),
    )
    with pytest.raises(InputError) as error:
        chosen_layout(far, near)
    message = str(error.value)
    assert message.startswith("small does not fit on 8 h100-80gb of 79.1 GiB")
    assert "(FSDP 8, micro-batch 1, full checkpointing) needs 100.0 GiB" in message
    assert "it would fit on 8 h200-141gb, or on more h100-80gb" in message


def test_a_recipe_is_distributed_to_all_gpus() -> None:
    assert choose.fitted(small_recipe(), h100(64)).workers == (64, 64)
    fitted = choose.fitted(small_recipe(global_batch=512), replace(h100(8), gpus=96))
    # the number of lanes with which 96 workers are used best: the busiest reads 6 rows of 5.3
    assert fitted.workers == (96, 96) and fitted.lanes == 256
    recipe = small_recipe(global_batch=512).override({"data.lanes": 64})
    assert choose.fitted(recipe, replace(h100(8), gpus=48)).lanes == 512
    # one row per worker
    assert choose.fitted(small_recipe(global_batch=64), h100(128)).workers == (64, 64)
