"""A run whose folder another start of it has taken writes nothing more there, and ends."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, start_job


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
def test_a_run_that_lost_its_folder_writes_nothing_more(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["data"] |= tree["data"] | {"executor": "inline"}
    recipe["train"] |= {"steps": 5000, "log_every": 1}
    recipe["checkpoint"] = {"every": 5000}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"name": "x"}))
    process = start_job("pretrain", "r.yaml", home=tmp_path)
    run, deadline = tmp_path / "runs/x", time.monotonic() + 200
    log = run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) > 3:
            break
        time.sleep(0.05)
    # the first thing that another start of the run does
    ranks = json.loads((run / "workers.json").read_text())
    (run / "workers.json").write_text(json.dumps([rank | {"pid": 1} for rank in ranks]))
    time.sleep(0.2)  # for a line that is being written
    lines = log.read_text()
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1 and "was started again and continues there" in stderr, stderr
    assert log.read_text() == lines
    assert not list((run / "checkpoints").glob("step-*")) and not (run / "summary.json").exists()
