"""Explanations of a recipe's keys, from their descriptions in the code; and the JSON Schema."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator

from sevenfold.errors import InputError
from sevenfold.recipe import synonyms
from sevenfold.recipe.keys import (
    ANY_NAME,
    Key,
    all_keys,
    alternatives,
    as_path,
    did_you_mean,
    find,
)
from sevenfold.recipe.mistakes import advice
from sevenfold.recipe.places import shown_argument, text_of
from sevenfold.recipe.recipe import Recipe
from sevenfold.recipe.section import Section
from sevenfold.recipe.units import EXAMPLES, unit_of

# Sections that are as another one, and are not listed again.
_ALIKE = {"data.validation": "data.sources", "data.test": "data.sources"}
_WIDTH = 100
_TYPES = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "any value",
}
_BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))


def schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of a recipe's file."""
    tree = Recipe.model_json_schema()
    tree["$defs"]["Source"]["required"].remove("path")  # data.path gives it too
    if not tree["$defs"]["Source"]["required"]:
        del tree["$defs"]["Source"]["required"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **tree,
        "title": "Recipe of sevenfold",
    }


def schema_text() -> str:
    """Returns the JSON Schema as it is printed and kept in the package."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def listed_keys() -> list[Key]:
    """Returns all keys, without those of sections that are as another one."""
    return [k for k in all_keys() if not k.path.startswith(tuple(f"{a}." for a in _ALIKE))]


def description(key: Key) -> str:
    """Returns what a key means, as one or more sentences."""
    parts = []
    if key.field.description:
        parts.append(_sentence(key.field.description))
    elif key.section is not None:
        parts.append(_doc(key.section))
    if key.path in _ALIKE:
        parts.append(f"With the same keys as {_ALIKE[key.path]}.")
    return " ".join(parts)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _doc(section: type[Section]) -> str:
    return " ".join((inspect.getdoc(section) or "").split())


def type_text(key: Key) -> str:
    """Returns the values that a key can have, such as "whole number above 0"."""
    kinds = [_kind(kind) for kind in alternatives(key.field.annotation)]
    if _is_location(key.field.annotation) or _is_location_field(key):
        kinds = ["path or URL"]
    bounds = []
    for item in key.field.metadata:
        for name, word in _BOUNDS:
            limit = getattr(item, name, None)
            if limit is not None:
                bounds.append(f"{word} {limit:,}" if isinstance(limit, int) else f"{word} {limit}")
    text = " ".join([" or ".join(dict.fromkeys(kinds)), " and ".join(bounds)]).strip()
    return f"{text}, or auto" if key.may_be_auto else text


def _kind(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        choices = [text_of(value) for value in inner]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is list:
        kinds = " or ".join(_kind(k) for k in alternatives(inner[0]))
        return f"list of {'sections' if _is_section(inner[0]) else kinds}"
    if origin is tuple:
        return f"[{', '.join(_kind(k) for k in inner)}]"
    if origin is dict:
        return "names and sections" if _is_section(inner[1]) else "names and values"
    return "section" if _is_section(kind) else _TYPES.get(kind, getattr(kind, "__name__", "value"))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _is_location(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return any(isinstance(item, AfterValidator) for item in annotation.__metadata__)
    return any(_is_location(inner) for inner in get_args(annotation) if inner is not annotation)


def _is_location_field(key: Key) -> bool:
    return key.field.annotation is str and any(
        isinstance(item, AfterValidator) for item in key.field.metadata
    )


def default_text(key: Key) -> str:
    """Returns a key's default as it is shown."""
    if key.field.is_required():
        return "required"
    default = key.field.get_default()
    if isinstance(default, Section):
        return "those of its keys"
    if default is None:
        meaning = key.field.description or ""
        return "see above" if "Default:" in meaning else "not set"
    return text_of(default)


def example(key: Key) -> str:
    """Returns a line that sets a key, as it is written on the command line."""
    value = EXAMPLES.get(key.path)
    if value is None and not key.field.is_required():
        value = text_of(key.field.get_default())
    name = key.path.replace(ANY_NAME, "optimizer.learning_rate")
    return f"{name}={value}"


def explain(word: str) -> str:
    """Returns the explanation of a key, a section, another tool's setting, or a word.

    Raises:
        InputError: Nothing is known by this name.
    """
    name = word.partition("=")[0].strip().lstrip("-")
    if (key := _find(name)) is not None:
        return _of_key(key)
    plain = synonyms.plain_name(name)
    same = [key for key in listed_keys() if key.name == plain]
    if not same and (answer := _synonym(plain)) is not None:
        return answer
    found = same or [key for key in listed_keys() if _mentions(key, plain)]
    if not found:
        known = [k.path for k in listed_keys()] + [k.name for k in listed_keys()]
        known += [*synonyms.SYNONYMS, *synonyms.SECTIONS]
        raise InputError(
            f"explain: no key of a recipe is called {shown_argument(word)}, and no description has "
            f"this word{did_you_mean(word[:100], known)}; `sevenfold explain` lists all keys"
        )
    if len(found) == 1:
        return _of_key(found[0])
    return "\n".join(_line(key, found) for key in found)


