"""The log of a run: forgets what a killed try wrote; waits for a disk that is full."""

import json
import resource
import signal
from pathlib import Path

import pytest

from sevenfold.report.metrics import RunLog
from sevenfold.storage import RunFolder


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in Path(folder.log).read_text().splitlines()]


def test_what_was_logged_after_the_start_is_forgotten(tmp_path: Path) -> None:
    folder, told = RunFolder(str(tmp_path)), list[str]()
    log = RunLog(folder, 0, told.append)
    for step in (1, 2, 3):
        log.add(step, {"train/loss": 1.0 / step})
    log.close()
    with open(folder.log, "a") as f:
        f.write('{"step": 4, "tra')  # a kill
    again = RunLog(folder, 2, told.append)
    assert steps(folder) == [1, 2]
    again.add(3, {"train/loss": 0.5})
    again.close()
    assert steps(folder) == [1, 2, 3] and not told


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    folder, told = RunFolder(str(tmp_path)), list[str]()
    log = RunLog(folder, 0, told.append)
    log.add(1, {"train/loss": 1.0})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(folder.log).stat().st_size + 7, whole[1]))
        log.add(2, {"train/loss": 0.5})
        log.add(3, {"train/loss": 0.3})
        assert steps(folder) == [1] and len(told) == 1 and "could not be written" in told[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    log.add(4, {"train/loss": 0.2})
    log.close()
    assert steps(folder) == [1, 2, 3, 4]
