"""The rooms of the library: no import runs up, and Ray's private names stay in one file."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sevenfold.cluster.ray_private import PRIVATE

LIBRARY = Path(__file__).resolve().parents[1] / "platform/sevenfold"

# From the top to the bottom. A room imports from the lines below its own; rooms on one line do not
# import from each other.
ORDER = """
cli
commands
sweep
train
evaluate
init
doctor inspect export faults
prepare
plan
inference
model
engine
cluster data
report
run_folder
recipe
storage
errors
"""
FLOOR = {room: i for i, line in enumerate(ORDER.split("\n")) for room in line.split()}
OUTER = "."  # the package itself, whose `__version__` every room may read


def modules() -> Iterator[tuple[str, Path]]:
    """Yields the name and file of each module of the library."""
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line and full name of each import of a file, those inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room(name: str) -> str:
    """Returns the room of a module or name of the library."""
    first = name.split(".")[1] if "." in name else ""
    return first if first in FLOOR else OUTER


def test_no_import_runs_up() -> None:
    wrong, rooms = [], set()
    for module, path in modules():
        own = room(module)
        if own == OUTER:
            continue
        rooms.add(own)
        for line, name in imports(path):
            if name.split(".")[0] != "sevenfold" or (other := room(name)) in (own, OUTER):
                continue
            if FLOOR[other] <= FLOOR[own]:
                wrong.append(f"{path.relative_to(LIBRARY)}:{line}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)
    assert rooms == set(FLOOR)


def test_the_engine_needs_no_ray() -> None:
    """Training steps run where Ray is not installed."""
    wrong = [
        f"{path.relative_to(LIBRARY)}:{line}: {name}"
        for module, path in modules()
        if room(module) in ("engine", "model", "inference")
        for line, name in imports(path)
        if name.split(".")[0] == "ray"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_of_ray_is_where_it_was(name: str) -> None:
    module, _, attributes = name.partition(":")
    value: object = importlib.import_module(module)
    for attribute in attributes.split("."):
        if isinstance(value, type) and not hasattr(value, attribute):
            value = value()  # the attribute is set by __init__
        value = getattr(value, attribute)


def test_private_names_of_ray_are_used_in_one_file_alone() -> None:
    private = re.compile(r"ray\..*\b_\w+")
    wrong = [
        f"{path.relative_to(LIBRARY)}:{line}: {name}"
        for _, path in modules()
        if path != LIBRARY / "cluster/ray_private.py"
        for line, name in imports(path)
        if private.match(name)
    ]
    assert not wrong, "\n".join(wrong)
    used = {name for _, name in imports(LIBRARY / "cluster/ray_private.py") if private.match(name)}
    listed = {entry.split(":")[0] for entry in PRIVATE}
    unlisted = {n for n in used if not any(n.startswith(module) for module in listed)}
    assert not unlisted, f"add to PRIVATE, with the reason: {unlisted}"
