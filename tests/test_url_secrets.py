"""Secrets in URLs: user information, query and fragment are used, but neither shown nor kept."""

import json
import os
import pickle
import random
import stat
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused
from hostile.secret_server import SecretServer, secret_server

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.data.scan import scan
from sevenfold.errors import InputError
from sevenfold.prepare.job import claim_folder
from sevenfold.recipe import Recipe, Source, loads, parse
from sevenfold.run_folder import RunFolder
from sevenfold.storage import url_secrets

SECRET = "pw-5ecret"

# (URL, the same without secrets)
URLS = {
    "login": (f"https://me:{SECRET}@host/a/b.jsonl", "https://host/a/b.jsonl"),
    "token as user": (f"https://{SECRET}@host/b.jsonl", "https://host/b.jsonl"),
    "query": (f"https://host/b.jsonl?X-Sig={SECRET}&x=1", "https://host/b.jsonl"),
    "query without =": (f"https://host/b.jsonl?{SECRET}", "https://host/b.jsonl"),
    "fragment": (f"https://host/b.jsonl#{SECRET}", "https://host/b.jsonl"),
    "all": (f"https://u:{SECRET}@host:80/b.jsonl?s={SECRET}#{SECRET}", "https://host:80/b.jsonl"),
    "capitals": (f"HTTPS://u:{SECRET}@host/b?s={SECRET}", "HTTPS://host/b"),
    "password with a slash": (f"https://u:p/{SECRET}@host/b", "https://host/b"),
    "password with other delimiters": (f"https://u:?#{SECRET}@host/b", "https://host/b"),
    "password with @": (f"https://u:a@{SECRET}@host/b", "https://host/b"),
    "ftp": (f"ftp://u:{SECRET}@host/b.txt", "ftp://host/b.txt"),
    "a key in an s3 URL": (f"s3://AKIA:{SECRET}/x@bucket/b", "s3://bucket/b"),
    "a signature in an s3 URL": (f"s3://bucket/b?X-Amz-Signature={SECRET}", "s3://bucket/b"),
    "chained": (
        f"zip://in.jsonl::https://u:{SECRET}@host/b.zip?s={SECRET}",
        "zip://in.jsonl::https://host/b.zip",
    ),
    "a container with a password": (f"abfs://c:{SECRET}@acc/b", "abfs://acc/b"),
}
# These have no secrets, and stay as they are.
PLAIN = (
    "/data/a?b=c#d@e",
    "data/x@y.jsonl",
    "https://host:8080/@user/b.jsonl",
    "https://host/a@b/c:d@e.jsonl",
    "s3://bucket/part-?.jsonl",
    "s3://bucket/part-?/year=2020/*.jsonl",
    "s3://bucket/a@b/#1.jsonl",
    "abfs://container@account.dfs.core.windows.net/b",
    "github://org:repository@main/b.jsonl",
    "hf://org/name@revision",
    "memory://a/b",
)


@pytest.fixture(autouse=True)
def forgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test begins without known secrets, in a home folder of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    forget()
    yield
    forget()


def forget() -> None:
    """Forgets the secrets that this process knows, as a new process does."""
    url_secrets._full_urls.clear()
    url_secrets._saved_urls.cache_clear()


@pytest.mark.parametrize("kind", URLS)
def test_a_url_is_known_without_its_secrets(kind: str) -> None:
    url, short = URLS[kind]
    assert storage.without_secrets(url) == short
    assert storage.without_secrets(short) == short
    assert storage.resolve_input(url) == storage.resolve_output(url) == short
    assert url_secrets.full_url(short) == url
    for text in (f"{url}: not found", f"error (url='{url}'), see {url}.", f'"{url}"'):
        assert storage.hide_secrets(text) == text.replace(url, short)


@pytest.mark.parametrize("path", PLAIN)
def test_what_is_no_secret_stays(path: str) -> None:
    assert storage.without_secrets(path) == path
    assert storage.hide_secrets(f"{path}: found") == f"{path}: found"
    assert url_secrets.full_url(path) == path


def test_no_password_of_any_characters_is_shown() -> None:
    draw = random.Random(1)
    for _ in range(5000):
        characters = string.ascii_letters + string.digits + "/?#:;,.!$&'()*+=%~^|-_[]{}"
        password = "k" + "".join(draw.choices(characters, k=draw.randrange(1, 40))) + "Zz"
        url = f"https://user:{password}@host/data.jsonl"
        assert storage.without_secrets(url) == "https://host/data.jsonl", url


LONG = ("x", "a://x:y", "://", "a://a?b=", "a://" + "." * 5, ".", "a:b@", "@", "?#=", "https://a@")