def _find(name: str) -> Key | None:
    """Returns the key of this path, in which the indices of lists may be left out."""
    path = as_path(name)
    if not all(str(part) for part in path):
        return None
    if (key := find(path)) is not None:
        return key
    shorter = {re.sub(rf"\.(0|{ANY_NAME})(?=\.)", "", k.path): k for k in all_keys()}
    return shorter.get(name)


def _mentions(key: Key, word: str) -> bool:
    text = f"{key.path} {description(key)}".lower()
    return len(word) > 1 and (word in text or word.replace("_", " ") in text)


def _synonym(name: str) -> str | None:
    """Returns the explanation of a setting of another tool; None if it is not known."""
    if name in synonyms.SECTIONS:
        section = _find(synonyms.SECTIONS[name])
        return None if section is None else f"{name} is {section.path} here.\n\n{_of_key(section)}"
    answer = synonyms.answer(name, 1, {})
    if answer is None:
        return None
    keys = list(answer.settings)
    if not keys or not answer.is_same:
        keys += re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", answer.note)
    explained = [_of_key(key) for k in dict.fromkeys(keys) if (key := _find(k)) is not None]
    if answer.settings and answer.is_same:
        head = f"{name} is {' and '.join(keys)} here."
    else:
        head = f"{name}: {_sentence(advice(answer) if not answer.settings else answer.note)}"
    return "\n\n".join([head, *explained])


def _of_key(key: Key) -> str:
    lines = [key.path, *_wrapped(description(key))]
    if key.section is not None and key.field.description:
        lines += _wrapped(_doc(key.section))
    facts = [("type", type_text(key)), ("unit", unit_of(key.path)), ("default", default_text(key))]
    if key.section is None:
        facts.append(("example", example(key)))
    lines += [f"  {name + ':':9}{value}" for name, value in facts if value]
    if key.section is not None:
        keys = [k for k in all_keys() if k.owner is key.section and _is_in(k, key)]
        lines += ["", *(_line(k, keys) for k in keys)]
    return "\n".join(lines)


def _is_in(key: Key, section: Key) -> bool:
    rest = key.path.removeprefix(f"{section.path}.")
    return rest != key.path and rest.count(".") == (
        "list" in type_text(section) or "names" in (type_text(section))
    )


def _line(key: Key, among: list[Key]) -> str:
    width = max(len(k.path) for k in among)
    text = description(key).replace("\n", " ")
    first = re.split(r"(?<=[a-z)])\. ", text, maxsplit=1)[0].rstrip(".")
    room = max(20, _WIDTH - width - 2)
    return f"{key.path:{width}}  {first if len(first) <= room else first[: room - 3] + '...'}"


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def all_lines() -> str:
    """Returns a line for each key."""
    keys = listed_keys()
    return "\n".join(_line(key, keys) for key in keys)


def markdown() -> str:
    """Returns the page of all keys, docs/recipe.md."""
    lines = [
        "# All keys of a recipe",
        "",
        "This page is made from the code: `sevenfold explain --markdown > docs/recipe.md`. "
        "`sevenfold explain KEY` shows one key, also by the name that it has in other tools "
        "(`sevenfold explain lr`). Editors with a YAML language server check a recipe while it is "
        "typed if its first line names the schema, which `sevenfold schema > schema.json` writes:",
        "",
        "    # yaml-language-server: $schema=schema.json",
        "",
        "On the command line, a key is changed by `key.path=value`. In a list, a number stands for "
        f"an entry: `data.sources.0.path`; {ANY_NAME} stands for a name of your own.",
    ]
    lines += _table("The recipe", "", [k for k in all_keys() if k.owner is Recipe])
    for section in listed_keys():
        if section.section is not None and section.path not in _ALIKE:
            keys = [k for k in all_keys() if k.owner is section.section and _is_in(k, section)]
            lines += _table(f"`{section.path}`", _doc(section.section), keys)
    return "\n".join(lines) + "\n"


def _table(title: str, text: str, keys: list[Key]) -> list[str]:
    lines = ["", f"## {title}", *(["", text] if text else [])]
    lines += ["", "| key | value | default | |", "|-|-|-|-|"]
    for key in keys:
        kind = type_text(key)
        if unit := unit_of(key.path):
            kind += f"; {unit}"
        default = default_text(key)
        shown = "" if default in ("see above", "those of its keys") else default
        is_value = shown not in ("", "required", "not set")
        cells = (f"`{key.name}`", kind, f"`{shown}`" if is_value else shown, description(key))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines
