"""The outcomes of a drill, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sevenfold.report.console import say, table


@dataclass(frozen=True)
class Outcome:
    """What a fault did. The fields are the keys of drill.json.

    Attributes:
        fault: The fault's name.
        about: Its description.
        allowed: The largest `difference` with which the drill passes.
        struck: The last step before the fault.
        pause_s: The longest time without a step after the fault, in seconds.
        went_on: The step that the run resumed from; None if it did not have to resume.
        redone: How many steps were repeated.
        lost: How many steps of committed checkpoints were lost. The steps of a checkpoint that was
            damaged on purpose do not count.
        difference: The largest relative difference of a loss from the baseline run's. 0 if the
            gradient norms are bitwise identical too; None if the ledgers differ or the run failed.
        looks: How often the folder was checked for a valid checkpoint.
        unguarded: How many of these checks found none.
        error: Why the run did not finish.
    """

    fault: str
    about: str
    allowed: float = 0.0
    struck: int = 0
    pause_s: float = 0.0
    went_on: int | None = None
    redone: int = 0
    lost: int = 0
    difference: float | None = None
    looks: int = 0
    unguarded: int = 0
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the results are those of the baseline run and a checkpoint was always valid."""
        return (
            self.difference is not None
            and self.difference <= self.allowed
            and not self.lost
            and not self.unguarded
        )


def show(outcomes: Sequence[Outcome]) -> None:
    """Prints the table of outcomes and the errors of runs that did not finish."""
    columns = [
        "fault",
        "injected after step",
        "longest pause (s)",
        "resumed from step",
        "steps repeated",
        "committed steps lost",
        "checks without a valid checkpoint",
        "identical",
    ]
    rows = [
        [
            outcome.about,
            outcome.struck,
            round(outcome.pause_s, 1),
            outcome.went_on,
            outcome.redone,
            outcome.lost,
            f"{outcome.unguarded} of {outcome.looks}",
            _format_difference(outcome.difference),
        ]
        for outcome in outcomes
    ]
    table("Drills", columns, rows)
    for outcome in outcomes:
        if outcome.error:
            say(f"{outcome.fault}: {outcome.error}")


def _format_difference(difference: float | None) -> str:
    if difference is None:
        return "NO"
    return "bitwise" if difference == 0 else f"to {difference:.0e}"
