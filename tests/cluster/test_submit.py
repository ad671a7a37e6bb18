"""`ray job submit` to a cluster that was started by `ray start --head`."""

import json
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import RAY
from helpers.checkout import write_checkout

from sevenfold.engine.checkpoint import latest_checkpoint


@pytest.fixture
def head(shared_head: dict[str, str]) -> dict[str, str]:
    """The environment for commands of a running cluster."""
    return shared_head


@pytest.fixture
def checkout(tree: dict[str, Any], texts: Path, tmp_path: Path) -> Path:
    """A checkout on a user's laptop, with the recipes `tiny` and `sft` (also a sweep)."""
    folder = tmp_path / "checkout"
    write_checkout(folder, tree, texts)
    return folder


class Shell:
    """Runs `ray job ...` in a checkout.

    Attributes:
        runs: the folder with the runs of the submitted jobs.
    """

    def __init__(self, head: dict[str, str], checkout: Path):
        self.runs = Path(head["HOME"]) / "sevenfold/runs"
        self._options: dict[str, Any] = {"env": head, "cwd": checkout, "text": True}

    def job(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs `ray job ...`."""
        return subprocess.run(
            [RAY, "job", *words],
            **self._options,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=400,
        )

    def submit(
        self, *command: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Submits a command with the checkout as its working folder, and waits for its end."""
        return self.job("submit", *options, "--working-dir", ".", "--", *command)

    def succeed(self, *command: str) -> str:
        """Submits a job that must succeed, and returns its output."""
        result = self.submit(*command)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def wait_for(self, job: str, text: str) -> None:
        """Waits until a line of the job's log contains this text, 200 seconds at most."""
        with subprocess.Popen(
            [RAY, "job", "logs", "--follow", job], **self._options, stdout=subprocess.PIPE
        ) as log:
            assert log.stdout is not None
            timer = threading.Timer(200, log.kill)
            timer.start()
            output = ""
            for line in log.stdout:
                output += line
                if text in line:
                    break
            timer.cancel()
            log.kill()
        assert text in output, output + self.job("status", job).stdout

    def stop(self, job: str) -> str:
        """Stops a job; returns the output of `ray job stop` and of `ray job status` after it."""
        stopped, status = self.job("stop", job), self.job("status", job)
        assert stopped.returncode == 0, stopped.stdout
        return stopped.stdout + status.stdout

    def details(self, job: str) -> dict[str, Any]:
        """Returns the job's details from the cluster's HTTP API."""
        url = f"{self._options['env']['RAY_ADDRESS']}/api/jobs/{job}"
        with urllib.request.urlopen(url, timeout=20) as response:
            details: dict[str, Any] = json.load(response)
            return details


@pytest.fixture
def shell(head: dict[str, str], checkout: Path) -> Shell:
    return Shell(head, checkout)


def test_submit(shell: Shell, checkout: Path) -> None:
    version = checkout / "platform/sevenfold/__init__.py"
    version.write_text(version.read_text().replace('__version__ = "', '__version__ = "9.9.'))
    job = ("python", "jobs/pretrain.py", "jobs/recipes/tiny.yaml")
    # `ray job submit` streams the job's log.
    output = shell.succeed(*job, "name=submitted", "data.executor=inline")
    assert "submitted: step 8/8  loss" in output
    run = shell.runs / "submitted"
    # The driver and the workers use the library of the checkout, not the installed one.
    checkpoint = latest_checkpoint(str(run / "checkpoints"))
    assert checkpoint is not None
    assert checkpoint.extra["versions"]["sevenfold"].startswith("9.9.")
    assert json.loads((run / "summary.json").read_text())["sevenfold"].startswith("9.9.")

    result = shell.submit(*job, "train.stepps=9", options=("--submission-id", "wrong"))
    assert result.returncode == 1 and "did you mean 'train.steps'" in result.stdout
    assert "did you mean 'train.steps'" in shell.job("logs", "wrong").stdout
    details = shell.details("wrong")
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", 2)


@pytest.mark.nightly
def test_submit_the_other_jobs(shell: Shell, head: dict[str, str]) -> None:
    tiny, sft, home = "jobs/recipes/tiny.yaml", "jobs/recipes/sft.yaml", shell.runs.parent
    output = shell.succeed("python", "jobs/tokenize.py", tiny, "data.cache=cache")
    assert "an epoch is about" in output
    overrides = ("name=base", "data.cache=cache", "cluster.num_workers=2", "checkpoint.every=4")
    shell.succeed("python", "jobs/pretrain.py", tiny, *overrides)
    export = ("jobs/export.py", "runs/base", "--step", "4", "--out", "exported")
    assert "base, step 4: " in shell.succeed("python", *export)
    assert (home / "exported/model.safetensors").exists()
    # A relative path means the same for the job and its workers, whose working folders differ.
    shell.succeed("python", "jobs/finetune.py", sft, "model.path=runs/base", "sweep=null")
    assert (shell.runs / "sft/adapter/adapter_model.safetensors").exists()
    output = shell.succeed("python", "jobs/evaluate.py", "runs/sft", "--workers", "1")
    assert "completion by sft" in output
    output = shell.succeed("python", "jobs/sweep.py", sft, "name=tuned", "model.path=runs/base")
    assert "2 trials finished" in output
    assert len(json.loads((shell.runs / "tuned-sweep/trials.json").read_text())) == 2

    # Ray has unpacked the jobs' own code and has not created Python environments for them.
    ray_folder = Path(head["RAY_TMPDIR"], "ray")
    assert list(ray_folder.glob("session_*/runtime_resources/py_modules_files/*/sevenfold"))
    assert not [
        p
        for kind in ("pip", "uv", "conda")
        for p in ray_folder.glob(f"session_*/runtime_resources/{kind}/*")
    ]


def losses(run: Path) -> dict[int, float]:
    """Returns the loss of each step, and checks that each step was logged once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    assert len(dict(logged)) == len(logged)
    return dict(logged)


@pytest.mark.slow
def test_a_stopped_job_saves_and_the_same_command_resumes(
    shell: Shell, head: dict[str, str]
) -> None:
    words = (
        "jobs/pretrain.py",
        "jobs/recipes/tiny.yaml",
        "train.steps=150",
        "train.micro_batch=1",
        "data.sequence_length=256",
    )
    # A cluster that was started by `ray start ... &` ignores SIGINT, and so do its jobs.
    script = f"trap '' INT; exec python {' '.join(words)} name=stopped"
    shell.submit("sh", "-c", script, options=("--no-wait", "--submission-id", "first"))
    shell.wait_for("first", "stopped: step 8/150")
    # The workers use the torch that is installed on their node.
    for worker in json.loads((shell.runs / "stopped/workers.json").read_text()):
        libraries = {
            Path(m.path).resolve()
            for m in psutil.Process(worker["pid"]).memory_maps()
            if Path(m.path).name == "libtorch_cpu.so"
        }
        assert libraries == {Path(torch.__file__).resolve().with_name("lib") / "libtorch_cpu.so"}
    assert "Job 'first' was stopped" in shell.stop("first")
    # The job ended by itself, before Ray's limit of 60 s (RAY_JOB_STOP_WAIT_TIME_S) had passed.
    [supervisor_log] = Path(head["RAY_TMPDIR"]).rglob("supervisor-first.log")
    assert "has been terminated gracefully" in supervisor_log.read_text()
    log = shell.job("logs", "first").stdout
    assert "Press Ctrl-C again" in log and "Stop requested: saving step" in log
    step = int(log.split("Checkpoint saved at step ")[1].split(";")[0])
    assert 8 <= step < 150 and max(losses(shell.runs / "stopped")) == step
    checkpoint = latest_checkpoint(str(shell.runs / "stopped/checkpoints"))
    assert checkpoint is not None and checkpoint.step == step

    # The same job again, stopped as soon as it trains: either before its first step, when there is
    # nothing to save, or after one, when it saves.
    options = ("--no-wait", "--submission-id", "second")
    shell.submit("python", *words, "name=stopped", options=options)
    shell.wait_for("second", "training with 1 worker")
    assert "Job 'second' was stopped" in shell.stop("second")
    log = shell.job("logs", "second").stdout
    assert "run the same command to resume" in log
    checkpoint = latest_checkpoint(str(shell.runs / "stopped/checkpoints"))
    assert checkpoint is not None
    assert checkpoint.step > step if "Stop requested" in log else checkpoint.step == step
    step = checkpoint.step

    assert f"resuming from step {step} " in shell.succeed("python", *words, "name=stopped")
    shell.succeed("python", *words, "name=whole")
    assert losses(shell.runs / "stopped") == losses(shell.runs / "whole")


@pytest.mark.nightly
def test_submit_a_drill(shell: Shell) -> None:
    output = shell.succeed(
        "python", "jobs/drill.py", "jobs/recipes/tiny.yaml", "--faults", "worker", "--steps", "12"
    )
    assert "SIGKILL of a worker" in output and "bitwise" in output


@pytest.mark.slow
def test_a_job_may_set_its_own_stop_timeout(shell: Shell, head: dict[str, str]) -> None:
    runtime_env = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "1"}})
    ignores_sigterm = (
        "import signal, time; signal.signal(signal.SIGTERM, print); print('up', flush=True); "
        "time.sleep(300)"
    )
    options = ("--no-wait", "--submission-id", "stays", "--runtime-env-json", runtime_env)
    shell.job("submit", *options, "--", "python", "-c", ignores_sigterm)
    shell.wait_for("stays", "up")
    assert "Job 'stays' was stopped" in shell.stop("stays")
    [supervisor_log] = Path(head["RAY_TMPDIR"]).rglob("supervisor-stays.log")
    assert "has timed out after 1 seconds" in supervisor_log.read_text()
