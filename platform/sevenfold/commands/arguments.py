"""Arguments as they are typed: recipe keys as options, and names that are misspelt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sevenfold.errors import InputError


def with_recipe_options(arguments: Sequence[str], commands: Mapping[str, Any]) -> list[str]:
    """Returns the arguments with `--key value` as `--key=value` behind all others.

    These are options that the command does not have, of a command that takes changes of a recipe,
    whose names look like keys of a recipe or settings of other tools. `recipe.parse` applies them,
    or says what to write.

    Args:
        arguments: The arguments after `sevenfold`.
        commands: The commands by name.

    Raises:
        InputError: There are such options, and no recipe before them.
    """
    first = next((i for i, a in enumerate(arguments) if not a.startswith("-")), len(arguments))
    command = commands.get(arguments[first]) if first < len(arguments) else None
    if command is None or all(p.name != "overrides" for p in command.params):
        return list(arguments)
    takes_value = {
        option: not getattr(p, "is_flag", False)
        for p in (*command.params, *_help(command))
        for option in (*p.opts, *p.secondary_opts)
    }
    kept, changes = list(arguments[: first + 1]), list[str]()
    rest = list(arguments[first + 1 :])
    positional = 0
    while rest:
        item = rest.pop(0)
        option, equals_sign, _ = item.partition("=")
        if item == "--":
            positional += len(rest)
            changes = [*rest, *changes]
            break
        if not item.startswith("--"):
            positional += not item.startswith("-")
            kept.append(item)
        elif option in takes_value:
            kept.append(item)
            if takes_value[option] and not equals_sign and rest:
                kept.append(rest.pop(0))
        elif not _is_for_recipe(option, list(takes_value)):
            kept.append(item)
        else:
            changes.append(item if equals_sign else _with_value(item, rest))
    if changes and not positional:
        from sevenfold.recipe.places import shown_argument

        raise InputError(
            f"sevenfold {command.name}: expected RECIPE, a YAML file, before its changes; found "
            f"only {shown_argument(changes[0])}"
        )
    return [*kept, "--", *changes] if changes else kept


def _help(command: Any) -> list[Any]:
    """Returns the option --help of a command, which is not among its parameters."""
    names = getattr(command, "help_option_names", None) or ["--help"]
    return [type("Help", (), {"opts": names, "secondary_opts": [], "is_flag": True})]


def _is_for_recipe(option: str, options: list[str]) -> bool:
    """Returns whether an option is a recipe's key or a setting of another tool, or like one."""
    from sevenfold.recipe import synonyms
    from sevenfold.recipe.keys import all_keys, guesses, is_key_path, nearest

    name = synonyms.plain_name(option)
    if "." in name or is_key_path(name) or name in synonyms.SYNONYMS:
        return True
    if name in {key.name for key in all_keys()}:
        return True
    return nearest(option, options) is None and bool(guesses((name,)))


def _with_value(option: str, rest: list[str]) -> str:
    """Returns `--key=value` with the next argument, which is removed from the rest.

    A full key without a value stays as it is, for an error; other names are only told what to
    write instead, for which they are switches.
    """
    from sevenfold.recipe.keys import as_path, find, is_key_path

    name = option.lstrip("-").replace("-", "_")
    key = find(as_path(name))
    following = rest[0] if rest else "--"
    is_value = not following.startswith("--")
    if key is not None and key.field.annotation is bool:
        is_value = following.lower() in ("true", "false")
    elif not is_key_path(name):
        is_value = is_value and "=" not in following and not following.endswith((".yaml", ".yml"))
    if is_value:
        return f"{option}={rest.pop(0)}"
    return option if is_key_path(name) else f"{option}=true"


def usage_error(error: Any, commands: Mapping[str, Any]) -> str:
    """Returns the message of an error of typer, with the nearest name that there is.

    Args:
        error: The error.
        commands: The commands by name.
    """
    from sevenfold.recipe.keys import did_you_mean

    message = str(error.format_message() if hasattr(error, "format_message") else error)
    message = message.replace("\n\t", " ")  # typer lists the choices of an argument line by line
    message = message.replace("Value error, ", "").rstrip(".")
    if (option := getattr(error, "option_name", None)) and "No such option" in message:
        context = getattr(error, "ctx", None)
        known = [o for p in context.command.params for o in p.opts] if context else []
        return f"unknown option {option}{did_you_mean(option, known)}"
    if match := re.match(r"No such command '(.*?)'(\.|$)", message, re.DOTALL):
        return f"unknown command {match[1]!r}{did_you_mean(match[1], list(commands))}"
    if match := re.search(r"'([^']*)' is not one of (.*)", message):
        message += did_you_mean(match[1], re.findall(r"'([^']*)'", match[2]))
    return message
