"""All mistakes of a recipe: each as one line with its place and what to do.

Single values are checked first, in rounds: a wrong one is left out or corrected, and the rest is
checked again, until the recipe can be built. Then all sections name their contradictions. What only
follows from a value that was left out or corrected is not reported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sevenfold.recipe import synonyms
from sevenfold.recipe.keys import Path, as_path, as_text, did_you_mean, find, guesses, is_key_path
from sevenfold.recipe.places import Places, one_line, text_of
from sevenfold.recipe.recipe import RENAMED, Recipe
from sevenfold.recipe.section import UNCHECKED, Section
from sevenfold.recipe.units import EXAMPLES
from sevenfold.storage import hide_secrets

MAX_MESSAGES = 20
_MAX_ROUNDS = 12
# Values that required keys have while the others are checked, if their own are wrong or missing.
# Nothing that is said about them is reported.
PLACEHOLDERS: dict[str, Any] = {
    "Recipe.name": "x",
    "Recipe.data": {"sources": [{"path": "x"}], "sequence_length": 2**20},
    "Recipe.model": {"config": {"model_type": "x"}},
    "Recipe.train": {"global_batch": 1, "micro_batch": 1, "steps": 1},
    "Data.sources": [{"path": "x"}],
    "Data.sequence_length": 2**20,
    "Source.path": "x",
    "Filter.column": "x",
    "Stage.at_tokens": 1,
    "Stage.weights": {"x": 1},
    "Train.global_batch": 1,
    "Train.micro_batch": 1,
    "Sweep.space": {"optimizer.learning_rate": {"choice": [1]}},
}


class Mistake(NamedTuple):
    """A mistake of a recipe.

    Attributes:
        message: What is wrong, and what to do.
        keys: The keys that it is about: its place is the first one that the user has given.
    """

    message: str
    keys: tuple[Path, ...]


def refusal(mistakes: Sequence[Mistake], places: Places) -> list[str]:
    """Returns a line for each mistake, in the order of their places."""
    order = sorted(mistakes, key=lambda mistake: places.order(mistake.keys))
    lines = (one_line(f"{places.of(mistake.keys)}: {mistake.message}") for mistake in order)
    return list(dict.fromkeys(lines))


def shortened(lines: list[str]) -> list[str]:
    """Returns the first lines, and how many more there are."""
    more = len(lines) - MAX_MESSAGES
    return [*lines[:MAX_MESSAGES], f"and {more} more"] if more > 0 else lines


def mistakes_of(
    tree: Mapping[str, Any], context: Sequence[str], uncertain: Iterable[Path] = ()
) -> list[Mistake]:
    """Returns the mistakes of a recipe that `Recipe.model_validate` refuses.

    Args:
        tree: The recipe.
        context: How its URLs are read: locations.STORED or WITH_SECRETS.
        uncertain: Keys whose values are not known; what follows from them is no mistake.
    """
    return _Search(tree, context, uncertain).run()


class _Search:
    """A search for the mistakes of one recipe."""

    def __init__(self, tree: Mapping[str, Any], context: Sequence[str], uncertain: Iterable[Path]):
        self._given = tree
        self._tree: dict[str, Any] = copy.deepcopy(dict(tree))
        self._context = context
        self._found: list[Mistake] = []
        self._dropped: set[Path] = set()  # of which no other mistake is reported
        self._touched = set(uncertain)  # also corrected ones, which may be the wrong guess
        self._moved: list[tuple[Path, Path]] = []  # a section's name in the file, the right one

    def run(self) -> list[Mistake]:
        for i in range(_MAX_ROUNDS):
            try:
                recipe = Recipe.model_validate(
                    self._tree, context=dict.fromkeys((*self._context, UNCHECKED))
                )
            except ValidationError as e:
                errors = e.errors(include_url=False)
            else:
                self._contradictions(recipe, ())
                break
            self._round(errors, is_first=i == 0)
        return self._found

    def _round(self, errors: Sequence[ErrorDetails], is_first: bool) -> None:
        groups: dict[Path, list[ErrorDetails]] = {}
        for error in errors:
            groups.setdefault(self._path(error), []).append(error)
        unknown = [p for p, group in groups.items() if group[0]["type"] == "extra_forbidden"]
        for path in unknown:
            self._unknown_key(path)
        for path, group in groups.items():
            # what is missing may be there under another name
            if path in unknown or (unknown and _is_missing_key(group[0])):
                continue
            is_follow_up = _is_under(path, self._dropped) or (
                not is_first and _is_over(path, self._touched - {path})
            )
            if _is_missing_key(group[0]):
                if not (is_follow_up or _is_under(path, self._touched)):
                    self._missing(path)
            elif not is_follow_up:
                self._add(self._wrong_value(path, group), path)
            self._drop(path)

    def _path(self, error: ErrorDetails) -> Path:
        """Returns the place of an error in the recipe.

        pydantic's has more parts: the types of a union, and the word [key].
        """
        node: Any = self._tree
        path: list[int | str] = []
        for part in error["loc"]:
            inside = (
                part in node
                if isinstance(node, dict)
                else isinstance(node, list) and isinstance(part, int) and part < len(node)
            )
            if not inside:
                break
            path.append(part)
            node = node[part]
        if _is_missing_key(error):
            path.append(error["loc"][-1])
        return tuple(path)

    def _add(self, message: str, *keys: Path) -> None:
        self._found.append(Mistake(message, tuple(map(self._in_file, keys))))

    def _in_file(self, path: Path) -> Path:
        """Returns a key's path in the recipe as it was given, where a section may be misspelt."""
        for given, right in reversed(self._moved):
            if path[: len(right)] == right:
                path = given + path[len(right) :]
        return path

    def _unknown_key(self, path: Path) -> None:
        """Reports an unknown key, and puts its value where it belongs if that is clear."""
        value = _remove(self._tree, path)
        name = as_text(self._in_file(path))
        shown = f"unknown key {name!r}"
        answer = synonyms.answer(as_text(path), value, self._given)
        section = synonyms.SECTIONS.get(synonyms.plain_name(path[-1]))
        if len(path) == 1 and path[0] in RENAMED:
            right = RENAMED[str(path[0])]
            self._add(f"{shown}: it was renamed to {right!r}", path)
            self._move(path, (right,), value)
        elif isinstance(value, dict) and section is not None and len(path) == 1:
            self._add(f"{shown}; did you mean {section!r}?", path)
            self._move(path, (section,), value)
        elif answer is not None:
            self._add(f"{shown}: {advice(answer)}", path)
            for key, setting in answer.settings.items() if answer.is_same else ():
                self._correct(as_path(key), setting)
                if setting == value:
                    self._moved.append((path, as_path(key)))
                else:
                    self._dropped.add(as_path(key))
        elif len(path) == 1 and "." in str(path[0]) and is_key_path(str(path[0])):
            *sections, last = str(path[0]).split(".")
            self._add(f"{shown}: write {last} in the section {'.'.join(sections)}", path)
            self._correct(as_path(str(path[0])), value)
        elif likely := guesses(path):
            options = " or ".join(repr(as_text(guess)) for guess in likely)
            self._add(f"{shown}; did you mean {options}?", path)
            if len(likely) == 1:
                self._move(path, likely[0], value)
            self._touched.update(likely)
        else:
            self._add(f"{shown}: `sevenfold explain` lists all keys", path)
            if len(path) > 1:
                self._touched.add(path[:-1])  # it may be any of this section's keys

    def _move(self, path: Path, right: Path, value: Any) -> None:
        """Gives a value another path, so that what is in it is checked too."""
        key = find(right)
        if _get(self._tree, right) is None and _set(self._tree, right, value):
            self._moved.append((path, right))
        if key is None or key.section is None or not isinstance(value, dict | list):
            self._touched.add(right)

    def _correct(self, path: Path, value: Any) -> None:
        """Sets what a message says to write, unless the recipe sets it too."""
        self._touched.add(path)
        if _get(self._tree, path) is None:
            _set(self._tree, path, copy.deepcopy(value))

    def _missing(self, path: Path) -> None:
        name = as_text(self._in_file(path))
        if len(path) == 4 and path[0] == "data" and path[-1] == "path":
            if _is_under(("data", "path"), self._touched):
                return
            self._touched.add(("data", "path"))  # reported once
            self._add(
                "this recipe does not say where its data is: give data.path=FILE_OR_FOLDER",
                path[:3],
            )
            return
        value = EXAMPLES.get(as_text(path))
        hint = f": for example {name}={value}" if value is not None else ""
        key = find(path)
        if value is None and key is not None and key.section is not None:
            needed = [k for k, field in key.section.model_fields.items() if field.is_required()]
            keys = " and ".join(needed) or f"keys such as {_some_keys(key.section)}"
            hint = f": a section with {keys}"
        self._add(f"required key {name!r} is missing{hint}", path)

    def _wrong_value(self, path: Path, errors: Sequence[ErrorDetails]) -> str:
        value = _get(self._tree, path)
        name = as_text(self._in_file(path))
        expected = " or ".join(
            dict.fromkeys(_expected(error) for error in errors if error["type"] != "value_error")
        ).replace(" or input should be ", ", or ")
        own = [_own_message(e) for e in errors if e["type"] == "value_error"]
        message = "; ".join([*own, *([expected] if expected else [])])
        message = message[:1].lower() + message[1:]
        if expected:
            found = hide_secrets(repr(errors[0]["input"]))  # before it is cut
            message += f", found {found[:200]}"
        key = find(path)
        rule = synonyms.VALUES.get(as_text(path))
        close = did_you_mean(value, _literals(errors))
        answer = None
        if rule is not None and not close and not isinstance(value, dict | list | None):
            answer = rule(value, synonyms.Given(self._given))
        has_section = key is not None and key.section is not None
        if answer is not None and (answer.settings or has_section or isinstance(value, bool)):
            message += f": {advice(answer)}"
        elif key is not None and key.section is not None and not isinstance(value, dict | list):
            message += f": {name} is a section, with keys such as {_some_keys(key.section)}"
        message += close
        return f"{name}: {message}" if name else message

    def _drop(self, path: Path) -> None:
        """Leaves out a value that is wrong, or gives a required one a placeholder."""
        self._dropped.add(path)
        self._touched.add(path)
        while path and isinstance(path[-1], int):
            entry = find(path[:-1])
            if entry is not None and entry.section is not None:
                _set(self._tree, path, {})  # an entry of a list of sections
                return
            path = path[:-1]  # an entry of a plain list, which is left out as a whole
            self._dropped.add(path)
            self._touched.add(path)
        key = find(path)
        _remove(self._tree, path)
        name = f"{key.owner.__name__}.{key.name}" if key is not None else ""
        if name in PLACEHOLDERS:
            _set(self._tree, path, copy.deepcopy(PLACEHOLDERS[name]))

    def _contradictions(self, section: Section, path: Path) -> None:
        """Adds the problems that a section and those in it name."""
        for name, field in section:
            children: Iterator[tuple[Path, Any]] = iter([((*path, name), field)])
            if isinstance(field, list):
                children = (((*path, name, i), entry) for i, entry in enumerate(field))
            elif isinstance(field, dict):
                children = (((*path, name, k), entry) for k, entry in field.items())
            for child_path, child in children:
                if isinstance(child, Section):
                    self._contradictions(child, child_path)
        touched = set(self._touched)
        for problem in section.problems():
            keys = tuple((*path, *as_path(key)) for key in problem.keys)
            if any(_is_under(key, touched) or _is_over(key, touched) for key in keys):
                continue
            name = as_text(self._in_file(path))
            self._add(f"{name}: {problem.message}" if name else problem.message, *keys, path)
            self._touched.update(keys)


