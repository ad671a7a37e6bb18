"""Which of the layouts that fit is taken."""

from dataclasses import replace

import pytest
from test_speed import h100, small

from sevenfold.errors import InputError
from sevenfold.plan import choose, hardware
from sevenfold.plan.choose import Candidate
from sevenfold.plan.layouts import Layout
from sevenfold.plan.memory import Memory
from sevenfold.plan.speed import Speed

GIB = 2**30
FLEET = h100(8)
ROOM = FLEET.gpu.memory


def candidate(layout: Layout, held: float, rate: float) -> Candidate:
    memory = Memory(held / 2, 0, 0, held / 2, 0, 0)
    said = Speed(1.0, rate, layout.gpus, 0.4, {}) if held <= ROOM else None
    return Candidate(layout, memory, FLEET, said)


def picked(*found: Candidate) -> Layout:
    return choose.best(found, small(), hardware.load()).layout


def test_the_quickest_that_fits_with_a_margin() -> None:
    slow, quick = Layout(8, micro_batch=1), Layout(8, micro_batch=2)
    tight, large = Layout(8, micro_batch=4), Layout(8, micro_batch=8)
    found = [candidate(slow, 0.5 * ROOM, 100), candidate(quick, 0.6 * ROOM, 120), candidate(tight, 0.97 * ROOM, 140),
             candidate(large, 1.2 * ROOM, 0)]  # fmt: skip
    assert picked(*found) == quick
    assert "3 of 4 layouts fit, 2 with 5% to spare; of these the quickest, by 20.0%" in choose.why(found[1], found)
    assert picked(*found[2:]) == tight and "tight" in choose.why(found[2], found[2:])  # better than nothing


def test_the_simpler_of_equals() -> None:
    plain, copies, split = Layout(8), Layout(8, replicate=2), Layout(8, tensor=2)
    assert picked(candidate(split, 9, 102), candidate(copies, 9, 101), candidate(plain, 9, 100.5)) == plain
    assert picked(candidate(split, 9, 110), candidate(plain, 9, 100)) == split


def test_what_fits_nowhere_names_the_nearest_and_a_gpu_for_it() -> None:
    near, far = candidate(Layout(8, activation_checkpointing="full"), 100 * GIB, 0), candidate(Layout(8), 200 * GIB, 0)
    with pytest.raises(InputError) as e:
        picked(far, near)
    assert str(e.value).startswith(
        "small fits in no layout on 8 h100-80gb of 79.1 GiB: the nearest, FSDP 8, micro-batch 1, full checkpointing, needs "
        "100.0 GiB; it would fit on 8 h200-141gb, or on more GPUs"
    )


def test_a_recipe_is_dealt_out_to_all_gpus() -> None:
    assert choose.fitted(small(), h100(64)).workers == (64, 64)
    many = choose.fitted(small(global_batch=512), replace(h100(8), gpus=96))
    assert many.workers == (96, 96) and many.lanes == 128  # the fewest that the batch can be dealt out by
    assert choose.fitted(small(global_batch=64), h100(128)).workers == (64, 64)  # a row each
