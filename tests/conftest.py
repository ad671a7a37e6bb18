"""What the tests share: real text in parquet, one Ray for those that need none of their own, groups of real processes."""

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
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):  # several processes share the cores
    os.environ.setdefault(threads, "1")
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="sf")  # every Ray that this process starts lies here
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
PACKAGES = ("json", "email", "http", "logging", "asyncio", "importlib", "unittest", "xml")
SHARED = "SEVENFOLD_TEST_SHARED"  # variable: the folder that all processes of one test session share
# Files whose tests take longest come first: what begins last decides when all have ended.
FIRST = (
    "cluster/test_ray_up", "runs/test_main_path", "runs/test_submit", "runs/test_sweep", "runs/test_drill",
    "cluster/test_pools", "cluster/test_access", "runs/test_uses", "data/test_stream", "plan/test_command", "test_storage",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that starts the others
        os.environ[SHARED] = tempfile.mkdtemp(prefix="sf")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        folder = Path(os.environ.pop(SHARED))
        if (folder / "ray/head.json").exists():
            end_tree(json.loads((folder / "ray/head.json").read_text())["pid"])
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The same order each time."""
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(_name(item), len(order)))


def _name(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").with_suffix("").as_posix()


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder of the test session that `make` has filled: whichever process asks first does it, the others wait."""
    folder = Path(os.environ[SHARED]) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            folder.with_suffix(".made").touch()
    return folder


def stdlib_texts() -> list[str]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [p.read_text(encoding="utf-8") for package in PACKAGES for p in sorted(stdlib.joinpath(package).glob("*.py"))]


def write_shards(folder: Path, rows: list[dict[str, str]], shards: int = 2, group: int = 4) -> None:
    folder.mkdir(parents=True)
    for i in range(shards):
        pq.write_table(pa.Table.from_pylist(rows[i::shards]), folder / f"shard-{i:05d}.parquet", row_group_size=group)


@pytest.fixture(scope="session")
def texts() -> Path:
    """Folders `train` and `heldout` of documents, `pairs` of prompts and completions: about 1.5 MB of real text."""
    return once("texts", _write_texts)


def _write_texts(root: Path) -> None:
    documents = [t for t in stdlib_texts() if len(t) > 200]
    write_shards(root / "train", [{"text": t} for t in documents[4:]])
    write_shards(root / "heldout", [{"text": t} for t in documents[:4]])
    pairs = [
        {"prompt": f"{name}\n# In one line: ", "completion": t.strip().splitlines()[0][:80] or "none"}
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
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
        }
    },
    "train": {"global_batch": 8, "micro_batch": 4, "steps": 8, "log_every": 1},
    "optimizer": {"learning_rate": 1e-2},
}  # fmt: skip


@pytest.fixture
def tree(texts: Path) -> dict[str, Any]:
    """A recipe that trains a tiny model in seconds, as plain data."""
    made = json.loads(json.dumps(RECIPE))
    made["data"]["sources"] = [{"path": str(texts / "train")}]
    made["data"]["validation"] = [{"path": str(texts / "heldout")}]
    return made


STEPS = 60  # of the finished run


@pytest.fixture(scope="session")
def home() -> Path:
    """A folder with the recipe `pretrain.yaml`, of two workers and two sources whose mixture changes twice in two epochs, and
    `sft.yaml`, a sweep of adapters; and the finished run `whole` of the first, made as a person makes it. What it said lies in
    `whole.log`. Tests add runs of their own names and leave this one as it is."""
    return once("home", _write_home)


def _write_home(root: Path) -> None:
    texts = [t[:3000] for t in stdlib_texts() if len(t) > 300]
    for name, part in (("code.jsonl", texts[:40]), ("more.jsonl", texts[40:60])):
        (root / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    write_shards(root / "heldout", [{"text": t} for t in texts[60:64]])
    pairs = [
        {"prompt": f"{i}\n# In one line: ", "completion": t.strip().splitlines()[0][:80]} for i, t in enumerate(texts[:60])
    ]
    write_shards(root / "pairs", pairs, group=16)
    tree = json.loads(json.dumps(RECIPE))
    tree["data"] |= {
        "sources": [{"path": str(root / "code.jsonl"), "weight": 3}, {"path": str(root / "more.jsonl"), "weight": 1}],
        "curriculum": [
            {"at_tokens": 40_000, "weights": {"code.jsonl": 1, "more.jsonl": 1}},
            {"at_tokens": 80_000, "weights": {"code.jsonl": 4, "more.jsonl": 1}},
        ],
        "validation": [{"path": str(root / "heldout")}], "sequence_length": 128, "lanes": 4,
    }  # fmt: skip
    tree["train"] |= {"global_batch": 16, "micro_batch": 4, "steps": STEPS}
    tree |= {"checkpoint": {"every": 5}, "validation": {"every": 30, "rows": 16}, "cluster": {"num_workers": 2}}
    (root / "pretrain.yaml").write_text(yaml.safe_dump(tree))
    sft: dict[str, Any] = {
        "name": "sft", "seed": 1, "objective": "sft", "model": {"path": "runs/whole"}, "adapter": {"rank": 4},
        "data": {
            "sources": [{"path": str(root / "pairs")}], "validation": [{"path": str(root / "pairs" / "*1.parquet")}],
            "sequence_length": 64, "lanes": 2, "executor": "inline",
        },
        "train": {"global_batch": 4, "micro_batch": 4, "steps": 6, "log_every": 2},
        "validation": {"every": 2, "rows": 8, "generate": 4, "max_new_tokens": 5},
        "search": {
            "trials": 2, "metric": "validation/loss", "max_concurrent": 1,
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}, "adapter.rank": {"choice": [2, 4]}},
        },
    }  # fmt: skip
    (root / "sft.yaml").write_text(yaml.safe_dump(sft))
    (root / "whole.log").write_text(run_job("pretrain", "pretrain.yaml", "name=whole", home=root))


