"""Commands to start with: a recipe for data of one's own, and the recipes that are shipped."""

from __future__ import annotations

from typing import Annotated

import typer

from sevenfold.commands.options import StartFrom, Task


def init(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A file, folder or glob, local or a URL.")
    ],
    task: Task = None,
    model: StartFrom = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The recipe's file.  [default: DATA's name, .yaml]"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
) -> None:
    """Look at data and write a recipe that trains on it."""
    from sevenfold.init import command

    command.run(data, task, model, out, ask=not yes and command.is_terminal())


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A recipe to print.", show_default=False),
    ] = None,
) -> None:
    """List the recipes that come with sevenfold, or print one.

    Commands take their names: `sevenfold finetune chat data.path=FILE`.
    """
    from sevenfold.recipe import shipped
    from sevenfold.report.console import print_text, say

    if name is not None:
        print_text(shipped.text(name), end="")
        return
    for name, file in shipped.recipes().items():
        say(f"{name:<16} {shipped.summary(file)}")


def cluster_files(
    out: Annotated[str, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
) -> None:
    """Write the files to start a cluster with: cluster.yaml for `ray up`, and deploy/."""
    import shutil
    from pathlib import Path

    from sevenfold.errors import InputError
    from sevenfold.recipe import shipped
    from sevenfold.report.console import say

    folder = Path(out)
    files = shipped.cluster_files()
    taken = [str(folder / name) for name in files if (folder / name).exists()]
    if taken:
        raise InputError(f"{taken[0]}: exists already: choose another folder, or move it away")
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    say(f"{folder}: {', '.join(files)}")
