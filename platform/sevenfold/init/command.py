"""The command `init`, and recipes that are made from data while a command starts."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import typer

from sevenfold import storage
from sevenfold.cluster.auto import Hardware, fill, find_hardware
from sevenfold.errors import InputError
from sevenfold.init.rows import Rows, look
from sevenfold.init.settings import Settings, choose, look_at_base
from sevenfold.init.tasks import TASKS, Match, describe_columns, matches, require_match
from sevenfold.init.text import recipe_text
from sevenfold.recipe import PRETRAINING, Recipe, parse
from sevenfold.report.console import say, table


def run(path: str, task: str | None, model: str | None, out: str | None, ask: bool = False) -> str:
    """Looks at data and writes a recipe for it.

    Args:
        path: A file, folder or glob, local or a URL.
        task: The name of the task. None: by the rows.
        model: The model to start from. None: a new one.
        out: The recipe's file. Default: NAME.yaml in the current folder.
        ask: Whether to ask what is not certain.

    Returns:
        The recipe's file.

    Raises:
        InputError: The data, the model or both together cannot be used, or the file exists.
    """
    text, settings, hardware = draft(path, task, model, ask)
    recipe = _parsed(text, settings.name, hardware)
    file = Path(out or f"{recipe.name}.yaml")
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{file}: exists already, with other content: choose another file (--out FILE), or "
            "remove it"
        )
    file.write_text(text, encoding="utf-8")
    job = "pretrain" if recipe.objective in PRETRAINING else "finetune"
    say(f"wrote {file}")
    say(f"next: sevenfold {job} {file} && sevenfold evaluate runs/{recipe.name}")
    return str(file)


def draft(
    path: str, task: str | None, model: str | None, ask: bool = False
) -> tuple[str, Settings, Hardware]:
    """Returns the text of a recipe for data, its numbers, and what they were chosen for.

    The arguments are those of `run`.

    Raises:
        InputError: The data, the model or both together cannot be used.
    """
    path = storage.keep_secrets(path)
    if task is not None and task not in TASKS:
        raise InputError(f"--task: expected one of {', '.join(TASKS)}, found {task!r}")
    rows = look(path)
    match = require_match(rows, task)
    _show(rows)
    if ask and task is None and not match.is_certain:
        match = _ask_task(rows, match)
    elif task is None:
        say(f"task: {match.task.name}, as its columns say" if match.is_certain else _guess(match))
    if ask and model is None:
        model = _ask_model(match)
    base = look_at_base(model, rows, match) if model else None
    hardware = find_hardware()
    settings = choose(rows, match, base, hardware)
    return recipe_text(rows, _absolute(path), match, settings, base), settings, hardware


def recipe_of(path: str, task: str | None, model: str | None, overrides: Sequence[str]) -> Recipe:
    """Returns a recipe for data that a command was given in place of a recipe.

    Args:
        path: As in `run`.
        task: As in `run`.
        model: As in `run`.
        overrides: Changes to the recipe, as in `recipe.parse`.

    Raises:
        InputError: As for `draft`.
    """
    text, settings, hardware = draft(path, task, model)
    return _parsed(text, settings.name, hardware, overrides)


def _parsed(text: str, name: str, hardware: Hardware, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe that a text describes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        return parse(str(file), tuple(overrides), partial(fill, found=hardware))


def is_data(path: str) -> bool:
    """Returns whether the argument RECIPE of a command is data instead: no YAML, and it exists."""
    if path.endswith((".yaml", ".yml")):
        return False
    return (
        storage.is_url(path)
        or os.path.isdir(path)
        or ("." in os.path.basename(path) and os.path.exists(path))
    )


def _absolute(path: str) -> str:
    return path if storage.is_url(path) else os.path.abspath(path)


def _show(rows: Rows) -> None:
    """Shows what the rows hold."""
    survey = rows.survey
    files = ", ".join(f"{count:,} .{suffix}" for suffix, count in rows.formats.items())
    more = "" if rows.is_complete else f" (only the first {rows.rows:,} rows were read)"
    say(f"{rows.path}: {files}; {rows.rows:,} rows, {survey['bytes'] / 1e6:,.1f} MB of text{more}")
    table(
        "columns",
        ["column", "filled", "classes", "mean characters", "languages", "example"],
        describe_columns(rows),
        left=["languages", "example"],
    )
    scripts = ", ".join(f"{s['script']} {s['share']:.0%}" for s in survey["scripts"][:4])
    exact, near = survey["exact_duplicates"]["texts"], survey["near_duplicates"]
    say(
        f"scripts: {scripts or 'none'}; duplicates: {exact:,} exact, {near['texts']:,} near among "
        f"{near['looked_at']:,}; longest row: {survey['longest']['characters']:,} characters "
        f"({survey['longest']['place']})"
    )
    if rows.bad:
        say(f"{rows.bad:,} rows cannot be read; the first: {rows.first_bad}")


def _guess(match: Match) -> str:
    columns = ", ".join(f"{role}: {column}" for role, column in match.columns.items())
    return (
        f"task: {match.task.name} ({columns}), a guess: --task names another ({', '.join(TASKS)})"
    )


def _ask_task(rows: Rows, match: Match) -> Match:
    """Asks which task the rows are for."""
    names = [found.task.name for found in matches(rows)]
    answer = typer.prompt(f"Task ({', '.join(names)})", default=match.task.name, err=True)
    if answer not in TASKS:
        raise InputError(f"expected one of {', '.join(TASKS)}, found {answer!r}")
    return require_match(rows, answer)


def _ask_model(match: Match) -> str | None:
    """Asks which model to start from."""
    answer: str = typer.prompt(
        "Start from a model (a folder, a run, a .gguf file, or hf://ORGANIZATION/NAME); empty for "
        "a new small one",
        default="",
        show_default=False,
        err=True,
    )
    return answer.strip() or None


def is_terminal() -> bool:
    """Returns whether somebody can answer questions."""
    return sys.stdin.isatty() and sys.stderr.isatty()
