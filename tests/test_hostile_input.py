"""Hostile input is refused in one line, within bounds of time and memory.

All inputs of a test are read in one process with a limit on its memory and its time, so that a
regression ends the test and not the machine.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MEMORY_BYTES = 3 << 30  # of address space, most of which libraries only reserve
SECONDS = 60

RECIPE = """name: x
data: {sources: [{path: a}], sequence_length: 8}
tokenizer: {vocab_size: 300}
model: {config: {model_type: llama, extra: VALUE}}
train: {global_batch: 1, micro_batch: 1, steps: 1}
"""
CLUSTER = """available_node_types: {a: {}}
extra: VALUE
"""
READ_YAML = """
from sevenfold.cluster.cluster_file import read_cluster_file
from sevenfold.recipe import parse

def read(path):
    tree = read_cluster_file(path) if "cluster" in path else parse(path).model.config
    return repr(tree["extra"]) if "extra" in tree else "read"
"""
READ_DATA = """
from sevenfold.data.manifest import scan
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
    return [(outcome, message) for outcome, message in json.loads(done.stdout)]


def bomb(first: str, of: str) -> str:
    """Returns a list of values, each of which names the one before ten times."""
    lines = [f"a0: &a0 {first}"]
    for i in range(1, 9):
        lines.append(f"a{i}: &a{i} " + of.replace("ALIASES", ", ".join([f"*a{i - 1}"] * 10)))
    return "\n".join(lines) + "\n"


VALUES = {  # a value in a recipe and a cluster file -> what the error says; "=" if it is read
    "9" * 5000: f"'{'9' * 40}' where an integer of at most 64 bits is expected",
    "0x" + "f" * 5000: "an integer of at most 64 bits is expected",
    "!!int abc": "an integer of at most 64 bits is expected",
    "1e5000": "'1e5000' where a 64-bit number is expected",
    "[" * 10_000: "more than 64 levels of nesting",
    "&a [*a]": "the alias *a inside the value that it stands for",
    "{a: 1, a: 2}": "the key 'a' a second time (first in line ",
    "!!timestamp 2024-13-99": "tag:yaml.org,2002:timestamp",
    "{? [1] : 2}": "unhashable key",
    "2024-13-99": "='2024-13-99'",
    "1:30": "='1:30'",
    "[0.0, .inf]": "=[0.0, inf]",
    "[&a {b: 1}, {<<: *a, b: 2}, *a]": "=[{'b': 1}, {'b': 2}, {'b': 1}]",
}


def test_hostile_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    cases = []
    for kind, template in (("recipe", RECIPE), ("cluster", CLUSTER)):
        texts = {template.replace("VALUE", value): says for value, says in VALUES.items()}
        texts[bomb("[x, x]", "[ALIASES]") + template] = "more than 100,000 values"
        texts[bomb("{x: 1}", "{<<: [ALIASES]}") + template] = "more than 100,000 values"
        texts["".join(" " * i + "a:\n" for i in range(2000))] = "line 64: expected YAML, found more"
        texts["#" * (17 << 20)] = "of at most 16 MiB, found more"
        for i, (text, says) in enumerate(texts.items()):
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


def make_fifo(folder: Path) -> None:
    os.mkfifo(folder / "a.jsonl")


def make_link_to_fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "a.txt").symlink_to("pipe")


def make_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "a.txt"))


def make_device(folder: Path) -> None:
    (folder / "a.txt").symlink_to("/dev/zero")


def make_link_to_itself(folder: Path) -> None:
    (folder / "a.txt").symlink_to("a.txt")


def write_json(value: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "a.jsonl").write_text(
            '{"text": "good"}\n{"text": ' + value + '}\n{"text": "good"}\n'
        )

    return make


def write_parquet(field: str, value: int) -> Callable[[Path], None]:
    """Returns a function that writes a file whose footer declares another value of a field."""

    def make(folder: Path) -> None:
        path = folder / "a.parquet"
        texts = [f"{i:05d}" * 20 for i in range(1009)]
        pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
        group = pq.ParquetFile(path).metadata.row_group(0)
        actual = group.num_rows if field == "rows" else group.column(0).total_compressed_size
        raw = path.read_bytes()
        length = struct.unpack("<I", raw[-8:-4])[0]
        footer = raw[-8 - length : -8].replace(zigzag(actual), zigzag(value))
        path.write_bytes(raw[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1")

    return make


def zigzag(number: int) -> bytes:
    """Returns a positive integer as it is encoded in a parquet footer (Thrift's compact form)."""
    number <<= 1
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (make_fifo, "a.jsonl: expected a regular file, found a named pipe (FIFO)"),
    (make_link_to_fifo, "a.txt: expected a regular file, found a named pipe (FIFO)"),
    (make_socket, "a.txt: expected a regular file, found a socket"),
    (make_device, "a.txt: expected a regular file, found a device"),
    (make_link_to_itself, "a.txt: expected a file, found a symbolic link that leads back"),
    (write_json("[" * 100_000 + "]" * 100_000), "a.jsonl: line 2: expected a JSON object, found "),
    (write_json('{"a":' * 100_000), "line 2: expected a JSON object, found one that is nested"),
    (write_json("9" * 5000), "line 2: expected a JSON object, found an integer of over 4300"),
    (write_parquet("bytes", 2**62), "a.parquet: row group 0: expected at most "),
    (write_parquet("rows", 2**34), "a.parquet: row group 0 (17,179,869,184 rows): expected text"),
    (write_parquet("rows", 2**20), "a.parquet: row group 0"),
]


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
