"""Twelve secrets are given to a run, a sweep, an evaluation and an export; none is found."""

import base64
import json
import os
import secrets
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from helpers import tiny_models
from helpers.modes import wrong_modes
from hostile.secret_server import secret_server

# It differs from every fixed mode that a program might give: 600, 644, 664 and 666.
UMASK = 0o027
VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")


def _forms(secret: str) -> set[bytes]:
    """Returns a secret as it is, encoded for a URL, and in base64 at each place."""
    forms = {secret, urllib.parse.quote(secret, safe=""), urllib.parse.quote(secret)}
    forms.add(secret.replace("/", "%2F"))
    encoded = {form.encode() for form in forms}
    for offset in range(3):
        # The characters at both ends depend on the neighbours as well.
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded.add(encode(b"\0" * offset + secret.encode()).rstrip(b"=")[4:-2])
    return encoded


def _contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yields what each file holds, and its path."""
    # os.walk passes over what the last processes of Ray remove in the meantime.
    paths = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    for path in paths:
        yield f"{path}: its name", os.fsencode(path.name)
        if path.is_symlink() or not path.is_file():
            continue
        yield str(path), path.read_bytes()
        if path.suffix == ".parquet":  # whose columns are compressed
            table = pq.read_table(path)
            yield f"{path}: columns", repr((table.to_pydict(), table.schema.metadata)).encode()


def _find(planted: dict[str, str], contents: dict[str, bytes]) -> set[tuple[str, str]]:
    """Returns which secret was found where."""
    return {
        (name, where)
        for name, secret in planted.items()
        for form in _forms(secret)
        for where, content in contents.items()
        if form in content
    }


PLACES: dict[str, Callable[[Path, str], object]] = {
    "text": lambda folder, secret: (folder / "a.log").write_text(f"token {secret}."),
    "encoded for a URL": lambda folder, secret: (folder / "a.yaml").write_text(
        f"https://h/?s={urllib.parse.quote(secret, safe='')}"
    ),
    "basic authentication": lambda folder, secret: (folder / "a.bin").write_bytes(
        base64.b64encode(f"me:{secret}".encode())
    ),
    "base64 within other bytes": lambda folder, secret: (folder / "a.bin").write_bytes(
        base64.urlsafe_b64encode(b"12" + secret.encode() + b"345")
    ),
    "a compressed column": lambda folder, secret: pq.write_table(
        pa.table({"a": [secret] * 1000}), folder / "a.parquet", compression="zstd"
    ),
    "the name of a file": lambda folder, secret: (folder / secret.replace("/", "%2F")).touch(),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_secret_is_found(place: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for i in range(20):
        planted = {"secret": f"k/+{secrets.token_hex(16)}", "other": secrets.token_hex(16)}
        folder = tmp_path / "deep" / str(i)
        folder.mkdir()
        PLACES[place](folder, planted["secret"])
        assert {name for name, _ in _find(planted, dict(_contents(folder)))} == {"secret"}


def _watch(commands: set[str], typed: set[int], stop: threading.Event) -> None:
    """Collects the command lines of all processes but those that the user has typed."""
    while not stop.wait(0.2):
        for process in psutil.process_iter(["cmdline"]):
            if process.pid not in typed and process.pid != os.getpid():
                commands.add(" ".join(process.info["cmdline"] or ()))


@pytest.mark.slow
def test_twelve_secrets_are_used_and_found_nowhere(
    texts: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    names = (
        "password of the data",
        "signature of the data",
        "password of the validation data",
        "signature of the validation data",
        "password of the test data",
        "password of the model",
        "password of a proxy",
        "RAY_AUTH_TOKEN",
        *VARIABLES,
    )
    planted = {name: f"k/+{secrets.token_hex(16)}" for name in names}
    planted["RAY_AUTH_TOKEN"] = secrets.token_hex(24)  # a header
    assert len(planted) == len(set(planted.values())) == 12

    served = tmp_path / "served"
    served.mkdir()
    for name in ("train", "heldout"):
        rows = pq.read_table(texts / name, columns=["text"])["text"].to_pylist()[:20]
        lines = [json.dumps({"text": row[:2000]}) + "\n" for row in rows]
        (served / f"{name}.jsonl").write_text("".join(lines))
    tiny_models.save(served / "model", "llama")

    folders = {name: tmp_path / name for name in ("home", "work")}
    # short, for the sockets of Python's own processes
    folders["tmp"] = Path(os.environ["RAY_TMPDIR"], "tmp")
    for folder in folders.values():
        folder.mkdir(0o700)
    ray_folder = Path(os.environ["RAY_TMPDIR"], "t")
    ray_folder.mkdir()
    with ExitStack() as stack:

        def serve(password: str, signature: str = "unsigned") -> Any:
            query = f"v=1&X-Sig={urllib.parse.quote(signature, safe='')}"
            return stack.enter_context(secret_server(served, f"me:{planted[password]}", query))

        data = serve("password of the data", planted["signature of the data"])
        validation = serve(
            "password of the validation data", planted["signature of the validation data"]
        )
        test, model = serve("password of the test data"), serve("password of the model")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_AUTH"))},
            **{name: planted[name] for name in (*VARIABLES, "RAY_AUTH_TOKEN")},
            "HTTPS_PROXY": f"http://me:{planted['password of a proxy']}@127.0.0.1:1",
            "SEVENFOLD_URLS": test.url("heldout.jsonl"),
            "SEVENFOLD_HOME": str(folders["work"]),
            "HOME": str(folders["home"]),
            "TMPDIR": str(folders["tmp"]),
            "RAY_TMPDIR": str(ray_folder),
            "PYTHONPATH": str(ROOT / "platform"),
        }
        tree["data"] |= {
            "sources": [{"path": data.url("train.jsonl")}],
            "validation": [{"path": validation.url("heldout.jsonl")}],
            "test": [{"path": test.plain_url("heldout.jsonl")}],
        }
        tree |= {
            "tokenizer": {},
            "checkpoint": {"every": 2},
            "validation": {"every": 2, "rows": 4},
            "sweep": {
                "trials": 1,
                "metric": "validation/loss",
                "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}},
            },
        }
        tree["train"] |= {"steps": 4}
        del tree["model"]
        (folders["work"] / "own.yaml").write_text(yaml.safe_dump(tree))

        commands: set[str] = set()
        typed: set[int] = set()
        stop = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(stop.set)
        pool.submit(_watch, commands, typed, stop)
        output = ""

        def run(*arguments: str) -> None:
            nonlocal output
            process = subprocess.Popen(
                [sys.executable, "-m", "sevenfold.cli", *arguments],
                env=environment,
                cwd=folders["work"],
                umask=UMASK,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            typed.add(process.pid)
            printed, _ = process.communicate(timeout=500)
            assert process.returncode == 0, printed
            output += printed

        begin = time.time()
        # The model's URL is typed; Ray keeps the command lines of drivers.
        typed_model = f"model={{path: '{model.url('model', query=False)}'}}"
        run("pretrain", "own.yaml", typed_model, "-v")
        run("sweep", "own.yaml", typed_model)
        run("evaluate", "runs/tiny")
        run("export", "runs/tiny", "--out", "exported")
        run("inspect", "--data", data.url("train.jsonl"), "--json", "survey.json")
    (folders["work"] / "own.yaml").unlink()  # written by the user

    saved = folders["home"] / ".sevenfold/urls"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert stat.S_IMODE(saved.parent.stat().st_mode) == 0o700
    kept = saved.read_text()
    assert data.url("train.jsonl") in kept and validation.url("heldout.jsonl") in kept
    saved.unlink()
    contents = {"output": output.encode(), "command lines": "\n".join(commands).encode()}
    for folder in (*folders.values(), ray_folder):
        contents |= dict(_contents(folder))
    shm = [p for p in Path("/dev/shm").iterdir() if p.is_file() and p.stat().st_mtime > begin]
    assert not [p for p in shm if p.stat().st_mode & 0o077]
    assert not _find(planted, contents)
    # what was looked through
    seen = {Path(where).name for where in contents}
    assert {"recipe.yaml", "manifest.json", "MANIFEST.json", "best.yaml", "report.html"} <= seen
    assert {"README.md", "trials.csv", "summary.json", "metrics.json", "survey.json"} <= seen
    assert {"gcs_server.out", "raylet.out", "params.json"} <= seen
    assert "ray::" in contents["command lines"].decode()
    assert not wrong_modes([*(folders["work"] / "runs").rglob("*")], UMASK)
    recipe = (folders["work"] / "runs/tiny/recipe.yaml").read_text()
    assert data.plain_url("train.jsonl") in recipe and model.plain_url("model") in recipe
