"""YAML of recipes and cluster files, read within limits: plain values as YAML 1.2 reads them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from sevenfold.errors import InputError, first_line

# Far beyond any recipe, and read within seconds.
MAX_BYTES = 16 * 2**20
MAX_NODES = 100_000  # values and keys, those behind aliases counted each time
MAX_DEPTH = 64
_JSON_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_YAML_1_1 = {f"tag:yaml.org,2002:{tag}" for tag in ("bool", "int", "float", "timestamp")}


class _Loader(yaml.SafeLoader):
    """A safe loader with limits that reads plain values as YAML 1.2 does.

    PyYAML follows YAML 1.1: 1e-3 is a string there, `no`, `off` and `y` (labels, or the code of
    Norwegian) are booleans, 12:30 is a number, and 2024-01-31 no text. It also expands aliases
    without limit, and of a key that is given twice it keeps the last value.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[str, int] = {}  # of the nodes with an anchor that are complete

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node, within the limits; aliases count as what they stand for."""
        event: Any = self.peek_event()
        before = self._nodes
        if self.check_event(yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _error(
                    f"the alias *{event.anchor[:40]} inside the value that it stands for", event
                )
            self._nodes += self._sizes.get(event.anchor, 1)
        else:
            self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _error(f"more than {MAX_NODES:,} values (aliases are counted expanded)", event)
        if self._depth >= MAX_DEPTH:
            raise _error(f"more than {MAX_DEPTH} levels of nesting", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes.setdefault(event.anchor, self._nodes - before)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Composes a mapping, and refuses a key that is given twice."""
        node: Any = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name = (key.tag, key.value)
                if name in lines:
                    raise _error(
                        f"the key {key.value[:40]!r} a second time (first in line {lines[name]})",
                        key,
                    )
                lines[name] = key.start_mark.line + 1
        return node

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Constructs a boolean, or a number that fits into 64 bits."""
        kind = node.tag.rsplit(":", 1)[1]
        try:
            value: Any = getattr(super(), f"construct_yaml_{kind}")(node)
        except (ValueError, LookupError, OverflowError):
            value = None
        overflows = kind == "float" and value is not None and math.isinf(value)
        if overflows and "inf" not in node.value.lower():
            value = None
        if value is None or (kind == "int" and not -(2**63) <= value < 2**64):
            expected = {"bool": "true or false", "int": "an integer of at most 64 bits"}
            raise _error(
                f"{node.value[:40]!r} where {expected.get(kind, 'a 64-bit number')} is expected",
                node,
            )
        return value


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """Returns the error for a problem at the place of a node or event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


# a copy, since PyYAML's own loaders share theirs
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("float", r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("int", r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)", "-+0123456789"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
# only what JSON has too: a tag such as !!timestamp or !!set is refused
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _JSON_TYPES
}
for _tag in ("bool", "int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


class _RayLoader(_Loader):
    """A loader for files of Ray's cluster launcher, which reads yes, no, on and off as booleans."""


_RayLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool",
    re.compile(r"^(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"),
    list("yYnNoO"),
)


def read_yaml(path: str, expected: str, for_ray: bool = False) -> Any:
    """Returns what a YAML file holds.

    Args:
        path: The file.
        expected: As in `read_text`.
        for_ray: As in `load_yaml`.

    Raises:
        InputError: As `read_text` and `load_yaml`.
    """
    return load_yaml(read_text(path, expected), path, for_ray)


def read_text(path: str, expected: str) -> str:
    """Returns the text of a YAML file.

    Args:
        path: The file.
        expected: What the file should be, for errors, such as "a recipe (a YAML file)".

    Raises:
        InputError: The file cannot be read, or is larger than MAX_BYTES.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(
                f"{path}: expected {expected} of at most {MAX_BYTES >> 20} MiB, found more"
            )
        return content.decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: expected {expected}, found no file") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"{path}: expected {expected}: {reason}") from None


def load_yaml(text: str, where: str, for_ray: bool = False) -> Any:
    """Returns what a text in YAML holds.

    Args:
        text: The text.
        where: The place that errors name.
        for_ray: Whether yes, no, on and off are booleans, as Ray's cluster launcher reads them.

    Raises:
        InputError: It is no YAML; a key is given twice; a number has more than 64 bits; or there
            are more values or levels than MAX_NODES and MAX_DEPTH.
    """
    try:
        return yaml.load(text, Loader=_RayLoader if for_ray else _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or first_line(e)
        raise InputError(
            f"{where}{line}: expected YAML, found {re.sub('^(but )?found ', '', problem)[:300]}"
        ) from None


def lines_of(text: str) -> dict[tuple[int | str, ...], int]:
    """Returns the line of each key and list entry of a text that `load_yaml` reads.

    Args:
        text: The text.

    Returns:
        Path -> line, which is 1 at the beginning. A path has the keys of mappings as strings, and
        the indices of lists.
    """
    lines: dict[tuple[int | str, ...], int] = {}

    def visit(node: Any, path: tuple[int | str, ...]) -> None:
        if isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[(*path, i)] = value.start_mark.line + 1
                visit(value, (*path, i))
        elif isinstance(node, yaml.MappingNode):
            # what a merge (<<) brings comes first, as the mapping's own keys replace it
            for is_merge in (True, False):
                for key, value in node.value:
                    if (key.tag == "tag:yaml.org,2002:merge") is not is_merge:
                        continue
                    merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    if is_merge:
                        for mapping in reversed(merged):
                            visit(mapping, path)
                    elif isinstance(key, yaml.ScalarNode):
                        lines[(*path, key.value)] = key.start_mark.line + 1
                        visit(value, (*path, key.value))

    try:
        visit(_Loader(text).get_single_node(), ())
    except yaml.YAMLError:
        return {}
    return lines
