"""Writes settings into a recipe's file and keeps its comments and order."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.tokens import CommentToken

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.recipe import loads


def write_settings(path: str, changes: Mapping[str, Any]) -> None:
    """Writes settings into a recipe's file.

    The file is only changed if the result is exactly the recipe with these settings.

    Args:
        path: The recipe's file.
        changes: Values by `section.key`.

    Raises:
        InputError: The changed recipe would not be valid, or the file cannot be changed
            automatically.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        expected = loads(text, path, dict(changes))
    except InputError as e:
        *others, last = e.messages
        raise InputError(*others, f"{last}; nothing was written") from None
    changed = with_settings(text, changes)
    if loads(changed, path) != expected:
        settings = " ".join(f"{key}={value}" for key, value in changes.items())
        raise InputError(
            f"{path}: cannot be changed automatically; nothing was written: set {settings} by hand"
        )
    storage.write(str(Path(path).resolve()), changed)


def with_settings(text: str, changes: Mapping[str, Any]) -> str:
    """Returns the text of a recipe with changed settings.

    Args:
        text: The recipe's YAML.
        changes: Values by `section.key`.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000  # do not wrap lines
    yaml.indent(mapping=2, sequence=4, offset=2)
    tree = yaml.load(text)
    for path, value in changes.items():
        section, key = path.split(".")
        if section not in tree:
            tree[section] = CommentedMap()
        is_new = key not in tree[section]
        following = _take_comment_after(tree[section]) if is_new and tree[section] else None
        tree[section][key] = value
        if following is not None:
            tree[section].ca.items[key] = [None, None, following, None]
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def _take_comment_after(section: CommentedMap) -> CommentToken | None:
    """Removes and returns the blank lines and comments between a section and the next one.

    ruamel.yaml attaches them to the last value of the section, and would put a new key after them.
    """
    node: Any = section
    while True:
        last = list(node)[-1] if isinstance(node, CommentedMap) else len(node) - 1
        value = node[last]
        if not isinstance(value, CommentedMap | CommentedSeq) or not value or value.fa.flow_style():
            break
        node = value
    slot = 2 if isinstance(node, CommentedMap) else 0
    tokens = node.ca.items.get(last)
    if not tokens or tokens[slot] is None:
        return None
    same_line, newline, following = tokens[slot].value.partition("\n")
    if not following:
        return None
    mark = tokens[slot].start_mark
    tokens[slot] = CommentToken(same_line + newline, mark, None) if same_line.strip() else None
    return CommentToken(newline + following, mark, None)
