"""What a run may be told from outside while it trains."""

from enum import IntEnum


class Notice(IntEnum):
    """What rank 0 has been told, and every rank heeds after the step."""

    NONE = 0
    SAVE = 1  # a machine will be taken away: save at once, and go on
    END = 2  # save at once, and end
    LEAVE = 3  # end; nobody goes on from this step
