"""Hostile input is refused in one line, within bounds of time and memory.

All inputs of a test are read in one process with a limit on its memory and its time, so that a
regression ends the test and not the machine.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.data_files import FOLDERS
from hostile.yaml_files import CLUSTER, RECIPE, yaml_cases

MEMORY_BYTES = 3 << 30  # of address space, most of which libraries only reserve
SECONDS = 60

READ_YAML = """
from sevenfold.cluster.cluster_file import read_cluster_file
from sevenfold.recipe import parse

def read(path):
    tree = read_cluster_file(path) if "cluster" in path else parse(path).model.config
    return repr(tree["extra"]) if "extra" in tree else "read"
"""
READ_DATA = """
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.recipe import Source

def read(path):
    manifest = scan([Source(path=path)], "causal")
    return repr([Selection().read(manifest, i).fields[0].to_pylist() for i in range(len(manifest))])
"""
MAIN = """
import json, sys
from sevenfold.errors import InputError

results = []
for path in sys.argv[1:]:
    try:
        results.append(["read", read(path)])
    except InputError as e:
        results.append(["refused", str(e)])
print(json.dumps(results))
"""


def read_all(script: str, paths: list[Path]) -> list[tuple[str, str]]:
    """Reads each path in one process; returns for each whether it was refused, and the message."""
    done = subprocess.run(
        [sys.executable, "-c", script + MAIN, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [(outcome, message) for outcome, message in json.loads(done.stdout.splitlines()[-1])]


def test_hostile_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    cases = []
    for i, (kind, text, says) in enumerate(yaml_cases()):
        path = tmp_path / f"{kind}-{i}.yaml"
        path.write_text(text)
        cases.append((path, says))
    results = read_all(READ_YAML, [path for path, _ in cases])
    for (path, says), (outcome, message) in zip(cases, results, strict=True):
        if says.startswith("="):
            assert (outcome, message) == ("read", says[1:])
            continue
        assert outcome == "refused" and says in message, (path.read_text()[:300], message)
        assert message.startswith(str(path)) and "\n" not in message and len(message) < 500
        assert "line " in message or "MiB" in message


def test_ray_and_recipes_read_yes_and_no_differently(tmp_path: Path) -> None:
    paths = [tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"]
    for path, template in zip(paths, (RECIPE, CLUSTER), strict=True):
        path.write_text(template.replace("VALUE", "[yes, off]"))
    assert read_all(READ_YAML, paths) == [("read", "['yes', 'off']"), ("read", "[True, False]")]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("vocab_size: 300", "vocab_size: 1000000000000", "tokenizer.vocab_size: input should be"),
        ("length: 8", "length: 1000000000000", "data.sequence_length: input should be"),
        ("batch: 1,", "batch: 1000000000000,", "train.global_batch: input should be"),
        ("name: x", "name: x\noptimizer: {learning_rate: .inf}", "be a finite number, found inf"),
        ("name: x", f"name: x\nstorage: [{'y' * 10_000}]", "storage: input should be"),
    ],
)
def test_settings_have_limits(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(old, new))
    [(outcome, message)] = read_all(READ_YAML, [path])
    assert outcome == "refused" and says in message and len(message) < 500


def test_hostile_data_is_refused_in_one_line(tmp_path: Path) -> None:
    paths = []
    for i, (make, _) in enumerate(FOLDERS):
        folder = tmp_path / str(i)
        folder.mkdir()
        make(folder)
        # a folder, the file itself, and a glob must be treated alike
        paths += [folder, next(folder.glob("a.*")), folder / "a*"]
    results = read_all(READ_DATA, paths)
    for path, i, (outcome, message) in zip(
        paths, [i for i in range(len(FOLDERS)) for _ in range(3)], results, strict=True
    ):
        says = FOLDERS[i][1]
        assert outcome == "refused" and says in message, (path, outcome, message[:500])
        assert "\n" not in message and len(message) < 600
