"""The two ways a run ends badly. Anything else that surfaces is a bug and keeps its traceback."""


class InputError(Exception):
    """What the person gave cannot be used: says what was expected, what was found, where, what to do."""

    exit_code = 2


class RunError(Exception):
    """The input was fine and the run failed all the same: says why and what to do."""

    exit_code = 1


class DivergedError(RunError):
    """The training itself went wrong: the same start would end the same way."""
