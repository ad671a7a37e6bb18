"""Drills of real runs on real nodes; what they tell of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE, ROOT, refused, stdlib_texts

from sevenfold.errors import InputError
from sevenfold.runs.drill import _clear
from sevenfold.runs.faults import FAULTS, Run
from sevenfold.storage import RunFolder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    texts = [t[:3000] for t in stdlib_texts() if len(t) > 300][:60]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tree = json.loads(json.dumps(RECIPE))
    tree["model"]["config"] |= {"hidden_size": 64, "intermediate_size": 128}
    tree["data"] |= {"sources": [{"path": str(tmp_path / "text.jsonl")}], "sequence_length": 128}
    tree["train"] |= {"global_batch": 32, "micro_batch": 8}
    tree |= {"optimizer": {"learning_rate": 1e-3}, "cluster": {"num_workers": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def drill(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs/drill.py"), "recipe.yaml", *words]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=1500)


def test_what_cannot_be_drilled_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(home / "recipe.yaml")
    assert "no fault 'meteor'; there are worker, slow, driver" in refused(capsys, "drill", recipe, "--faults", "worker,meteor")
    said = refused(capsys, "drill", recipe, "--steps", "5")
    assert said.startswith("error: --steps 5: expected 12 to 100,000") and len(said) < 200
    done = drill(home, "--faults", "join", "cluster.num_workers=1")
    assert done.returncode == 2 and "it takes cluster.num_workers of 2 or more" in done.stdout, done.stderr


def test_a_drill_deletes_nothing_that_no_drill_wrote(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "tiny-drill"))
    (tmp_path / "tiny-drill/model").mkdir(parents=True)
    for name in ("recipe.yaml", "drill.log", "metrics.jsonl", "model/config.json"):
        (tmp_path / "tiny-drill" / name).touch()
    (tmp_path / "tiny-drill/model/notes.md").touch()
    with pytest.raises(InputError, match=r"did not write model/notes\.md in it: move that elsewhere"):
        _clear(folder)
    assert (tmp_path / "tiny-drill/recipe.yaml").exists()
    (tmp_path / "tiny-drill/model/notes.md").unlink()
    _clear(folder)
    assert [p.name for p in (tmp_path / "tiny-drill").iterdir()] == ["drill.log"]
    (tmp_path / "tiny-drill/drill.log").rename(tmp_path / "tiny-drill/other")
    with pytest.raises(InputError, match="found another: give the recipe another name"):
        _clear(folder)


def test_a_run_is_watched(tmp_path: Path) -> None:
    script = """
import sys, time
told = "r: step 1/9  loss 5;r: step 2/9;1 workers failed, rank 0 by: x;going on from step 1 (x);r: step 2/9;r: step 3/9"
for line in told.split(";"):
    print(line, flush=True)
time.sleep(60)
"""
    run = Run([sys.executable, "-c", script])
    run.reach(3)
    run.kill()
    assert [s for _, s in run.steps] == [1, 2, 2, 3] and [s for _, s in run.resumed] == [1]
    assert len(run.failed) == 1 and run.end() == -9


@pytest.mark.slow
def test_faults_do_not_show(home: Path) -> None:
    """A silent node, a notice and a leaving node. Workers are killed in test_kills, a node joins in cluster/test_pools, and
    benchmarks/faults.py has the rest."""
    names = ["power", "notice", "leave"]
    done = drill(home, "--faults", ",".join(names), "--steps", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {o["fault"]: o for o in json.loads((home / "runs/tiny-drill/drill.json").read_text())}
    assert list(found) == names
    for name, o in found.items():
        assert o["difference"] == 0 if not FAULTS[name].elastic else o["difference"] <= 1e-5, o
        assert o["lost"] == o["unguarded"] == 0 and o["looks"] and o["went_on"] is not None, o
    assert len(json.loads((home / "runs/tiny-drill-leave/workers.json").read_text())) == 1
