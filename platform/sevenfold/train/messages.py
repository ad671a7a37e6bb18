"""Helpers for the wording of messages."""

from __future__ import annotations


def pluralize(count: int, noun: str) -> str:
    """Returns a count with its noun: "1 worker", "2 workers"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def describe_moved(parameters: set[str]) -> str:
    """Returns the message about parameters that `load_checkpoint` gives a new optimizer state."""
    return (
        f"{pluralize(len(parameters), 'parameter')} had another optimizer in an earlier version of "
        f"sevenfold, and its state begins anew: {', '.join(sorted(parameters))}"
    )
