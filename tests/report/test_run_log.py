"""The log of a run: entries after the start step are dropped; a full disk does not end the run."""

import json
import math
import resource
import signal
from pathlib import Path

import pytest

from sevenfold.report.run_log import RunLog, logged_metrics
from sevenfold.run_folder import RunFolder


def steps(folder: RunFolder) -> list[int]:
    """Returns the steps in metrics.jsonl."""
    return [json.loads(line)["step"] for line in Path(folder.log).read_text().splitlines()]


def test_entries_after_the_start_step_are_dropped(tmp_path: Path) -> None:
    folder, warnings = RunFolder(str(tmp_path)), list[str]()
    log = RunLog(folder, 0, warnings.append)
    for step in (1, 2, 3):
        log.add(step, {"train/loss": 1.0 / step})
    log.close()
    # A kill in the middle of a write leaves part of a line.
    with open(folder.log, "a") as f:
        f.write('{"step": 4, "tra')
    log = RunLog(folder, 2, warnings.append)
    assert steps(folder) == [1, 2]
    log.add(3, {"train/loss": 0.5})
    log.close()
    assert steps(folder) == [1, 2, 3] and not warnings


@pytest.mark.parametrize("start", [0, 2])
def test_tensorboard_shows_each_step_once(start: int, tmp_path: Path) -> None:
    """`start` is the step from which a killed run resumes; 0 without a checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(str(tmp_path))
    for first, last, loss in ((1, 4, 1.0), (start + 1, 6, 0.5)):
        log = RunLog(folder, first - 1, print)
        for step in range(first, last + 1):
            log.add(step, {"train/loss": loss})
        log.flush()
        assert log._writer is not None
        log._writer.flush()  # as after a kill: nothing is closed
    events = EventAccumulator(folder.tensorboard)
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert shown == [(step, 1.0 if step <= start else 0.5) for step in range(1, 7)]
    assert steps(folder) == list(range(1, 7))


def test_every_line_is_json(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    log = RunLog(folder, 0, print)
    log.add(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/targets": 3})
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = Path(folder.log).read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "train/loss": None, "train/grad_norm": None, "train/targets": 3}
    assert math.isnan(logged_metrics(folder.log, 1)["train/loss"])


# TensorBoard's writer thread raises an exception when the disk is full.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_entries_are_written_when_a_full_disk_has_space_again(tmp_path: Path) -> None:
    folder, warnings = RunFolder(str(tmp_path)), list[str]()
    log = RunLog(folder, 0, warnings.append)
    log.add(1, {"train/loss": 1.0})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # A limit on the file size fails in the same way as a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(folder.log).stat().st_size + 7, limits[1]))
        log.add(2, {"train/loss": 0.5})
        log.add(3, {"train/loss": 0.3})
        assert steps(folder) == [1]
        assert len(warnings) == 1 and "could not be written" in warnings[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.add(4, {"train/loss": 0.2})
    log.close()
    assert steps(folder) == [1, 2, 3, 4]
