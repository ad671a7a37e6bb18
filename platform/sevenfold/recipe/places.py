"""Where a user has given each key of a recipe: a line of its file, or an argument."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sevenfold.errors import InputError
from sevenfold.recipe.keys import Path
from sevenfold.recipe.plain_yaml import lines_of, load_yaml
from sevenfold.storage import hide_secrets

_MAX_ARGUMENT = 100  # characters of an argument that are shown
_MAX_LINE = 480  # characters of a message


class Places:
    """The places of a recipe's keys.

    Args:
        where: The recipe's file, or another name of where it comes from.
        text: The recipe's YAML, if it has lines.
        arguments: The changes to it, in their order: key -> argument.
    """

    def __init__(
        self, where: str, text: str | None = None, arguments: Mapping[Path, str] | None = None
    ):
        self._where, self._text = where, text
        self._arguments = dict(arguments or {})
        self._read_lines: dict[Path, int] | None = None

    @property
    def _lines(self) -> dict[Path, int]:
        if self._read_lines is None:  # only a recipe with mistakes is read once more
            self._read_lines = lines_of(self._text) if self._text is not None else {}
        return self._read_lines

    def of(self, keys: tuple[Path, ...]) -> str:
        """Returns the place of the first of the keys that the user has given, as text."""
        argument, line = self._find(keys)
        if argument is not None:
            return shown_argument(self._arguments[argument])
        return self._where if line is None else f"{self._where}:{line}"

    def order(self, keys: tuple[Path, ...]) -> tuple[int, int]:
        """Returns a key to sort by: the lines of the file first, then the arguments."""
        argument, line = self._find(keys)
        if argument is not None:
            return 1, list(self._arguments).index(argument)
        return 0, line or 0

    def _find(self, keys: tuple[Path, ...]) -> tuple[Path | None, int | None]:
        for key in keys:  # what was added last is the most likely reason
            for argument in reversed(list(self._arguments)):
                if key[: len(argument)] == argument:
                    return argument, None
        for key in keys:
            if key in self._lines:
                return None, self._lines[key]
        for key in keys:
            for end in range(len(key) - 1, 0, -1):
                if key[:end] in self._lines:
                    return None, self._lines[key[:end]]
        return None, None


def shown_argument(argument: str) -> str:
    """Returns an argument as it is shown: quoted, cut, and without the secrets of URLs."""
    text = hide_secrets(argument)
    return repr(text if len(text) <= _MAX_ARGUMENT else f"{text[:_MAX_ARGUMENT]}...")


def one_line(text: str) -> str:
    """Returns a message without secrets of URLs and newlines, and cut."""
    text = " ".join(hide_secrets(text).splitlines())
    return text if len(text) <= _MAX_LINE else f"{text[: _MAX_LINE - 3]}..."


def text_of(value: Any) -> str:
    """Returns a value as it is written after `key=`, or in a recipe."""
    if isinstance(value, str):
        try:
            if load_yaml(value, "") == value and value.isprintable():
                return value
        except InputError:
            pass
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_entry(k)}: {_entry(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_entry, value)) + "]"
    return json.dumps(value, default=str)


def _entry(value: Any) -> str:
    text = text_of(value)
    in_list = isinstance(value, str) and any(c in text for c in ",[]{}:#")
    return json.dumps(value, ensure_ascii=False) if in_list and not text.startswith('"') else text