def start_job(*args: str, home: Path) -> subprocess.Popen[str]:
    """A job in a process of its own, as a person starts it: `jobs/NAME.py ...`, with a local Ray."""
    env = {**os.environ, "SEVENFOLD_HOME": str(home)}
    command = [sys.executable, str(ROOT / "jobs" / f"{args[0]}.py"), *args[1:]]
    return subprocess.Popen(command, env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_job(*args: str, home: Path, code: int = 0) -> str:
    """Runs a job to its end, which must have this exit code. Returns its standard output, or error where it failed."""
    process = start_job(*args, home=home)
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, f"{args}: exit {process.returncode}\n{out}\n{err}"
    return out if code == 0 else err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command in this process, which must refuse its input with one line. Returns that."""
    from sevenfold.cli import main

    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as e:
        code = int(e.code or 0)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()  # what the end of a process does
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said
    return errors[0]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running_head(home: Path, **environment: str) -> Iterator[dict[str, str]]:
    """Runs Ray's own `ray start --head` in a shell of this environment. Yields that, with the head's address."""
    process, env, _ = start_head(home, **environment)
    try:
        yield env
    finally:
        end_tree(process.pid)
        process.wait(60)


def start_head(home: Path, cpus: int = 2, **environment: str) -> tuple[subprocess.Popen[bytes], dict[str, str], int]:
    """Starts a head. Returns its process, the environment of a shell beside it, and the port of its GCS."""
    gcs, dashboard = free_port(), free_port()
    env = {**os.environ, "HOME": str(home), "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    start = [
        RAY, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--num-cpus={cpus}",
        f"--object-store-memory={200 * 2**20}", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",  # its default is taken where another Ray runs
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(start, env={k: v for k, v in env.items() if k != "RAY_ADDRESS"}, **quiet)  # type: ignore[call-overload]
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
    """Ends a process and all that it started, at once: asked politely, Ray takes half a minute to drain itself."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.fixture(scope="session")
def shared_head() -> dict[str, str]:
    """The environment of a shell beside the one Ray of this test session, for tests that need none of their own. Its
    dashboard's address is RAY_ADDRESS, its own GCS_ADDRESS; its HOME is not the person's."""

    def start(folder: Path) -> None:
        (folder / "home").mkdir()
        # as cluster.yaml has it; many CPUs, since several tests use it at once
        settings = {"RAY_AUTH_MODE": "disabled", "RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_prestart_worker_first_driver": "0"}
        process, env, gcs = start_head(folder / "home", 64, **settings)
        env["GCS_ADDRESS"] = f"127.0.0.1:{gcs}"
        (folder / "head.json").write_text(json.dumps({"pid": process.pid, "env": env}))

    found: dict[str, str] = json.loads((once("ray", start) / "head.json").read_text())["env"]
    return found


@pytest.fixture
def on_shared_ray(shared_head: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs of this test, in this process or another one, connect to the Ray of the test session."""
    import ray

    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ |= {"RAY_ADDRESS": shared_head["GCS_ADDRESS"], "RAY_AUTH_MODE": "disabled"}
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ |= before


def run_ranks(world: int, store: Path, target: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs target(*args) on `world` real processes of one gloo group; returns what each returned, by rank."""
    store.parent.mkdir(parents=True, exist_ok=True)
    results: Any = RANKS.Queue()
    processes = [rank_process(r, world, store, results, target, *args) for r in range(world)]
    for p in processes:
        p.start()
    got = [results.get(timeout=300) for _ in processes]
    for p in processes:
        p.join(60)
    for _, error, _ in got:
        assert error is None, error
    return [value for _, _, value in sorted(got, key=lambda g: g[0])]


# forked from one process that has imported what all of them import
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["torch.distributed.checkpoint", "sevenfold.model.build", "sevenfold.model.parallel", "ray.train"])


def rank_process(rank: int, world: int, store: Path, results: Any, target: Callable[..., Any], *args: Any) -> Any:
    """A process, not yet started, that puts (rank, error, what target(*args) returned) into results."""
    return RANKS.Process(target=_rank, args=(rank, world, str(store), results, dict(os.environ), target, args))


def _rank(
    rank: int, world: int, store: str, results: Any, env: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]
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
    """An S3 server in a process of its own, and its address."""
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
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.wait(20)


def ask(method: str, url: str, data: bytes = b"") -> None:
    urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method)).close()


@pytest.fixture
def bucket(moto: tuple[subprocess.Popen[bytes], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, with the environment that leads to it."""
    address = moto[1]
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (("ENDPOINT_URL", address), ("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(f"AWS_{name}", value)
    ask("POST", f"{address}/moto-api/reset-auth", b"1000000")
    ask("POST", f"{address}/moto-api/reset")
    ask("PUT", f"{address}/bucket")
    return "s3://bucket"
