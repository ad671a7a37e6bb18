"""Shared fixtures and helpers: text data in parquet, a shared Ray cluster, jobs, process groups."""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

for variable in ("RAY_ADDRESS", "SEVENFOLD_HOME"):
    os.environ.pop(variable, None)
# A shell that starts the tests with `&` makes them ignore SIGINT, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Several test processes share the cores, so each library gets one thread.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# Every Ray cluster that this process starts keeps its files here.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="sf")
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
PACKAGES = ("json", "email", "http", "logging", "asyncio", "importlib", "unittest", "xml")
# Environment variable with the folder that all processes of one test session share.
SHARED = "SEVENFOLD_TEST_SHARED"
# The slowest test files start first: a slow test that starts last would prolong the session.
FIRST = (
    "cluster/test_ray_up",
    "test_main_path",
    "train/test_kills",
    "sweep/test_sweep",
    "faults/test_drill",
    "cluster/test_submit",
    "train/test_finetune_jobs",
    "cluster/test_pools",
    "cluster/test_access",
    "data/test_stream",
    "plan/test_command",
    "test_storage",
)


def pytest_configure(config: pytest.Config) -> None:
    # Only pytest-xdist's workers have `workerinput`; the controller creates the shared folder.
    if not hasattr(config, "workerinput"):
        os.environ[SHARED] = tempfile.mkdtemp(prefix="sf")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        folder = Path(os.environ.pop(SHARED))
        if (folder / "ray/head.json").exists():
            end_tree(json.loads((folder / "ray/head.json").read_text())["pid"])
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by FIRST, so that their order is the same in each session."""
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(_test_file(item), len(order)))


def _test_file(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").with_suffix("").as_posix()


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder of the test session, after `make` has filled it.

    The first process that calls this for a name runs `make`; the others wait for it.
    """
    folder = Path(os.environ[SHARED]) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            folder.with_suffix(".made").touch()
    return folder


