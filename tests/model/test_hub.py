"""Models of the Hugging Face Hub, from a server on this machine that speaks its protocol."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import free_port, refused, run_job
from helpers import tiny_models
from helpers.hub import Hub, serve

from sevenfold.errors import InputError
from sevenfold.inference.load import load
from sevenfold.model import build, hub

REPOSITORY = "folding/tiny-llama"
NAME = f"hf://{REPOSITORY}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model; this process and its children use it, with an empty cache."""
    with serve() as running:
        tiny_models.save(tmp_path / "model", "llama", tiny_models.TEMPLATE)
        (tmp_path / "model/onnx").mkdir()
        (tmp_path / "model/onnx/model.safetensors").write_bytes(b"another copy of the weights")
        running.push(REPOSITORY, tmp_path / "model")
        use(running.url, tmp_path, monkeypatch)
        yield running


def use(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))


def test_a_model_is_pinned_and_downloaded_once(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.model_path(NAME)
    assert hub.parse(first).is_pinned and build.model_path(f"{NAME}@main") == first
    # The config and the tokenizer come without the weights.
    folder = Path(build.local_model(first, weights=False))
    assert (folder / "tokenizer.json").exists() and not (folder / "model.safetensors").exists()
    reference = load(str(tmp_path / "model"))
    loaded = load(first)
    assert all(
        (a == b).all()
        for a, b in zip(loaded.model.parameters(), reference.model.parameters(), strict=True)
    )
    assert f"{REPOSITORY}/onnx/model.safetensors" not in server.downloads
    assert len(server.downloads) == len(set(server.downloads))
    # A branch may move; a pinned name means the same files, also where there is no network.
    shutil.copytree(tmp_path / "model", tmp_path / "newer")
    config = json.loads((tmp_path / "newer/config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "newer/config.json").write_text(json.dumps(config))
    server.push(REPOSITORY, tmp_path / "newer")
    assert build.model_path(NAME) != first and build.model_path(first) == first
    assert hub.pinned(NAME, stored=first) == first
    assert hub.pinned(f"{NAME}@main", stored=first) != first
    use(f"http://127.0.0.1:{free_port()}", tmp_path, monkeypatch)
    assert build.local_model(first) == str(folder)
    with pytest.raises(InputError, match=r"@main: the model hub cannot be reached \(.+\): set"):
        hub.pinned(f"{NAME}@main", stored=first)


def test_weights_in_bin_files(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name, content in (("config.json", b"{}"), ("pytorch_model.bin", b"weights")):
        (tmp_path / "old" / name).write_bytes(content)
    server.push("folding/old", tmp_path / "old")
    folder = build.local_model("hf://folding/old")
    assert (Path(folder) / "pytorch_model.bin").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hf://folding", "expected hf://ORGANIZATION/NAME"),
        ("hf://a/b@v1@v2", "expected hf://ORGANIZATION/NAME"),
        ("hf://folding/none", "the hub has no such model, or it is private"),
        (f"{NAME}@v9", "the hub's model has no such revision"),
        (f"{NAME}@{'0' * 40}", "the hub's model has no such revision"),
        ("hf://folding/gated", "accepted its terms"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    name: str, reason: str, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.push("folding/gated", tmp_path / "model")
    server.gated.add("folding/gated")
    error = refused(capsys, "generate", name, "--prompt", "a")
    assert name in error and reason in error


@pytest.mark.slow
def test_a_run_keeps_the_commit_that_it_started_with(server: Hub, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "fox"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": question}) + "\n")
    tree: dict[str, Any] = {
        "name": "tuned",
        "seed": 1,
        "objective": "sft",
        "model": {"path": NAME},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {
            "sources": [{"path": str(tmp_path / "rows.jsonl")}],
            "sequence_length": 64,
            "lanes": 1,
            "executor": "inline",
        },
        "train": {"global_batch": 1, "micro_batch": 1, "steps": 2},
        "optimizer": {"learning_rate": 1e-3},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    first = build.model_path(NAME)
    run_job("finetune", "r.yaml", home=tmp_path)
    run = tmp_path / "runs/tuned"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["path"] == first
    adapter = json.loads((run / "adapter/adapter_config.json").read_text())
    parsed = hub.parse(first)
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == parsed
    (tmp_path / "model/config.json").write_text("{}")
    server.push(REPOSITORY, tmp_path / "model")
    assert "already finished" in run_job("finetune", "r.yaml", home=tmp_path)
