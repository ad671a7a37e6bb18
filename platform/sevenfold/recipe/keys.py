"""All keys of a recipe, and the one that is nearest to a name that is none of them."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sevenfold.recipe.recipe import Recipe
from sevenfold.recipe.section import OrAuto, Section

Path = tuple[int | str, ...]  # the keys of mappings, and the indices of lists
ANY_NAME = "KEY"  # in `Key.path`: a name that the user chooses, as in sweep.space
# How similar (0 to 1) a name must be to a key to be taken for a misspelling of it.
_SIMILAR, _SIMILAR_ELSEWHERE = 0.6, 0.8


class Key(NamedTuple):
    """A key that a recipe can have.

    Attributes:
        path: Its path, such as "data.sources.0.path"; 0 stands for any entry of a list, and
            ANY_NAME for a name that the user chooses.
        owner: The section that it belongs to.
        field: What the section says about it.
        section: Its own section, if it is one or holds a list or dictionary of them.
        is_open: Whether its value is a dictionary whose keys the user chooses (model.config).
    """

    path: str
    owner: type[Section]
    field: FieldInfo
    section: type[Section] | None
    is_open: bool

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def may_be_auto(self) -> bool:
        """Whether its value can be `auto` in a file, and is chosen while the recipe is read."""
        return any(isinstance(item, OrAuto) for item in self.field.metadata)


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Returns all keys of a recipe; a section comes before its keys."""
    return tuple(_keys_of(Recipe, ""))


def _keys_of(owner: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in owner.model_fields.items():
        kinds = [get_origin(kind) for kind in alternatives(field.annotation)]
        section = section_of(field.annotation)
        path = f"{prefix}{name}"
        yield Key(path, owner, field, section, dict in kinds and section is None)
        if section is not None:
            entry = ".0" if list in kinds else f".{ANY_NAME}" if dict in kinds else ""
            yield from _keys_of(section, f"{path}{entry}.")


def alternatives(annotation: Any) -> list[Any]:
    """Returns the types of a union, or the one type that it is; None is left out."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for inner in get_args(annotation) for kind in alternatives(inner)]
    return [] if annotation is type(None) else [annotation]


def section_of(annotation: Any) -> type[Section] | None:
    """Returns the section in a field's type, such as Source in list[Source]; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation if issubclass(annotation, Section) else None
    sections = (section_of(inner) for inner in get_args(annotation))
    return next((section for section in sections if section is not None), None)


@functools.cache
def _by_path() -> dict[str, Key]:
    return {key.path: key for key in all_keys()}


def auto_keys(tree: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a recipe that are `auto` and whose value is to be chosen."""
    keys = [key.path for key in all_keys() if key.may_be_auto]
    sections = {path: tree.get(path.partition(".")[0]) for path in keys}
    return [
        path
        for path, section in sections.items()
        if isinstance(section, Mapping) and section.get(path.partition(".")[2]) == "auto"
    ]


def find(path: Path) -> Key | None:
    """Returns the key at a path, such as ("data", "sources", 3, "path"); None if there is none."""
    pattern: list[str] = []
    for part in path:
        parent = _by_path().get(".".join(pattern))
        kinds = [get_origin(k) for k in alternatives(parent.field.annotation)] if parent else []
        if parent is not None and parent.section is not None and list in kinds:
            if not str(part).isdigit():
                return None
            part = 0
        elif parent is not None and parent.section is not None and dict in kinds:
            part = ANY_NAME
        pattern.append(str(part))
    return _by_path().get(".".join(pattern))


def is_key_path(text: str) -> bool:
    """Returns whether a text such as train.steps or model.config.hidden_size is a key's path."""
    parts = tuple(text.split("."))
    if not all(parts):
        return False
    for end in range(1, len(parts)):
        key = find(parts[:end])
        if key is not None and key.is_open:
            return True
    return find(parts) is not None


def known_names(owner: Path) -> list[str]:
    """Returns the names of the keys that a section can have; () is the recipe itself."""
    section: type[Section] | None = Recipe
    for end in range(1, len(owner) + 1):
        key = find(owner[:end])
        if key is not None:
            section = key.section
    return list(section.model_fields) if section else []


def nearest(name: str, known: Iterable[str], similar: float = _SIMILAR) -> str | None:
    """Returns the known name that is most similar to a name; None if none is similar."""
    plain = {_plain(other): other for other in reversed(list(known))}
    close = difflib.get_close_matches(_plain(name)[:200], plain, n=1, cutoff=similar)
    return plain[close[0]] if close else None


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """Returns the end of a message that names the nearest known name; empty if there is none."""
    close = nearest(name, known, 0.6) if isinstance(name, str) else None
    return f"; did you mean {close!r}?" if close is not None else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def guesses(path: Path) -> list[Path]:
    """Returns what a path that is no key is likely to mean: none, one or a few keys.

    Keys of other sections with the same name, else a key of the same section with a similar name,
    else keys of other sections with a similar name.

    Args:
        path: The path, whose parents exist.
    """
    *parents, last = path
    if not isinstance(last, str):
        return []
    siblings = known_names(tuple(parents))
    if (sibling := nearest(last, siblings, 1.0)) is not None:  # but for dashes or capitals
        return [(*parents, sibling)]
    same = [key.path for key in all_keys() if key.name == _plain(last)]
    if not same and (sibling := nearest(last, siblings)) is not None:
        return [(*parents, sibling)]
    if not same:
        close = nearest(last, [key.name for key in all_keys()], _SIMILAR_ELSEWHERE)
        same = [key.path for key in all_keys() if key.name == close]
    # those of lists of documents to validate and test on are as those of data.sources
    alike = ("data.validation.0.", "data.test.0.", f"sweep.space.{ANY_NAME}.")
    likely = [p for p in same if not p.startswith(alike)] or same
    return [as_path(text) for text in likely[:4]]


def as_path(text: str) -> Path:
    """Returns the path that a text such as data.sources.0.path stands for."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("."))


def as_text(path: Path) -> str:
    """Returns a path as it is written on the command line."""
    return ".".join(map(str, path))
