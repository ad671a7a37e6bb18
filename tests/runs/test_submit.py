"""Ray's own door: `ray job submit` to a cluster that `ray start --head` made."""

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import RAY, ROOT

from sevenfold.engine import checkpoint as ckpt


@pytest.fixture
def head(shared_head: dict[str, str]) -> dict[str, str]:
    """The environment of a shell beside a running head."""
    return shared_head


@pytest.fixture
def checkout(tree: dict[str, Any], texts: Path, tmp_path: Path) -> Path:
    """What a person has on a laptop, with the recipes `tiny` and `sft`, which is one of a sweep, too."""
    made = tmp_path / "checkout"
    made.mkdir()
    for part in ("platform", "jobs"):
        shutil.copytree(ROOT / part, made / part)
    tree |= {"cluster": {"cpus_per_worker": 0.75}}
    (made / "jobs/recipes/tiny.yaml").write_text(yaml.safe_dump(tree))
    pairs = [{"path": str(texts / "pairs")}]
    sft = {
        "name": "sft", "objective": "sft", "model": {"path": "runs/tiny"}, "adapter": {"rank": 2},
        "data": {"sources": pairs, "validation": pairs, "sequence_length": 64, "lanes": 2, "executor": "inline"},
        "train": {"global_batch": 4, "micro_batch": 4, "steps": 2}, "cluster": {"cpus_per_worker": 0.75},
        "validation": {"every": 1, "rows": 8},
        "search": {"trials": 2, "scheduler": "none", "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}},
    }  # fmt: skip
    (made / "jobs/recipes/sft.yaml").write_text(yaml.safe_dump(sft))

    return made


class Shell:
    """`ray job ...` in a checkout."""

    def __init__(self, head: dict[str, str], checkout: Path):
        self.runs = Path(head["HOME"]) / "sevenfold/runs"
        self._at: dict[str, Any] = {"env": head, "cwd": checkout, "text": True}

    def job(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([RAY, "job", *words], **self._at, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400)

    def submit(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return self.job("submit", *options, "--working-dir", ".", "--", *command)

    def done(self, *command: str, options: tuple[str, ...] = ()) -> str:
        """What a job, which must succeed, says."""
        found = self.submit(*command, options=options)
        assert found.returncode == 0, found.stdout
        return found.stdout

    def until(self, job: str, said: str) -> None:
        """Returns when the job's log says it."""
        with subprocess.Popen([RAY, "job", "logs", "--follow", job], **self._at, stdout=subprocess.PIPE) as log:
            assert log.stdout is not None
            told = ""
            for line in log.stdout:
                told += line
                if said in line:
                    break
            log.kill()
        assert said in told, told

    def stop(self, job: str) -> str:
        """What `ray job stop` and then `ray job status` say."""
        stopped, status = self.job("stop", job), self.job("status", job)
        assert stopped.returncode == 0, stopped.stdout
        return stopped.stdout + status.stdout

    def told(self, job: str) -> dict[str, Any]:
        """What the cluster knows of a job."""
        with urllib.request.urlopen(f"{self._at['env']['RAY_ADDRESS']}/api/jobs/{job}", timeout=20) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@pytest.fixture
def shell(head: dict[str, str], checkout: Path) -> Shell:
    return Shell(head, checkout)


def test_submit(shell: Shell, checkout: Path) -> None:
    mark = checkout / "platform/sevenfold/__init__.py"
    mark.write_text(mark.read_text().replace('__version__ = "', '__version__ = "9.9.'))
    words = (
        "python",
        "jobs/pretrain.py",
        "jobs/recipes/tiny.yaml",
        "name=submitted",
        "data.executor=inline",
    )
    assert "submitted: step 8/8  loss" in shell.done(*words)  # its log is streamed
    run = shell.runs / "submitted"
    newest = ckpt.latest(str(run / "checkpoints"))
    assert newest is not None and newest.extra["versions"]["sevenfold"].startswith("9.9.")  # workers had the checkout's library
    assert json.loads((run / "summary.json").read_text())["sevenfold"].startswith("9.9.")

    words = ("python", "jobs/pretrain.py", "jobs/recipes/tiny.yaml", "train.stepps=9")
    failed = shell.submit(*words, options=("--submission-id", "wrong"))
    assert failed.returncode == 1 and "did you mean 'steps'" in failed.stdout
    assert "did you mean 'steps'" in shell.job("logs", "wrong").stdout
    told = shell.told("wrong")
    assert (told["status"], told["driver_exit_code"]) == ("FAILED", 2)


@pytest.mark.slow
def test_the_other_jobs_go_in_this_way(shell: Shell, head: dict[str, str]) -> None:
    tiny, sft, home = "jobs/recipes/tiny.yaml", "jobs/recipes/sft.yaml", shell.runs.parent
    assert "an epoch is about" in shell.done("python", "jobs/tokenize.py", tiny, "data.cache=cache")
    wide = ("cluster.num_workers=2", "checkpoint.every=4")
    shell.done("python", "jobs/pretrain.py", tiny, "name=base", "data.cache=cache", *wide)
    assert "base, step 4: " in shell.done("python", "jobs/export.py", "runs/base", "--step", "4", "--out", "exported")
    assert (home / "exported/model.safetensors").exists()
    # a relative path means the same for the job and for its workers, which stand elsewhere
    shell.done("python", "jobs/finetune.py", sft, "model.path=runs/base", "search=null")
    assert (shell.runs / "sft/adapter/adapter_model.safetensors").exists()
    assert "sft continues" in shell.done("python", "jobs/evaluate.py", "runs/sft", "--workers", "1")
    assert "2 trials ended" in shell.done("python", "jobs/sweep.py", sft, "name=tuned", "model.path=runs/base")
    assert len(json.loads((shell.runs / "tuned-sweep/trials.json").read_text())) == 2

    made = Path(head["RAY_TMPDIR"], "ray")  # what Ray made for the jobs: of their own code, and no environment
    assert list(made.glob("session_*/runtime_resources/py_modules_files/*/sevenfold"))
    assert not [p for kind in ("pip", "uv", "conda") for p in made.glob(f"session_*/runtime_resources/{kind}/*")]


def losses(run: Path) -> dict[int, float]:
    """Of each step, and that none is there twice."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.slow
def test_a_stopped_job_saves_and_the_same_goes_on_from_there(shell: Shell, head: dict[str, str]) -> None:
    words = ("jobs/pretrain.py", "jobs/recipes/tiny.yaml", "train.steps=40", "train.micro_batch=1", "data.sequence_length=256")
    # a head that was started by `ray start ... &` ignores Ctrl-C, and so do its jobs
    deaf = f"trap '' INT; exec python {' '.join(words)} name=stopped"
    shell.submit("sh", "-c", deaf, options=("--no-wait", "--submission-id", "first"))
    shell.until("first", "stopped: step 8/40")
    for worker in json.loads((shell.runs / "stopped/workers.json").read_text()):  # runs what is installed on its node
        libraries = {m.path for m in psutil.Process(worker["pid"]).memory_maps() if Path(m.path).name == "libtorch_cpu.so"}
        assert libraries == {str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")}
    assert "Job 'first' was stopped" in shell.stop("first")
    [told] = Path(head["RAY_TMPDIR"]).rglob("supervisor-first.log")
    assert "has been terminated gracefully" in told.read_text()  # by itself, before Ray's patience of 60 s had ended
    log = shell.job("logs", "first").stdout
    assert "asked to end" in log and "this run is to end: saving step" in log
    at = int(log.split("error: stopped after step ")[1].split(",")[0])
    assert 8 <= at < 40 and max(losses(shell.runs / "stopped")) == at
    newest = ckpt.latest(str(shell.runs / "stopped/checkpoints"))
    assert newest is not None and newest.step == at

    # the same again; asked to end before its first step, it has nothing to save and does not wait for one
    shell.submit("python", *words, "name=stopped", options=("--no-wait", "--submission-id", "second"))
    shell.until("second", "training on 1 workers")
    assert "Job 'second' was stopped" in shell.stop("second")
    log = shell.job("logs", "second").stdout
    assert "error: stopped; run the same command again" in log and "asked to end" not in log
    again = ckpt.latest(str(shell.runs / "stopped/checkpoints"))
    assert again is not None and again.step == at

    assert f"going on from step {at} " in shell.done("python", *words, "name=stopped")
    shell.done("python", *words, "name=whole")
    assert losses(shell.runs / "stopped") == losses(shell.runs / "whole")


@pytest.mark.nightly
def test_a_drill_goes_in_this_way(shell: Shell) -> None:
    drilled = shell.done("python", "jobs/drill.py", "jobs/recipes/tiny.yaml", "--faults", "worker", "--steps", "12")
    assert "SIGKILL of a worker" in drilled and "to the bit" in drilled


@pytest.mark.slow
def test_a_job_may_bring_the_patience_of_its_stop(shell: Shell, head: dict[str, str]) -> None:
    brought = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "1"}})
    stays = "import signal, time; signal.signal(signal.SIGTERM, print); print('up', flush=True); time.sleep(300)"
    options = ("--no-wait", "--submission-id", "stays", "--runtime-env-json", brought)
    shell.job("submit", *options, "--", "python", "-c", stays)
    shell.until("stays", "up")
    assert "Job 'stays' was stopped" in shell.stop("stays")
    [told] = Path(head["RAY_TMPDIR"]).rglob("supervisor-stays.log")
    assert "has timed out after 1 seconds" in told.read_text()
