"""Reads recipes: a file with changes from the command line, and those that runs have stored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from sevenfold.errors import InputError
from sevenfold.recipe.keys import Path, as_path, as_text, auto_keys, is_key_path
from sevenfold.recipe.locations import STORED, WITH_SECRETS
from sevenfold.recipe.mistakes import Mistake, mistakes_of, refusal, shortened
from sevenfold.recipe.places import Places, one_line, shown_argument
from sevenfold.recipe.plain_yaml import load_yaml, read_text
from sevenfold.recipe.recipe import RENAMED, Recipe
from sevenfold.recipe.shipped import recipe_file

_EXPECTED = "a recipe (a YAML file)"
_NULLS = ("null", "Null", "NULL", "~")


class Change(NamedTuple):
    """A change of a recipe that was given as an argument.

    Attributes:
        path: The key.
        value: Its new value.
        argument: The argument, for errors.
    """

    path: Path
    value: Any
    argument: str


# Chooses values for `auto`: called with the recipe and its keys that are `auto`; returns a value
# for each key.
Fill = Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Any]]


def parse(path: str, overrides: Sequence[str] = (), fill: Fill | None = None) -> Recipe:
    """Reads a recipe from a file.

    Args:
        path: The file, or the name of a recipe that comes with sevenfold.
        overrides: Changes to it, each as key.path=value, or as --key.path=value.
        fill: Chooses values for the keys that are `auto`. None: `auto` is refused.

    Raises:
        InputError: The file cannot be read or is no YAML; or the recipe or the changes have unknown
            keys, values of a wrong type, or settings that contradict each other. All of these
            mistakes are reported at once.
    """
    if "=" in path and is_key_path(path.partition("=")[0]) and not os.path.exists(path):
        raise InputError(
            f"{shown_argument(path)}: expected RECIPE, a YAML file, before its changes"
        )
    path = recipe_file(path)
    text = read_text(path, _EXPECTED)
    tree = _plain(_check_tree(load_yaml(text, path), path))
    changes, wrong, uncertain = read_arguments(overrides)
    mistakes: list[Mistake] = []
    for change in changes:
        problem = _apply(tree, change.path, change.value, fills_null=True)
        if problem is not None:
            wrong.append(f"{shown_argument(change.argument)}: {problem}")
            uncertain.add(change.path)
    if _pop_consent(tree):
        mistakes.append(
            Mistake(
                "model.trust_remote_code: a recipe cannot allow the code of a model to run: "
                "remove it; the command says what to add to itself instead",
                (("model", "trust_remote_code"),),
            )
        )
    _fill(tree, fill)
    places = Places(path, text, {change.path: change.argument for change in changes})
    return _validate(tree, places, (), mistakes, wrong, uncertain)


def from_tree(
    tree: Mapping[str, Any], changes: Mapping[str, Any], fill: Fill | None = None
) -> Recipe:
    """Builds a recipe from nested dictionaries.

    Args:
        tree: The recipe.
        changes: Values to change, as {"key.path": value}.
        fill: As in `parse`.

    Raises:
        InputError: As `parse`.
    """
    plain = _plain(dict(tree))
    wrong = _apply_all(plain, changes, "changes")
    _fill(plain, fill)
    return _validate(plain, Places("recipe"), wrong=wrong)


def loads(text: str, where: str, changes: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe that a run has stored. Unlike in `parse`, sections may have their old names.

    Args:
        text: The recipe, in YAML.
        where: The place that errors name, such as the file's path.
        changes: Values to replace, as {"key.path": value}.

    Raises:
        InputError: As `parse`.
    """
    tree = _stored_tree(text, where)
    wrong = _apply_all(tree, changes or {}, where)
    return _validate(tree, Places(where, text), (STORED,), wrong=wrong)


