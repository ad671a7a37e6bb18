"""Who gets in, and what gets out: tokens, secrets."""

import contextlib
import ipaddress
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import RAY, ROOT, running_head, start_job

TOKEN = "0123456789abcdef" * 3
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret0KEY", "HF_TOKEN": "hf_plantedplantedplanted",
    "WANDB_API_KEY": "planted1wandb2key3",
}  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a shell beside a head that asks for a token, and that holds secrets."""
    home = tmp_path_factory.mktemp("guarded")
    with running_head(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, **SECRETS) as env:
        yield env


def answer(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        return int(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as e:
        return e.code


@pytest.mark.slow
def test_who_has_no_token_is_refused(guarded: dict[str, str]) -> None:
    for page in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors"):
        url = guarded["RAY_ADDRESS"] + page
        assert [answer(url, token) for token in (None, "wrong" * 8, TOKEN)] == [401, 403, 200], page
    without = {k: v for k, v in guarded.items() if not k.startswith("RAY_AUTH")} | {"HOME": "/nowhere"}
    refused = subprocess.run([RAY, "job", "submit", "--", "true"], env=without, capture_output=True, text=True)
    assert refused.returncode and "authentication" in (refused.stdout + refused.stderr).lower()


def listening(process: psutil.Process) -> Iterator[tuple[str, bool]]:
    """Of a process and what it has started: each port that is listened on, in words, and whether for this host alone."""
    for p in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = " ".join(p.cmdline())  # Ray's Python processes give themselves one
            name = title.strip() if title.startswith("ray::") else p.name()
            for c in p.net_connections("inet"):
                if c.status == psutil.CONN_LISTEN:
                    at = ipaddress.ip_address(c.laddr.ip)
                    at = getattr(at, "ipv4_mapped", None) or at
                    yield f"{name} on {c.laddr.ip}", at.is_loopback


@pytest.mark.parametrize(
    "job", [pytest.param("pretrain", marks=pytest.mark.slow), pytest.param("drill", marks=pytest.mark.nightly)]
)
def test_nothing_listens_beyond_loopback(job: str, tree: dict[str, Any], tmp_path: Path) -> None:
    tree |= {"cluster": {"num_workers": 2}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    more = ["-v"] if job == "pretrain" else ["--faults", "worker", "--steps", "12"]  # -v: with the dashboard
    process = start_job(job, "tiny.yaml", *more, home=tmp_path)
    seen: set[tuple[str, bool]] = set()
    with ThreadPoolExecutor(1) as pool, contextlib.suppress(psutil.NoSuchProcess):
        said = pool.submit(process.communicate)
        while not said.done():
            seen |= set(listening(psutil.Process(process.pid)))
            time.sleep(0.1)
    assert process.returncode == 0, said.result()
    assert not {port for port, here in seen if not here}
    names = " ".join(port for port, _ in seen)
    for each in ("gcs_server", "raylet", "ray::DashboardAgent", "ray::TrainController", "ray::RayTrainWorker"):
        assert each in names, seen


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_anywhere(
    guarded: dict[str, str], tree: dict[str, Any], texts: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for part in ("platform", "jobs"):
        shutil.copytree(ROOT / part, checkout / part)
    tree |= {"cluster": {"cpus_per_worker": 0.75}, "checkpoint": {"every": 4}}
    (checkout / "jobs/recipes/tiny.yaml").write_text(yaml.safe_dump(tree))
    pairs = [{"path": str(texts / "pairs")}]
    sft = {
        "name": "sft", "objective": "sft", "model": {"path": "runs/tiny"}, "adapter": {"rank": 2},
        "data": {"sources": pairs, "validation": pairs, "sequence_length": 64, "lanes": 2, "executor": "inline"},
        "train": {"global_batch": 4, "micro_batch": 4, "steps": 2}, "validation": {"every": 1, "rows": 8},
        "search": {"trials": 2, "scheduler": "none", "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}},
        "cluster": {"cpus_per_worker": 0.75},
    }  # fmt: skip
    (checkout / "jobs/recipes/sft.yaml").write_text(yaml.safe_dump(sft))
    for job, recipe in (("pretrain", "tiny"), ("finetune", "sft"), ("sweep", "sft")):
        words = ["python", f"jobs/{job}.py", f"jobs/recipes/{recipe}.yaml", "-v"]
        whole = [RAY, "job", "submit", "--working-dir", ".", "--", *words]
        done = subprocess.run(whole, cwd=checkout, env=guarded, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    pages = []
    for page in (
        "/api/jobs/",
        "/api/v0/actors?detail=1",
        "/api/v0/workers?detail=1",
        "/api/v0/runtime_envs",
        "/logical/actors",
    ):
        request = urllib.request.Request(guarded["RAY_ADDRESS"] + page, headers={"Authorization": f"Bearer {TOKEN}"})
        pages.append(urllib.request.urlopen(request, timeout=20).read())
    assert all(job in pages[0] for job in (b"pretrain.py", b"finetune.py", b"sweep.py"))
    written = [p for root in (guarded["HOME"], guarded["RAY_TMPDIR"]) for p in Path(root).rglob("*") if p.is_file()]
    names = {p.name for p in written}
    assert {"recipe.yaml", "trials.csv", "report.html", "adapter_model.safetensors", "reports.json"} <= names
    assert any(p.suffix == ".log" for p in written) and any("checkpoints" in p.parts and "trials" in p.parts for p in written)
    found = {str(p): raw for p in written if (raw := _read(p)) is not None} | dict(zip("abcde", pages, strict=True))
    leaks = {(where, name) for where, raw in found.items() for name, s in SECRETS.items() if s.encode() in raw}
    assert not leaks


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # a socket; gone meanwhile
        return None
