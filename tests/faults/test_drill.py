"""Drills: faults that are injected into runs on local Ray nodes, and errors for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE, ROOT, refused, stdlib_texts

from sevenfold.errors import InputError
from sevenfold.faults.drill import _clear
from sevenfold.faults.inject import FAULTS, Run
from sevenfold.run_folder import RunFolder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working folder with the recipe `recipe.yaml` of two workers."""
    texts = [t[:3000] for t in stdlib_texts() if len(t) > 300][:60]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tree = json.loads(json.dumps(RECIPE))
    tree["model"]["config"] |= {"hidden_size": 64, "intermediate_size": 128}
    tree["data"] |= {"sources": [{"path": str(tmp_path / "text.jsonl")}], "sequence_length": 128}
    tree["train"] |= {"global_batch": 8, "micro_batch": 4}
    tree |= {"optimizer": {"learning_rate": 1e-3}, "cluster": {"num_workers": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def drill(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a drill of the recipe in its own process."""
    command = [sys.executable, str(ROOT / "jobs/drill.py"), "recipe.yaml", *words]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=1500)


def test_bad_input_is_an_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(home / "recipe.yaml")
    error = refused(capsys, "drill", recipe, "--faults", "worker,meteor")
    assert "unknown fault 'meteor'; available: worker, slow, driver" in error
    error = refused(capsys, "drill", recipe, "--steps", "5")
    assert error.startswith("error: --steps 5: expected 12 to 100,000") and len(error) < 200
    result = drill(home, "--faults", "join", "cluster.num_workers=1")
    assert result.returncode == 2, result.stderr
    assert "it requires cluster.num_workers of 2 or more" in result.stdout, result.stderr


def test_a_drill_deletes_only_files_of_earlier_drills(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "tiny-drill"))
    (tmp_path / "tiny-drill/model").mkdir(parents=True)
    for name in ("recipe.yaml", "drill.log", "metrics.jsonl", "model/config.json"):
        (tmp_path / "tiny-drill" / name).touch()
    (tmp_path / "tiny-drill/model/notes.md").touch()
    with pytest.raises(
        InputError, match=r"no drill wrote \(model/notes\.md\): move them elsewhere"
    ):
        _clear(folder)
    assert (tmp_path / "tiny-drill/recipe.yaml").exists()
    (tmp_path / "tiny-drill/model/notes.md").unlink()
    _clear(folder)
    assert [p.name for p in (tmp_path / "tiny-drill").iterdir()] == ["drill.log"]
    (tmp_path / "tiny-drill/drill.log").rename(tmp_path / "tiny-drill/other")
    with pytest.raises(InputError, match="found another run: give the recipe another name"):
        _clear(folder)


def test_steps_failures_and_resumptions_are_read_from_the_output(tmp_path: Path) -> None:
    script = """
import time
lines = [
    "r: step 1/9  loss 5",
    "r: step 2/9",
    "1 workers failed, rank 0 by: x",
    "resuming from step 1 (x)",
    "r: step 2/9",
    "r: step 3/9",
]
for line in lines:
    print(line, flush=True)
time.sleep(60)
"""
    run = Run([sys.executable, "-c", script])
    run.wait_for_step(3)
    run.kill()
    assert [s for _, s in run.steps] == [1, 2, 2, 3] and [s for _, s in run.resumed] == [1]
    assert len(run.failed) == 1 and run.wait() == -9


@pytest.mark.timeout(1200)  # two runs on three nodes each: ten minutes on a busy machine
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("power", marks=pytest.mark.slow),
        pytest.param("notice", marks=pytest.mark.nightly),
        pytest.param("leave", marks=pytest.mark.nightly),
    ],
)
def test_faults_do_not_change_the_result(home: Path, fault: str) -> None:
    """A node that stops responding, a preemption notice, and a node that leaves.

    train/test_kills.py kills workers, in cluster/test_pools.py a node joins, and
    benchmarks/faults.py covers the other faults.
    """
    result = drill(home, "--faults", fault, "--steps", "36")
    assert result.returncode == 0, result.stdout + result.stderr
    [outcome] = json.loads((home / "runs/tiny-drill/drill.json").read_text())
    assert outcome["fault"] == fault
    allowed = 1e-5 if FAULTS[fault].elastic else 0
    assert outcome["difference"] <= allowed, outcome
    assert outcome["lost"] == outcome["unguarded"] == 0, outcome
    assert outcome["looks"] and outcome["went_on"] is not None, outcome
    if fault == "leave":
        workers = json.loads((home / "runs/tiny-drill-leave/workers.json").read_text())
        assert len(workers) == 1
