"""Datasets of the Hugging Face Hub, from a server on this machine that speaks its protocol."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import free_port
from helpers.hub import Hub, serve

from sevenfold.data.manifest import Manifest
from sevenfold.data.scan import scan
from sevenfold.data.sources import hub_datasets
from sevenfold.data.sources.documents import Selection
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.recipe import Source

NAME = "hf://datasets/folding/words"


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one dataset of three splits."""
    folder = tmp_path / "words"
    (folder / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        table = pa.table({"text": [f"{name} {i}" for i in range(3)]})
        pq.write_table(table, folder / f"data/{name}.parquet")
    (folder / "data/dev.jsonl").write_text('{"text": "dev"}\n')
    (folder / "README.md").write_text("words")
    (folder / "info.json").write_text("{}")  # what a commit's name is made of
    with serve() as running:
        running.push("folding/words", folder)
        use(running.url, monkeypatch)
        yield running


def manifest_of(path: str, **settings: Any) -> Manifest:
    return scan([Source.model_validate({"path": path, **settings})], "causal")


def documents(manifest: Manifest) -> list[str]:
    read = [Selection().read(manifest, i).fields[0].to_pylist() for i in range(len(manifest))]
    return [text for texts in read for text in texts]


def test_a_split_is_read(server: Hub) -> None:
    train = [f"train-0000{n}-of-00002 {i}" for n in range(2) for i in range(3)]
    for name in (f"{NAME}:train", f"{NAME}@main:train", f"{NAME}/data:train"):
        manifest = manifest_of(name)
        assert documents(manifest) == train
        stored = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
        stored.check_unchanged()
        assert documents(stored) == train
    assert documents(manifest_of(f"{NAME}:validation")) == ["dev"]
    assert documents(manifest_of(f"{NAME}/data/train-*.parquet")) == train
    assert len(documents(manifest_of(f"{NAME}/data/test-00000-of-00001.parquet"))) == 3


REFUSED = {
    NAME: r"expected files of one folder|expected one split, found train, validation, test: .*:tr",
    f"{NAME}:dev2": "expected files of the split 'dev2'.*found those of train, validation, test",
    f"{NAME}@other:train": "the hub's dataset has no such revision",
    "hf://datasets/folding/none:train": "the hub has no such dataset",
    f"{NAME}/data/dev.jsonl:train": "expected a dataset or its folder before the split",
    "hf://folding/words": "expected hf://datasets/ORGANIZATION/NAME",
    "hf://datasets/words": "expected hf://datasets/ORGANIZATION/NAME",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_on_the_hub(name: str, server: Hub) -> None:
    with pytest.raises(InputError, match=REFUSED[name]) as error:
        manifest_of(name)
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use(f"http://127.0.0.1:{free_port()}", monkeypatch)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # nothing is tried again
    with pytest.raises(InputError) as error:
        manifest_of(f"{NAME}:train")
    assert str(error.value).startswith(f"{NAME}:train: the hub cannot be reached (")
    assert "hf download --repo-type dataset folding/words --local-dir" in str(error.value)
    assert "\n" not in str(error.value) and not waits


SPLITS = {
    "data/train-00000-of-00010.parquet": "train",
    "train/part.parquet": "train",
    "train.jsonl": "train",
    "training.csv": "train",
    "my_train_file_0.jsonl": "train",
    "train/test_cases.jsonl": "test",
    "valid.csv": "validation",
    "data/dev-0.parquet": "validation",
    "eval.jsonl": "test",
    "constrained.csv": "",
    "latest/news.parquet": "",
    "contest.jsonl": "",
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_of_a_name(name: str) -> None:
    assert hub_datasets.split_of(name) == SPLITS[name]


def test_a_model_of_the_hub_without_its_prefix(tmp_path: Path) -> None:
    hint = "hf download folding/tiny --local-dir FOLDER, then give FOLDER"
    with pytest.raises(InputError, match=f"give hf://folding/tiny, or get it with: {hint}"):
        build.model_path("folding/tiny")
    for other in (str(tmp_path), "tiny", "a/b/c", "s/"):
        with pytest.raises(InputError) as error:
            build.model_path(other)
        assert "hf download" not in str(error.value)
