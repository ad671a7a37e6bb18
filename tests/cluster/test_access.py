"""Who gets in, and what gets out: tokens, secrets."""

import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RAY, ROOT, running_head

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


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_anywhere(
    guarded: dict[str, str], tree: dict[str, Any], tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for part in ("platform", "jobs"):
        shutil.copytree(ROOT / part, checkout / part)
    tree |= {"cluster": {"num_workers": 2, "cpus_per_worker": 0.75}, "checkpoint": {"every": 4}}
    (checkout / "jobs/recipes/tiny.yaml").write_text(yaml.safe_dump(tree))
    words = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "jobs/pretrain.py", "jobs/recipes/tiny.yaml", "-v"]
    done = subprocess.run(words, cwd=checkout, env=guarded, capture_output=True, text=True, timeout=300)
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
    assert b"pretrain.py" in pages[0]
    written = [p for root in (guarded["HOME"], guarded["RAY_TMPDIR"]) for p in Path(root).rglob("*") if p.is_file()]
    assert any(p.name == "recipe.yaml" for p in written) and any(p.suffix == ".log" for p in written)
    found = {str(p): raw for p in written if (raw := _read(p)) is not None} | dict(zip("abcde", pages, strict=True))
    leaks = {(where, name) for where, raw in found.items() for name, s in SECRETS.items() if s.encode() in raw}
    assert not leaks


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # a socket; gone meanwhile
        return None
