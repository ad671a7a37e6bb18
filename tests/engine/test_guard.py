"""Steps that must not count: left out, gone back from, given up."""

import pytest

from sevenfold.engine.guard import MEMORY, Guard
from sevenfold.errors import RunError
from sevenfold.recipe import Guard as Settings


def test_so_many_in_a_row_go_back_and_then_it_is_given_up() -> None:
    guard = Guard(Settings(max_skipped=3, max_rollbacks=1))
    bad = [guard.judge(s, False, float("nan")) for s in (1, 2)]
    assert bad == [False, False] and not guard.judge(3, True, 1.0) and guard.in_a_row == 0
    assert [guard.judge(s, False, float("inf")) for s in (4, 5, 6)] == [False, False, True]
    state = guard.state()
    again = Guard(guard.settings)
    again.load(state | {"in_a_row": 0}, rollbacks=1)
    assert not again.judge(7, False, 1.0) and not again.judge(8, False, 1.0)
    with pytest.raises(RunError, match="up to step 9, after 1 returns to a checkpoint"):
        again.judge(9, False, 1.0)


def test_a_spike_is_told_by_the_mean_of_the_norms_before() -> None:
    guard = Guard(Settings(spike_factor=4))
    for step in range(MEMORY):
        assert guard.most_norm == float("inf")
        guard.judge(step, True, 2.0)
    assert guard.most_norm == pytest.approx(8.0)
    guard.judge(MEMORY, False, 100.0)  # what was left out does not move it
    assert guard.most_norm == pytest.approx(8.0)
    assert Guard(Settings()).most_norm == float("inf")