def stdlib_texts() -> list[str]:
    """Returns the source text of each module of the standard library's PACKAGES."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [
        p.read_text(encoding="utf-8")
        for package in PACKAGES
        for p in sorted(stdlib.joinpath(package).glob("*.py"))
    ]


def write_shards(folder: Path, rows: list[dict[str, str]], shards: int = 2, group: int = 4) -> None:
    """Writes rows to parquet files in a new folder, round robin; `group` is rows per row group."""
    folder.mkdir(parents=True)
    for i in range(shards):
        pq.write_table(
            pa.Table.from_pylist(rows[i::shards]),
            folder / f"shard-{i:05d}.parquet",
            row_group_size=group,
        )


@pytest.fixture(scope="session")
def texts() -> Path:
    """A folder with about 1.5 MB of real text in parquet.

    `train` and `heldout` contain documents, `pairs` contains prompts and completions.
    """
    return once("texts", _write_texts)


def _write_texts(root: Path) -> None:
    documents = [t for t in stdlib_texts() if len(t) > 200]
    write_shards(root / "train", [{"text": t} for t in documents[4:]])
    write_shards(root / "heldout", [{"text": t} for t in documents[:4]])
    pairs = [
        {
            "prompt": f"{name}\n# In one line: ",
            "completion": t.strip().splitlines()[0][:80] or "none",
        }
        for name, t in zip(range(10_000), documents, strict=False)
    ]
    write_shards(root / "pairs", pairs, group=16)


RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "data": {"sequence_length": 64, "lanes": 4},
    "tokenizer": {"vocab_size": 512, "train_mb": 0.3},
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    },
    "train": {"global_batch": 8, "micro_batch": 4, "steps": 8, "log_every": 1},
    "optimizer": {"learning_rate": 1e-2},
}


@pytest.fixture
def tree(texts: Path) -> dict[str, Any]:
    """A recipe that trains a tiny model in seconds, as a dictionary."""
    recipe = json.loads(json.dumps(RECIPE))
    recipe["data"]["sources"] = [{"path": str(texts / "train")}]
    recipe["data"]["validation"] = [{"path": str(texts / "heldout")}]
    return recipe


# The number of optimizer steps of the run `whole` of the fixture `home`.
STEPS = 60


@pytest.fixture(scope="session")
def home() -> Path:
    """A working folder (SEVENFOLD_HOME) with two recipes and one finished run.

    `pretrain.yaml` has two workers and two sources whose mixture changes twice in two epochs;
    `sft.yaml` is a sweep over adapters. The run `whole` is a finished run of `pretrain.yaml`,
    started by its job; the job's standard output is in `whole.log`. Tests add runs under their
    own names and do not change this one.
    """
    return once("home", _write_home)


def _write_home(root: Path) -> None:
    texts = [t[:3000] for t in stdlib_texts() if len(t) > 300]
    for name, part in (("code.jsonl", texts[:40]), ("more.jsonl", texts[40:60])):
        (root / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    write_shards(root / "heldout", [{"text": t} for t in texts[60:64]])
    pairs = [
        {"prompt": f"{i}\n# In one line: ", "completion": t.strip().splitlines()[0][:80]}
        for i, t in enumerate(texts[:60])
    ]
    write_shards(root / "pairs", pairs, group=16)
    tree = json.loads(json.dumps(RECIPE))
    tree["data"] |= {
        "sources": [
            {"path": str(root / "code.jsonl"), "weight": 3},
            {"path": str(root / "more.jsonl"), "weight": 1},
        ],
        "curriculum": [
            {"at_tokens": 40_000, "weights": {"code.jsonl": 1, "more.jsonl": 1}},
            {"at_tokens": 80_000, "weights": {"code.jsonl": 4, "more.jsonl": 1}},
        ],
        "validation": [{"path": str(root / "heldout")}],
        "sequence_length": 128,
        "lanes": 4,
    }
    tree["train"] |= {"global_batch": 16, "micro_batch": 4, "steps": STEPS}
    tree |= {
        "checkpoint": {"every": 5},
        "validation": {"every": 30, "rows": 16},
        "cluster": {"num_workers": 2},
    }
    (root / "pretrain.yaml").write_text(yaml.safe_dump(tree))
    sft: dict[str, Any] = {
        "name": "sft",
        "seed": 1,
        "objective": "sft",
        "model": {"path": "runs/whole"},
        "adapter": {"rank": 4},
        "data": {
            "sources": [{"path": str(root / "pairs")}],
            "validation": [{"path": str(root / "pairs" / "*1.parquet")}],
            "sequence_length": 64,
            "lanes": 2,
            "executor": "inline",
        },
        "train": {"global_batch": 4, "micro_batch": 4, "steps": 6, "log_every": 2},
        "validation": {"every": 2, "rows": 8, "generate": 4, "max_new_tokens": 5},
        "sweep": {
            "trials": 2,
            "metric": "validation/loss",
            "max_concurrent": 1,
            "space": {
                "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
                "adapter.rank": {"choice": [2, 4]},
            },
        },
    }
    (root / "sft.yaml").write_text(yaml.safe_dump(sft))
    (root / "whole.log").write_text(run_job("pretrain", "pretrain.yaml", "name=whole", home=root))


def start_job(*args: str, home: Path) -> subprocess.Popen[str]:
    """Starts `jobs/NAME.py ...` in its own process, as a user does; the job starts a local Ray."""
    env = {**os.environ, "SEVENFOLD_HOME": str(home)}
    command = [sys.executable, str(ROOT / "jobs" / f"{args[0]}.py"), *args[1:]]
    return subprocess.Popen(
        command, env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_job(*args: str, home: Path, code: int = 0) -> str:
    """Runs a job to its end and checks its exit code.

    Returns:
        The job's standard output if `code` is 0, otherwise its standard error.
    """
    process = start_job(*args, home=home)
    try:
        stdout, stderr = process.communicate(timeout=400)
    except BaseException:
        # It hangs: end it, so that it does not disturb other tests, and show what it printed.
        process.terminate()
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        print(f"{args} was ended\n{stdout}\n{stderr}")
        raise
    assert process.returncode == code, f"{args}: exit {process.returncode}\n{stdout}\n{stderr}"
    return stdout if code == 0 else stderr


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command in this process that must reject its input, and returns the error line.

    The command must exit with code 2 and print one line that starts with "error: ", no traceback.
    """
    from sevenfold.cli import main

    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as e:
        code = int(e.code or 0)
    if "ray" in sys.modules:
        # The command relies on Ray's shutdown at the end of its process.
        sys.modules["ray"].shutdown()
    stderr = capsys.readouterr().err
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in stderr, stderr
    return errors[0]