def advice(answer: synonyms.Answer) -> str:
    """Returns what to write instead of a setting of another tool."""
    settings = " and ".join(f"{key}={text_of(value)}" for key, value in answer.settings.items())
    if not settings:
        return answer.note
    if not answer.is_same:
        return f"{answer.note}: {settings}"
    return f"write {settings}" + (f" ({answer.note})" if answer.note else "")


def _is_missing_key(error: ErrorDetails) -> bool:
    return error["type"] == "missing" and isinstance(error["loc"][-1], str)


def _expected(error: ErrorDetails) -> str:
    message = error["msg"]
    if error["type"] == "missing":  # of [first, last]
        message = "Input should have more entries"
    if error["type"] in ("model_type", "model_attributes_type"):
        message = "Input should be keys and values"
    if error["loc"] and error["loc"][-1] == "[key]":
        message = f"Key: {message}"
    return message[:1].lower() + message[1:]


def _own_message(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ")


def _literals(errors: Sequence[ErrorDetails]) -> list[str]:
    """Returns the values that pydantic says are expected."""
    texts = [e.get("ctx", {}).get("expected", "") for e in errors if e["type"] == "literal_error"]
    return [
        word.strip().strip("'") for text in texts for word in text.replace(" or ", ",").split(",")
    ]


def _some_keys(section: type[Section]) -> str:
    return ", ".join(list(section.model_fields)[:3])


def _is_under(path: Path, others: set[Path]) -> bool:
    """Returns whether a path is one of the others, or below it."""
    return any(path[:end] in others for end in range(1, len(path) + 1))


def _is_over(path: Path, others: set[Path]) -> bool:
    """Returns whether one of the others is below a path."""
    return any(other[: len(path)] == path for other in others)


def _get(tree: Any, path: Path) -> Any:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _set(tree: Any, path: Path, value: Any) -> bool:
    """Sets a value, with the sections that it is in; returns whether that is possible."""
    *parents, last = path
    for part in parents:
        if isinstance(tree, dict) and tree.get(part) is None and isinstance(part, str):
            tree[part] = {}
        tree = _get(tree, (part,))
    if isinstance(tree, list):
        if not isinstance(last, int) or last >= len(tree):
            return False
        tree[last] = value
        return True
    if isinstance(tree, dict):
        tree[last] = value
    return isinstance(tree, dict)


def _remove(tree: Any, path: Path) -> Any:
    """Removes a key and returns its value."""
    node = _get(tree, path[:-1])
    return node.pop(path[-1], None) if isinstance(node, dict) and path else None
