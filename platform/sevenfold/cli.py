"""The entry point of the command line: `sevenfold COMMAND ...`. The scripts in jobs/ use it too."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from sevenfold import __version__
from sevenfold.commands import models, planning, reference, runs, starting
from sevenfold.commands.arguments import usage_error, with_recipe_options
from sevenfold.errors import InputError, RunError, StoppedError
from sevenfold.report.console import escape_logs_and_tracebacks, say

app = typer.Typer(
    help="Pretrain, fine-tune and tune language models on a Ray cluster.",
    add_completion=False,
    rich_markup_mode=None,
)
# In the order in which --help lists them.
_COMMANDS: tuple[Callable[..., None], ...] = (
    starting.init,
    starting.recipes,
    starting.cluster_files,
    runs.corpus,
    runs.pretrain,
    runs.finetune,
    runs.sweep,
    runs.tokenize,
    runs.drill,
    runs.evaluate,
    runs.export,
    runs.ledger,
    models.base,
    models.generate,
    models.chat,
    models.retrieve,
    models.inspect,
    planning.doctor,
    planning.plan,
    reference.explain,
    reference.schema,
)
for _command in _COMMANDS:
    app.command()(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments after `sevenfold`. Default: those of this process.

    Returns:
        The exit code: 0 for success, 1 if the run failed, 2 for invalid input, 130 if it was
        stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks is printed as "?"; by default it would end
        # the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    escape_logs_and_tracebacks()
    group = typer.main.get_command(app)
    commands = getattr(group, "commands", {})
    try:
        arguments = with_recipe_options(arguments, commands) or ["--help"]
        code = group.main(arguments, prog_name="sevenfold", standalone_mode=False)
        if code == StoppedError.exit_code:  # what typer makes of a KeyboardInterrupt
            return _print_stopped()
    except TyperException as e:
        return _print_usage_error(e, commands)
    except StoppedError as e:
        say(str(e), stderr=True)
        return e.exit_code
    except InputError as e:
        for message in e.messages:
            _print_error(message, e.exit_code)
        return e.exit_code
    except RunError as e:
        return _print_error(str(e), e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _print_stopped()
    return 0


def job(name: str) -> None:
    """Runs `sevenfold NAME` with the arguments of this process, and exits. For scripts in jobs/."""
    sys.exit(main([name, *sys.argv[1:]]))


def _print_stopped() -> int:
    """Tells a user who interrupted a command how to resume; returns the exit code."""
    say("Stopped; run the same command to resume from the last checkpoint.", stderr=True)
    return StoppedError.exit_code


def _print_usage_error(e: TyperException, commands: Mapping[str, Any]) -> int:
    context = getattr(e, "ctx", None)
    command = context.command_path if context else "sevenfold"
    return _print_error(
        f"{command}: {usage_error(e, commands)}; see {command} --help", InputError.exit_code
    )


def _print_error(message: str, exit_code: int) -> int:
    """Prints an error and returns the exit code."""
    say(f"error: {message}", stderr=True)
    return exit_code


def _print_version(value: bool) -> None:
    if value:
        say(f"sevenfold {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Defines the options of `sevenfold` itself, which come before the command."""


if __name__ == "__main__":
    sys.exit(main())
