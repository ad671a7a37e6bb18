"""A mistake that the doctor found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """A mistake in a cluster.yaml.

    Attributes:
        setting: The path of the setting in the file, such as `provider.region`.
        message: What was expected, what was found, and how to fix it.
    """

    setting: str
    message: str


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message that suggests a similar known name; empty if there is none."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f": did you mean {close[0]}?" if close else ""