def free_port() -> int:
    """Returns a TCP port of the loopback interface that is free at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running_head(home: Path, **environment: str) -> Iterator[dict[str, str]]:
    """Runs `ray start --head` with extra environment variables, and ends it afterwards.

    Yields:
        The environment for commands of this cluster; RAY_ADDRESS is the dashboard's URL.
    """
    process, env, _ = start_head(home, **environment)
    try:
        yield env
    finally:
        end_tree(process.pid)
        process.wait(60)


def start_head(
    home: Path, cpus: int = 2, **environment: str
) -> tuple[subprocess.Popen[bytes], dict[str, str], int]:
    """Starts `ray start --head --block` and waits until its job server answers.

    Returns:
        Its process, the environment for commands of this cluster, and the port of its GCS.
    """
    gcs, dashboard = free_port(), free_port()
    env = {
        **os.environ,
        "HOME": str(home),
        # Its own folder: a local Ray that ends removes the file there by which the jobs of the head
        # find its address. Then Ray 2.60 picks any Ray that runs on the machine.
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="h", dir=os.environ["RAY_TMPDIR"]),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        **environment,
    }
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    start = [
        RAY,
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={200 * 2**20}",
        f"--ray-client-server-port={free_port()}",
        # The default port is taken if another Ray runs on this machine.
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    process = subprocess.Popen(
        start,
        env={k: v for k, v in env.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    token = {"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"} if "RAY_AUTH_TOKEN" in env else {}
    while True:
        with contextlib.suppress(OSError):
            request = urllib.request.Request(f"{env['RAY_ADDRESS']}/api/jobs/", headers=token)
            urllib.request.urlopen(request, timeout=20).close()
            return process, env, gcs
        if process.poll() is not None or time.monotonic() > deadline:
            end_tree(process.pid)
            raise AssertionError("the head did not start")
        time.sleep(0.2)


def end_tree(pid: int) -> None:
    """Kills a process and all its descendants; Ray's graceful shutdown would take 30 seconds."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


@pytest.fixture(scope="session")
def shared_head() -> dict[str, str]:
    """The environment for commands of the Ray cluster that the tests of this session share.

    RAY_ADDRESS is the URL of the dashboard, GCS_ADDRESS the address for `ray.init`. HOME is a
    temporary folder.
    """

    def start(folder: Path) -> None:
        (folder / "home").mkdir()
        # The settings are those of cluster.yaml. Several tests use this cluster at the same
        # time, so it has many (logical) CPUs.
        settings = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "RAY_prestart_worker_first_driver": "0",
        }
        process, env, gcs = start_head(folder / "home", 64, **settings)
        env["GCS_ADDRESS"] = f"127.0.0.1:{gcs}"
        (folder / "head.json").write_text(json.dumps({"pid": process.pid, "env": env}))

    env: dict[str, str] = json.loads((once("ray", start) / "head.json").read_text())["env"]
    return env


@pytest.fixture
def no_ray_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts Ray clusters in this process without a token, as `on_shared_ray` connects.

    Ray reads the mode once per process: with both modes in one process, the second one fails.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def on_shared_ray(shared_head: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes jobs of this test, in any process, connect to the shared Ray cluster."""
    import ray

    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ |= {"RAY_ADDRESS": shared_head["GCS_ADDRESS"], "RAY_AUTH_MODE": "disabled"}
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ |= before


def run_ranks(world: int, store: Path, target: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs target(*args) in `world` processes of one gloo group; returns their results by rank."""
    store.parent.mkdir(parents=True, exist_ok=True)
    results: Any = RANKS.Queue()
    processes = [rank_process(r, world, store, results, target, *args) for r in range(world)]
    for p in processes:
        p.start()
    outcomes = [results.get(timeout=300) for _ in processes]
    for p in processes:
        p.join(60)
    for _, error, _ in outcomes:
        assert error is None, error
    return [value for _, _, value in sorted(outcomes, key=lambda outcome: outcome[0])]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """Makes this process the only rank of a gloo group."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


# Ranks are forked from one server process that has already imported the slow modules.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "sevenfold.model.build",
        "sevenfold.model.parallel",
        "ray.train",
    ]
)


def rank_process(
    rank: int, world: int, store: Path, results: Any, target: Callable[..., Any], *args: Any
) -> Any:
    """Returns a process, not yet started, that puts (rank, error, result of target) in results."""
    return RANKS.Process(
        target=_rank, args=(rank, world, str(store), results, dict(os.environ), target, args)
    )


def _rank(
    rank: int,
    world: int,
    store: str,
    results: Any,
    env: dict[str, str],
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(env | {"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        results.put((rank, None, target(*args)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="session")
def moto() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An S3 server in its own process, and its URL."""
    program = shutil.which("moto_server", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("moto_server is not installed")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [program, "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    yield process, f"http://127.0.0.1:{port}"
    # A test may have left it stopped (SIGSTOP).
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.wait(20)


def ask(method: str, url: str, data: bytes = b"") -> None:
    """Sends an HTTP request and ignores the response's body."""
    urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method)
    ).close()


@pytest.fixture
def bucket(moto: tuple[subprocess.Popen[bytes], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; the environment variables for access are set."""
    address = moto[1]
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("ENDPOINT_URL", address),
        ("ACCESS_KEY_ID", "test"),
        ("SECRET_ACCESS_KEY", "test"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    ask("POST", f"{address}/moto-api/reset-auth", b"1000000")
    ask("POST", f"{address}/moto-api/reset")
    ask("PUT", f"{address}/bucket")
    return "s3://bucket"
