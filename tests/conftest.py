"""What the tests share: real text in parquet, and process groups of real processes."""

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
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="sf")  # every Ray of these tests lies here
os.environ.pop("RAY_ADDRESS", None)
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
PACKAGES = ("json", "email", "http", "logging", "asyncio", "importlib", "unittest", "xml")


BEGIN = time.monotonic()
SECONDS = float(os.environ.get("SEVENFOLD_TEST_SECONDS", "inf"))  # that there are for the tests; no more begin after it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where time is short, each day begins with other tests, so that each has its day."""
    if float("inf") > SECONDS and items:
        first = date.today().toordinal() * 7 % len(items)
        items[:] = items[first:] + items[:first]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if time.monotonic() - BEGIN > SECONDS:
        pytest.skip("no time left (SEVENFOLD_TEST_SECONDS)")


def stdlib_texts() -> list[str]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [p.read_text(encoding="utf-8") for package in PACKAGES for p in sorted(stdlib.joinpath(package).glob("*.py"))]


def write_shards(folder: Path, rows: list[dict[str, str]], shards: int = 2, group: int = 4) -> None:
    folder.mkdir(parents=True)
    for i in range(shards):
        pq.write_table(pa.Table.from_pylist(rows[i::shards]), folder / f"shard-{i:05d}.parquet", row_group_size=group)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` and `heldout` of documents, `pairs` of prompts and completions: about 1.5 MB of real text."""
    root = tmp_path_factory.mktemp("texts")
    documents = [t for t in stdlib_texts() if len(t) > 200]
    write_shards(root / "train", [{"text": t} for t in documents[4:]])
    write_shards(root / "heldout", [{"text": t} for t in documents[:4]])
    pairs = [
        {"prompt": f"{name}\n# In one line: ", "completion": t.strip().splitlines()[0][:80] or "none"}
        for name, t in zip(range(10_000), documents, strict=False)
    ]
    write_shards(root / "pairs", pairs, group=16)
    return root


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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running_head(home: Path, **environment: str) -> Iterator[dict[str, str]]:
    """Ray's own `ray start --head`, in a shell of this environment. Yields it, with the head's address."""
    gcs, dashboard = free_port(), free_port()
    env = {**os.environ, "HOME": str(home), "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    start = [
        RAY, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2",
        f"--object-store-memory={200 * 2**20}", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",  # its default is taken where another Ray runs
    ]  # fmt: skip
    process = subprocess.Popen(start, env={k: v for k, v in env.items() if k != "RAY_ADDRESS"}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run([RAY, "job", "submit", "--", "true"], env=env, capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < deadline, "the head did not start"
            time.sleep(1)
        yield env
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()  # asked politely it takes half a minute to drain itself
        process.kill()
        process.wait(60)


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
