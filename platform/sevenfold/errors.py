"""The errors that are reported to the user as one line, each with its exit code.

Any other exception that reaches the user is a bug and is shown with its traceback.
"""

from __future__ import annotations


class InputError(Exception):
    """The user's input is not valid.

    Each message says what was expected, what was found, where, and what to do. Mistakes that are
    found together are reported together, one message each; they are the lines of `str(error)`.
    """

    exit_code = 2

    @property
    def messages(self) -> tuple[str, ...]:
        """The messages, one for each mistake."""
        return tuple(map(str, self.args))

    def __str__(self) -> str:
        return "\n".join(self.messages)


class RunError(Exception):
    """A run failed although its input is valid. The message says why, and what to do."""

    exit_code = 1


class StoppedError(RunError):
    """The run was asked to stop, and stopped. The same command resumes it."""

    exit_code = 130  # 128 + SIGINT, as for any process that is stopped by Ctrl-C


class DivergedError(RunError):
    """The training diverged. Restarting it from the same checkpoint would give the same result."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message that is not empty.

    A line that ends with a colon is followed by the next one: it only announces it, as
    huggingface_hub's "Class validation error for validator 'validate_architecture':" does.
    At most 300 characters; the name of the exception's type if there is no message.
    """
    # torch.distributed.checkpoint wraps the error of one rank in an error with all ranks' failures.
    failure = next(iter(getattr(error, "failures", {}).values()), error)
    error = failure[0] if isinstance(failure, tuple) else failure
    lines = (line.strip() for line in str(error).splitlines())
    found: list[str] = []
    for line in filter(None, lines):
        found.append(line)
        if not line.endswith(":"):
            break
    return (" ".join(found) or type(error).__name__)[:300]


def cause_of(error: object) -> str:
    """Returns the line of a traceback that names the error; only the message of a sevenfold error.

    At most 300 characters.

    Args:
        error: An exception, the text of a traceback, or None.
    """
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    line = next(
        (line for line in reversed(lines) if "Error" in line),
        lines[-1] if lines else "no reason was given",
    )
    return (line.partition("sevenfold.errors.")[2].partition(": ")[2] or line)[:300]
