"""Model directories whose files name others' files or code are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refused
from helpers import tiny_models
from hostile.model_directories import Case, cases, command, set_field

from sevenfold import storage
from sevenfold.cli import main
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.errors import InputError
from sevenfold.model.config import local_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_models.save(tmp_path_factory.mktemp("base") / "model", "llama"))


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A small model that nothing is wrong with."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_directories_are_refused(case: Case, model: Path) -> None:
    case.change(model)
    storage.verify_checksums.cache_clear()
    with pytest.raises(InputError) as refusal:
        local_folder(str(model))
    message = str(refusal.value)
    assert all(part in message for part in case.says), message
    assert message.startswith(str(model)) and "\n" not in message and len(message) < 600


@pytest.mark.parametrize("name", ["_attn_implementation=org/repo", "adapter_config.json"])
def test_commands_refuse_them(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = next(case for case in cases() if case.name == name)
    case.change(model)
    error = refused(capsys, *command(model))
    assert all(part in error for part in case.says)


def test_the_hubs_cache_and_old_configs_are_read(model: Path, tmp_path: Path) -> None:
    """Links to files elsewhere, and paths of others' caches in tokenizer_config.json."""
    snapshot = tmp_path / "snapshots/abc"
    snapshot.mkdir(parents=True)
    for key in ("special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"):
        set_field("tokenizer_config.json", key, f"/home/somebody/.cache/{key}")(model)
    set_field("config.json", "attn_implementation", "sdpa")(model)
    set_field("config.json", "auto_map", {"AutoConfig": "configuration_x.XConfig"})(model)
    for path in model.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert local_folder(str(snapshot)) == str(snapshot)
    tokenizer = load_tokenizer(str(snapshot))
    assert tokenizer.decode(tokenizer("the quick")["input_ids"]) == "the quick"
    assert main(command(snapshot)) == 0


def test_a_tokenizer_alone_is_checked(model: Path) -> None:
    # a key with an escaped letter is the same key
    path = model / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["fast_tokenizer_files"] = ["../../etc/tokenizer.1.0.json"]
    path.write_text(json.dumps(tree).replace("fast_tokenizer_files", "fast_tokenizer_file\\u0073"))
    with pytest.raises(InputError, match="fast_tokenizer_files: expected names of files inside"):
        load_tokenizer(str(model))


KERNELS = """
from pathlib import Path
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def call(*args, **kwargs):
        if name == "get_kernel":
            Path(TRIPPED).write_text(repr(args))
        return lambda value: value
    return call
"""
RUN = """
import transformers.integrations.hub_kernels as kernels
from sevenfold.inference.load import load
from sevenfold.errors import InputError
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available()
for attention in ("org/repo", "kernels-community/flash-attn2:fn", "flash_attention_2"):
    try:
        load(MODEL, attention=attention)
        raise AssertionError(attention)
    except InputError as e:
        print(e)
assert kernels.lazy_load_kernel("causal-conv1d") is None
"""


def test_no_kernel_is_loaded_where_the_package_is_installed(model: Path, tmp_path: Path) -> None:
    """With a package `kernels` of the right version, which notes each kernel that is loaded."""
    site, tripped = tmp_path / "site", tmp_path / "tripped"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels/__init__.py").write_text(KERNELS.replace("TRIPPED", repr(str(tripped))))
    (site / "kernels/layer").mkdir()
    (site / "kernels/layer/__init__.py").write_text("")
    (site / "kernels/layer/mode.py").write_text("class Mode: pass")
    (site / "kernels-0.18.2.dist-info").mkdir()
    (site / "kernels-0.18.2.dist-info/METADATA").write_text("Name: kernels\nVersion: 0.18.2\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("MODEL", repr(str(model)))],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{site}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("a kernel of the hub is code of others") == 2, done.stdout
    assert not tripped.exists()
