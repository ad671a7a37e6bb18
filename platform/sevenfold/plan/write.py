"""Settings put into a recipe's text, whose comments and order stay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.recipe import loads

LINE = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z_][\w]*):(?P<value>.*?)(?P<comment>\s+#.*)?$")


def write(path: str, changes: Mapping[str, Any]) -> None:
    """Puts `{"section.key": value}` into the file, and nothing where that is not the recipe that was meant.

    Raises InputError where the file's form does not let it be done, or the recipe would not be valid.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        meant = loads(text, path, dict(changes))
    except InputError as e:
        raise InputError(f"{e}; nothing was written") from None
    made = put(text, changes)
    try:
        same = loads(made, path) == meant
    except InputError:
        same = False
    if not same:
        told = " ".join(f"{k}={_said(v)}" for k, v in changes.items())
        raise InputError(f"{path}: its form is not one that can be changed here; nothing was written: put in {told}")
    storage.write(str(Path(path).resolve()), made)


def put(text: str, changes: Mapping[str, Any]) -> str:
    """Of two levels: sections, and keys in them."""
    lines = text.splitlines()
    for path, value in changes.items():
        section, key = path.split(".")
        _put(lines, section, key, value)
    return "\n".join(lines) + "\n"


def _put(lines: list[str], section: str, key: str, value: Any) -> None:
    begin = next((i for i, line in enumerate(lines) if _is(line, section, 0)), None)
    if begin is None:
        lines += [f"{section}:", f"  {key}: {_said(value)}"]
        return
    _block(lines, begin, section)
    end = begin + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " #"):
        end += 1
    while not lines[end - 1].strip() or lines[end - 1].startswith("#"):  # what comes before the next section is its own
        end -= 1
    inner = [LINE.match(line) for line in lines[begin + 1 : end]]
    indent = next((len(m["indent"]) for m in inner if m and m["indent"]), 2)
    for i in range(begin + 1, end):
        if _is(lines[i], key, indent):
            found = LINE.match(lines[i])
            assert found is not None
            after = i + 1
            while after < end and lines[after].startswith(" " * (indent + 1)) and lines[after].strip()[0] != "#":
                after += 1  # a value over several lines
            lines[i:after] = [f"{' ' * indent}{key}: {_said(value)}{found['comment'] or ''}"]
            return
    lines.insert(end, f"{' ' * indent}{key}: {_said(value)}")


def _is(line: str, key: str, indent: int) -> bool:
    found = LINE.match(line)
    return found is not None and found["key"] == key and len(found["indent"]) == indent


def _block(lines: list[str], at: int, section: str) -> None:
    """A section that is written in braces on one line becomes one of lines."""
    found = LINE.match(lines[at])
    assert found is not None
    if not found["value"].strip():
        return
    try:
        inner = yaml.safe_load(found["value"])
    except yaml.YAMLError:  # braces over several lines
        return
    if not isinstance(inner, dict):
        return
    body = [f"  {k}: {_said(v)}" for k, v in inner.items()]
    lines[at : at + 1] = [f"{section}:{found['comment'] or ''}", *body]


def _said(value: Any) -> str:
    """On one line, as YAML."""
    if isinstance(value, dict | list | tuple):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    if isinstance(value, str):
        return yaml.safe_dump(value, width=10_000).strip().removesuffix("\n...").strip()
    return json.dumps(value)