@pytest.mark.parametrize("piece", LONG)
def test_a_long_text_takes_no_long_time(piece: str) -> None:
    text = f"a://{piece * (200_000 // len(piece))} a://"
    begin = time.process_time()
    storage.hide_secrets(text)
    storage.without_secrets(text)
    # A second on a busy machine; a search that is quadratic in the length takes minutes.
    assert time.process_time() - begin < 30


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_gives_its_secrets_to_the_files_in_it(slash: str) -> None:
    storage.keep_secrets(f"https://u:{SECRET}@host/model{slash}?sas=1")
    for name in ("config.json", "a/b.json"):
        url = url_secrets.full_url(storage.join("https://host/model", name))
        assert url == f"https://u:{SECRET}@host/model/{name}?sas=1"
    for other in ("https://host/model2/a", "https://host/mod", "http://host/model/a"):
        assert url_secrets.full_url(other) == other


@pytest.mark.parametrize("read", ["environment", "file"])
def test_secrets_are_found_outside_of_the_process(
    read: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    urls = [url for url, _ in (URLS["login"], URLS["all"])]
    if read == "environment":
        monkeypatch.setenv(storage.URLS_VARIABLE, " \n".join(urls))
    else:
        for url in (*urls, urls[0]):
            storage.keep_secrets(url)
            storage.save_full_urls()
        file = tmp_path / "home/.sevenfold/urls"
        assert file.read_text().split() == urls
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert set(os.listdir(file.parent)) <= {"urls", "urls.lock"}
        forget()
    assert [url_secrets.full_url(storage.without_secrets(url)) for url in urls] == urls
    # what is typed is newer
    signed_again = urls[0] + "?s=2"
    assert url_secrets.full_url(storage.keep_secrets(signed_again)) == signed_again


def test_a_home_folder_that_cannot_be_written_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    storage.keep_secrets(URLS["all"][0])
    storage.save_full_urls()
    assert storage.URLS_VARIABLE in caplog.text and SECRET not in caplog.text


def recipe_file(tree: dict[str, Any], tmp_path: Path, **data: Any) -> str:
    """Writes the fixture's recipe with other data."""
    tree["data"] |= data
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_recipe_has_no_secrets_and_its_hash_not_either(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    def recipe(password: str) -> Recipe:
        login = f"https://me:{password}@host"
        return parse(
            recipe_file(
                tree,
                tmp_path,
                sources=[{"path": f"{login}/train.jsonl?s={password}", "weight": 1}],
                validation=[{"path": f"{login}/val.jsonl?s={password}"}],
                test=[{"path": f"{login}/test.jsonl#{password}"}],
                curriculum=[
                    {"at_tokens": 5, "weights": {f"train.jsonl?s={password}": 2}},
                    {"at_tokens": 9, "weights": {"train.jsonl": 3}},
                ],
            ),
            [
                f"data.cache={login}/cache?{password}",
                f"tokenizer={{path: '{login}/tokenizer', chat_template: '{login}/chat.jinja'}}",
                f"model={{path: '{login}/model?s={password}'}}",
            ],
        )

    first, again = recipe(SECRET), recipe("0ther")
    assert SECRET not in first.to_yaml() + repr(first) + json.dumps(first.identity())
    assert first == again and first.hash() == again.hash()
    assert [s.name for s in first.data.sources] == ["train.jsonl"]
    assert "@" not in first.to_yaml()
    # the last one that was typed is used
    assert (
        url_secrets.full_url("https://host/val.jsonl") == "https://me:0ther@host/val.jsonl?s=0ther"
    )
    assert loads(first.to_yaml(), "recipe.yaml") == first.override({"data.lanes": 4}) == first


def test_a_common_folder_gives_its_secrets_to_all_sources(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    path = recipe_file(tree, tmp_path, sources=[{"path": "a.jsonl"}], validation=[])
    recipe = parse(path, [f"data.path=https://me:{SECRET}@host/data?sas={SECRET}"])
    assert recipe.data.sources[0].path == "https://host/data/a.jsonl"
    full = url_secrets.full_url(recipe.data.sources[0].path)
    assert full == f"https://me:{SECRET}@host/data/a.jsonl?sas={SECRET}"


def test_files_that_only_a_query_tells_apart_are_refused(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [{"path": f"https://host/get.jsonl?id={i}{SECRET}"} for i in (1, 2)]
    path = recipe_file(tree, tmp_path, sources=sources)
    error = refused(capsys, "pretrain", path)
    assert "https://host/get.jsonl and differ only in" in error and SECRET not in error


def test_a_storage_with_secrets_is_refused(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tree, tmp_path)
    error = refused(capsys, "pretrain", path, f"storage=s3://key:{SECRET}@bucket/runs")
    assert "storage: expected a URL without user information" in error and SECRET not in error


@pytest.mark.parametrize(
    "override",
    [
        "data.nothing=https://u:{}@h/x",
        "https://u:{}@h/x?s={}",
        "seed=https://u:{}@h/x",
        "data.sources=https://u:{}@h/x?s={}",
    ],
)
def test_errors_about_a_recipe_show_no_secrets(
    override: str, tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tree, tmp_path)
    assert SECRET not in refused(capsys, "pretrain", path, override.format(SECRET, SECRET))


def test_a_worker_on_another_machine_gets_the_secrets(tree: dict[str, Any], tmp_path: Path) -> None:
    url, short = URLS["all"]
    recipe = parse(recipe_file(tree, tmp_path, sources=[{"path": url}]))
    table = {c: [] for c in ("shard", "index", "start", "end", "documents", "bytes")}
    manifest = Manifest.from_json(
        {
            "sources": [recipe.data.sources[0].to_json()],
            "shards": [],
            "row_groups": table,
            "left_out": [],
            "tokens_per_byte": [],
        }
    )
    program = (
        "import pickle, sys; from sevenfold.storage.url_secrets import full_url;"
        "print(pickle.load(sys.stdin.buffer).hash(), full_url(sys.argv[1]))"
    )
    for carried in (recipe, manifest):
        result = subprocess.run(
            [sys.executable, "-c", program, short],
            input=pickle.dumps(carried),
            capture_output=True,
            env={**os.environ, "HOME": "/nowhere"},
            check=True,
        )
        assert result.stdout.decode().split() == [carried.hash(), url]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SecretServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(50)]
    (folder / "a.jsonl").write_text("".join(lines))
    with secret_server(folder, f"me:{SECRET}", f"sig={SECRET}") as running:
        yield running


def test_files_are_read_with_the_secrets_and_recorded_without(server: SecretServer) -> None:
    manifest = scan([Source(path=server.url("a.jsonl"))], "causal")
    assert manifest.shards[0].path == server.plain_url("a.jsonl")
    recorded = json.dumps(manifest.recorded().to_json())
    assert SECRET not in recorded and "@" not in recorded
    # signed again: the same data
    server.query = "sig=other"
    again = scan([Source(path=server.url("a.jsonl"))], "causal")
    assert again.hash() == manifest.hash()
    Manifest.from_json(json.loads(recorded)).check_unchanged()


WRONG = {
    "password": lambda s: s.url("a.jsonl").replace(f":{SECRET}@", ":wr0ngpw@"),
    "signature": lambda s: s.url("a.jsonl").replace(f"sig={SECRET}", "sig=wr0ngpw"),
    "missing file": lambda s: s.url("wr0ng.jsonl").replace("wr0ng", "none"),
    "folder": lambda s: s.url("", query=False),
    "no server": lambda s: s.url("a.jsonl").replace(f":{s.server_port}", ":1"),
    "port": lambda s: s.url("a.jsonl").replace(f":{s.server_port}", ":port"),
    "scheme": lambda s: s.url("a.jsonl").replace("http://", "htp://"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_of_a_storage_show_no_secrets(
    wrong: str,
    server: SecretServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("sevenfold.storage.retry.RETRY_SECONDS", 0.1)
    url = WRONG[wrong](server)
    from sevenfold.cli import main

    code = main(["inspect", "--data", url])
    output = capsys.readouterr()
    shown = output.out + output.err + caplog.text
    assert code in (1, 2) and "error: " in output.err and "Traceback" not in shown
    assert SECRET not in shown and "wr0ngpw" not in shown
    if wrong in ("password", "signature"):
        assert f"{server.plain_url('a.jsonl')}: access refused" in output.err
        assert "$SEVENFOLD_URLS" in output.err


def test_a_run_of_an_earlier_version_keeps_its_identity(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """It stored the recipe with secrets, and its checkpoints know the hash of that."""
    url, short = URLS["all"]
    name = url.rsplit("/", 1)[-1]
    tree["data"] |= {
        "sources": [{"path": url, "weight": 1.0}],
        "curriculum": [{"at_tokens": 5, "weights": {name: 2}}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    recipe = parse(str(tmp_path / "tiny.yaml"))
    stored = json.loads(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    stored["data"]["sources"][0] |= {"path": url, "name": name}
    stored["data"]["curriculum"][0]["weights"] = {name: 2.0}
    folder = RunFolder(str(tmp_path / "run"))
    storage.write(folder.recipe, yaml.safe_dump(stored))
    forget()
    identity = claim_folder(folder, recipe)
    assert identity != recipe.hash()
    assert claim_folder(folder, recipe) == identity
    assert short in storage.read_text(folder.recipe)
    assert SECRET not in storage.read_text(folder.recipe) + storage.read_text(folder.identity)
    # a URL with another signature in the old recipe is not newer than the one that was typed
    storage.keep_secrets(newer := url.replace(f"s={SECRET}", "s=newer"))
    loads(yaml.safe_dump(stored), "recipe.yaml")
    assert url_secrets.full_url(short) == newer
    with pytest.raises(InputError, match="another recipe"):
        claim_folder(folder, recipe.override({"seed": 4}))
