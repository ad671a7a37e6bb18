"""Helpers for the wording of messages."""

from __future__ import annotations


def pluralize(count: int, noun: str) -> str:
    """Returns a count with its noun: "1 worker", "2 workers"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
