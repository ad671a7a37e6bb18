"""The guard: skipped steps, rollbacks, and the point at which a run stops."""

import pytest

from sevenfold.engine.guard import MEMORY, Guard
from sevenfold.errors import RunError
from sevenfold.recipe import Guard as Settings


def test_skipped_steps_in_a_row_cause_a_rollback_and_then_an_error() -> None:
    guard = Guard(Settings(max_skipped=3, max_rollbacks=1))
    rollback_due = [guard.record(step, False, float("nan")) for step in (1, 2)]
    assert (
        rollback_due == [False, False]
        and not guard.record(3, True, 1.0)
        and guard.skipped_in_a_row == 0
    )
    assert [guard.record(step, False, float("inf")) for step in (4, 5, 6)] == [False, False, True]
    state = guard.state()
    restored = Guard(guard.settings)
    restored.load(state | {"in_a_row": 0}, rollbacks=1)
    assert not restored.record(7, False, 1.0) and not restored.record(8, False, 1.0)
    with pytest.raises(RunError, match="up to step 9; rollbacks so far: 1"):
        restored.record(9, False, 1.0)


def test_the_spike_threshold_follows_the_mean_of_recent_norms() -> None:
    guard = Guard(Settings(spike_factor=4))
    for step in range(MEMORY):
        assert guard.skip_above_norm == float("inf")
        guard.record(step, True, 2.0)
    assert guard.skip_above_norm == pytest.approx(8.0)
    guard.record(MEMORY, False, 100.0)  # a skipped step does not change the threshold
    assert guard.skip_above_norm == pytest.approx(8.0)
    assert Guard(Settings()).skip_above_norm == float("inf")