def stored_hash(text: str, where: str) -> str:
    """Returns the hash of a recipe that a run has stored, as the version that stored it did.

    Earlier versions kept the secrets of URLs in recipes.

    Args:
        text: The recipe, in YAML.
        where: As in `loads`.
    """
    return _validate(_stored_tree(text, where), Places(where, text), (WITH_SECRETS,)).hash()


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Returns a recipe with other values, see `Recipe.override`.

    Raises:
        InputError: As `parse`.
    """
    tree = _plain(recipe.model_dump(mode="json"))
    wrong = _apply_all(tree, changes, "override")
    return _validate(tree, Places("override"), wrong=wrong)


def _validate(
    tree: dict[str, Any],
    places: Places,
    context: Sequence[str] = (),
    mistakes: Iterable[Mistake] = (),
    wrong: Sequence[str] = (),
    uncertain: Iterable[Path] = (),
) -> Recipe:
    """Builds a recipe.

    Args:
        tree: The recipe.
        places: Where its keys were given.
        context: How its URLs are read: locations.STORED or WITH_SECRETS.
        mistakes: Mistakes that were found before.
        wrong: Messages about arguments that could not be applied.
        uncertain: Keys whose values are not known because of these.

    Raises:
        InputError: The recipe has mistakes, or there were some before.
    """
    found = list(mistakes)
    try:
        recipe = Recipe.model_validate(tree, context=dict.fromkeys(context))
    except ValidationError:
        found += mistakes_of(tree, context, uncertain)
    else:
        if not (found or wrong):
            return recipe
    lines = [*refusal(found, places), *(one_line(message) for message in wrong)]
    raise InputError(*shortened(lines)) from None


def read_arguments(arguments: Sequence[str]) -> tuple[list[Change], list[str], set[Path]]:
    """Reads changes of a recipe that are given as arguments.

    Args:
        arguments: Each as key.path=value, or as --key.path=value.

    Returns:
        The changes, messages about the arguments that are none, and the keys that these may mean.
    """
    changes: list[Change] = []
    wrong: list[str] = []
    uncertain: set[Path] = set()
    rest = list(arguments)
    while rest:
        item = rest.pop(0)
        key, equals_sign, value = item.partition("=")
        if meant := _with_spaces(item, rest):
            wrong.append(meant)
            uncertain.add(as_path(key.strip().strip(":")))
        elif not equals_sign or not key.strip("-"):
            wrong.append(f"{shown_argument(item)}: {_no_change(key, item)}")
            uncertain.add(as_path(key.strip("-") or "-"))
        else:
            path = as_path(_key_of(key))
            try:
                changes.append(Change(path, read_value(value, shown_argument(item)), item))
            except InputError as e:
                wrong.append(str(e))
                uncertain.add(path)
    return changes, wrong, uncertain


def read_value(text: str, where: str) -> Any:
    """Returns the value that an argument gives, in YAML; a text that is empty is the empty string.

    Args:
        text: The value.
        where: The argument, for errors.

    Raises:
        InputError: It is no YAML, or has a comment.
    """
    value = load_yaml(text, where)
    if value is None and text.strip() not in _NULLS:
        return text  # empty, spaces, or what YAML takes for a comment
    if isinstance(value, str) and " #" in text and value == text.partition(" #")[0].strip():
        raise InputError(
            f"{where}: in YAML a comment begins at ' #': put the value in quotes, or remove it"
        )
    return value


def _key_of(key: str) -> str:
    """Returns the key that an argument names: --train.global-batch is train.global_batch."""
    if not key.startswith("-"):
        return key
    key = key.lstrip("-")
    return key if is_key_path(key) else key.replace("-", "_")


def _with_spaces(item: str, rest: list[str]) -> str:
    """Returns the message about a change that is written with spaces; empty if it is none.

    The arguments that belong to it are removed from the rest.
    """
    key, equals_sign, value = item.partition("=")
    given = [item]
    if not equals_sign and rest and rest[0].startswith("=") and not item.startswith("-"):
        given.append(rest.pop(0))
        value = given[1][1:]
        if not value and rest and "=" not in rest[0]:
            given.append(rest.pop(0))
            value = given[2]
    elif not value and is_key_path(key) and rest and not _may_be_change(rest[0]):
        given.append(rest.pop(0))
        value = given[1]
    elif not equals_sign and ":" in item and is_key_path(item.partition(":")[0].strip()):
        key, _, value = item.partition(":")
    elif not equals_sign or key == key.strip():
        return ""
    meant = shown_argument(f"{key.strip()}={value.strip()}")
    return f"{shown_argument(' '.join(given))}: expected key.path=value, write {meant}"


def _may_be_change(argument: str) -> bool:
    return "=" in argument or argument.startswith("-") or is_key_path(argument)


def _no_change(key: str, item: str) -> str:
    if item.startswith("-"):
        return "expected a value: --KEY.PATH VALUE, or KEY.PATH=VALUE"
    example = f"{key}=VALUE" if is_key_path(key) else "train.steps=100"
    return f"expected key.path=value, for example {example}"


def _fill(tree: dict[str, Any], fill: Fill | None) -> None:
    if fill is not None and (keys := auto_keys(tree)):
        _apply_all(tree, fill(tree, keys), "auto")


def _stored_tree(text: str, where: str) -> dict[str, Any]:
    stored = _check_tree(load_yaml(text, where), where)
    tree = {RENAMED.get(key, key): value for key, value in stored.items()}
    _pop_consent(tree)
    return _plain(tree)


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy whose keys are strings, and in which no two places share a value."""
    plain: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    return plain


def _pop_consent(tree: dict[str, Any]) -> bool:
    """Removes model.trust_remote_code, which earlier versions had, and returns its value."""
    model = tree.get("model")
    return bool(model.pop("trust_remote_code", False)) if isinstance(model, dict) else False


def _check_tree(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise InputError(
            f"{where}: expected a recipe (keys and values), found {type(tree).__name__}"
        )
    return tree


def _apply_all(tree: dict[str, Any], changes: Mapping[str, Any], where: str) -> list[str]:
    """Applies changes; returns messages about those that cannot be applied."""
    problems = [_apply(tree, as_path(key), value) for key, value in _plain(dict(changes)).items()]
    return [f"{where}: {problem}" for problem in problems if problem is not None]


def _apply(tree: dict[str, Any], path: Path, value: Any, fills_null: bool = False) -> str | None:
    """Applies one change; returns why that is not possible.

    Args:
        tree: The recipe, which is changed.
        path: The key; a number in it is an index of a list.
        value: The value.
        fills_null: Whether a section that is null becomes one.
    """
    node: Any = tree
    for i, part in enumerate(path):
        key = f"unknown key {as_text(path)!r}"
        parent = as_text(path[:i])
        is_last = i == len(path) - 1
        if isinstance(node, list):
            if not isinstance(part, int):
                return f"{key}: {parent} is a list: write {as_text((*path[:i], 0, *path[i:]))}"
            if part >= len(node):
                return (
                    f"{key}: {parent} has entries 0 to {len(node) - 1}"
                    if node
                    else (f"{key}: {parent} is an empty list: write {parent}=[...]")
                )
        elif isinstance(node, dict):
            part = str(part)
            if not is_last and (part not in node or (fills_null and node[part] is None)):
                node[part] = {}
        else:
            return f"{key}: {parent} has no keys"
        if is_last:
            node[part] = value
        else:
            node = node[part]
    return None
