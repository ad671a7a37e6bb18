"""Access control: authentication tokens, listening ports, secrets of the environment."""

import contextlib
import ipaddress
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
from conftest import RAY, running_head, start_job
from helpers.checkout import write_checkout

TOKEN = "0123456789abcdef" * 3
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret0KEY",
    "HF_TOKEN": "hf_plantedplantedplanted",
    "WANDB_API_KEY": "planted1wandb2key3",
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for commands of a cluster that requires a token and has secrets set."""
    home = tmp_path_factory.mktemp("guarded")
    with running_head(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, **SECRETS) as env:
        yield env


def http_status(url: str, token: str | None) -> int:
    """Returns the HTTP status of a request with this token."""
    request = urllib.request.Request(
        url, headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        return int(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as e:
        return e.code


@pytest.mark.slow
def test_requests_without_the_token_are_refused(guarded: dict[str, str]) -> None:
    for page in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors"):
        url = guarded["RAY_ADDRESS"] + page
        statuses = [http_status(url, token) for token in (None, "wrong" * 8, TOKEN)]
        assert statuses == [401, 403, 200], page
    env = {k: v for k, v in guarded.items() if not k.startswith("RAY_AUTH")}
    env["HOME"] = "/nowhere"
    result = subprocess.run(
        [RAY, "job", "submit", "--", "true"], env=env, capture_output=True, text=True
    )
    assert result.returncode and "authentication" in (result.stdout + result.stderr).lower()


def listening(process: psutil.Process) -> Iterator[tuple[str, bool]]:
    """Yields each listening socket of a process and its descendants.

    Yields:
        "PROCESS on ADDRESS", and whether the address is a loopback address.
    """
    for p in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            # Ray's Python processes set their own title.
            title = " ".join(p.cmdline())
            name = title.strip() if title.startswith("ray::") else p.name()
            for c in p.net_connections("inet"):
                if c.status == psutil.CONN_LISTEN:
                    address = ipaddress.ip_address(c.laddr.ip)
                    address = getattr(address, "ipv4_mapped", None) or address
                    yield f"{name} on {c.laddr.ip}", address.is_loopback


@pytest.mark.parametrize(
    "job",
    [
        pytest.param("pretrain", marks=pytest.mark.slow),
        pytest.param("drill", marks=pytest.mark.nightly),
    ],
)
def test_nothing_listens_beyond_loopback(job: str, tree: dict[str, Any], tmp_path: Path) -> None:
    tree |= {"cluster": {"num_workers": 2}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    # With -v, the job starts Ray's dashboard too.
    options = ["-v"] if job == "pretrain" else ["--faults", "worker", "--steps", "12"]
    process = start_job(job, "tiny.yaml", *options, home=tmp_path)
    sockets: set[tuple[str, bool]] = set()
    with ThreadPoolExecutor(1) as pool, contextlib.suppress(psutil.NoSuchProcess):
        output = pool.submit(process.communicate)
        while not output.done():
            sockets |= set(listening(psutil.Process(process.pid)))
            time.sleep(0.1)
    assert process.returncode == 0, output.result()
    assert not {socket for socket, is_loopback in sockets if not is_loopback}
    names = " ".join(socket for socket, _ in sockets)
    for name in (
        "gcs_server",
        "raylet",
        "ray::DashboardAgent",
        "ray::TrainController",
        "ray::RayTrainWorker",
    ):
        assert name in names, sockets


@pytest.mark.slow
def test_secrets_of_the_environment_are_not_written_to_files(
    guarded: dict[str, str], tree: dict[str, Any], texts: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    write_checkout(checkout, tree | {"checkpoint": {"every": 4}}, texts)
    for job, recipe in (("pretrain", "tiny"), ("finetune", "sft"), ("sweep", "sft")):
        script = ["python", f"jobs/{job}.py", f"jobs/recipes/{recipe}.yaml", "-v"]
        command = [RAY, "job", "submit", "--working-dir", ".", "--", *script]
        result = subprocess.run(
            command, cwd=checkout, env=guarded, capture_output=True, text=True, timeout=400
        )
        assert result.returncode == 0, result.stdout + result.stderr
    pages = []
    for page in (
        "/api/jobs/",
        "/api/v0/actors?detail=1",
        "/api/v0/workers?detail=1",
        "/api/v0/runtime_envs",
        "/logical/actors",
    ):
        request = urllib.request.Request(
            guarded["RAY_ADDRESS"] + page, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        pages.append(urllib.request.urlopen(request, timeout=20).read())
    assert all(job in pages[0] for job in (b"pretrain.py", b"finetune.py", b"sweep.py"))
    files = [
        p
        for root in (guarded["HOME"], guarded["RAY_TMPDIR"])
        for p in Path(root).rglob("*")
        if p.is_file()
    ]
    names = {p.name for p in files}
    expected = {"recipe.yaml", "trials.csv", "report.html", "reports.json"}
    assert expected | {"adapter_model.safetensors"} <= names
    assert any(p.suffix == ".log" for p in files)
    assert any("checkpoints" in p.parts and "trials" in p.parts for p in files)
    contents = {str(p): content for p in files if (content := _read(p)) is not None}
    contents |= dict(zip("abcde", pages, strict=True))
    leaks = {
        (path, name)
        for path, content in contents.items()
        for name, secret in SECRETS.items()
        if secret.encode() in content
    }
    assert not leaks


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # a socket, or a file that was removed in the meantime
        return None
