"""YAML as recipes are written in it: plain values are read as YAML 1.2 does."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sevenfold.errors import InputError, first_line

_YAML_1_1 = {f"tag:yaml.org,2002:{tag}" for tag in ("bool", "int", "float", "timestamp")}


class _Loader(yaml.SafeLoader):
    """A safe loader that reads plain values as YAML 1.2 does.

    PyYAML follows YAML 1.1: 1e-3 is a string there, `no`, `off` and `y` (labels, or the code of
    Norwegian) are booleans, 12:30 is a number, and 2024-01-31 no text.
    """


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


def load_yaml(text: str, where: str) -> Any:
    """Returns what a text in YAML holds.

    Args:
        text: The text.
        where: The place that errors name.

    Raises:
        InputError: It is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(
            f"{where}{line}: expected YAML, found {getattr(e, 'problem', None) or first_line(e)}"
        ) from None
