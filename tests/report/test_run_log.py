"""The log of a run: entries after the start step are dropped; a full disk does not end the run."""

import json
import resource
import signal
from pathlib import Path

import pytest

from sevenfold.report.run_log import RunLog
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
