"""Ways to damage a file, and commands that must say so in one line."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sevenfold.cli import main


def _flip(content: bytes) -> bytes:
    """Changes one bit of the last quarter: in weights a value, not the header."""
    at = len(content) * 7 // 8
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _other(content: bytes) -> bytes:
    return random.Random(len(content)).randbytes(len(content))


def _not_utf8(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\xff\xe9" + content[middle:]


# What each damage makes of a file's content.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "not UTF-8": _not_utf8,
    "list": lambda _: b"[1, 2]",
    "no keys": lambda _: b"{}",
    "text": lambda _: b'"text"',
    "other bytes": _other,
    "flipped": _flip,
    "folder": lambda _: b"",
    "gone": lambda _: b"",
}


def damage(path: Path, kind: str) -> None:
    """Damages a file."""
    content = path.read_bytes()
    path.unlink()  # not its hard links
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(DAMAGES[kind](content))


class ReachedCluster(Exception):
    """Raised where a command would ask the cluster for resources: all checks were passed."""


class Runner:
    """Runs commands on damaged copies of a run.

    Args:
        run: The run, which stays as it is.
        folder: A new folder for the copies.
        capsys: pytest's fixture.
    """

    def __init__(self, run: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
        self._run, self._folder, self._capsys, self._copies = run, folder, capsys, 0

    def __call__(
        self, argv: list[str], file: str = "", kind: str = "", without: tuple[str, ...] = ()
    ) -> tuple[object, str, list[str]]:
        """Runs a command on a copy of the run, in which one file is damaged.

        Args:
            argv: The command; {runs} stands for the folder that the copy is in, {run} for the copy.
            file: The file to damage, relative to the run. "": none.
            kind: How; a key of DAMAGES.
            without: Files and folders to leave out of the copy.

        Returns:
            The exit code, or the type of an exception; standard output without white space, and the
            lines of standard error.
        """
        self._copies += 1
        runs = self._folder / f"{self._copies:06}"
        copy = runs / self._run.name
        shutil.copytree(self._run, copy)
        for name in without:
            path = copy / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if file:
            damage(copy / file, kind)
        self._capsys.readouterr()
        code: object
        try:
            code = main([part.format(runs=runs, run=copy) for part in argv])
        except Exception as e:
            code = type(e)
        out, err = self._capsys.readouterr()
        shutil.rmtree(runs)
        # without spaces and line breaks, since a path may be wrapped
        shown = re.sub(r"\s+", "", out).replace(str(runs), "RUNS")
        return code, shown, err.replace(str(runs), "RUNS").splitlines()


def files_of(run: Path) -> list[str]:
    """Returns the files of a run that sevenfold itself reads again."""
    paths = (path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file())
    return [str(path) for path in paths if path.parts[0] not in ("tensorboard", "ray")]
