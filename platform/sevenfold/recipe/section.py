"""What all sections of a recipe have in common: they are frozen, and name all their problems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

# A key of pydantic's context: sections do not check `problems` while they are built. Who asks for
# that collects the problems of all sections (see mistakes.py).
UNCHECKED = "unchecked"


class OrAuto:
    """Marks a field that can also be `auto` in a recipe's file.

    The value is chosen while the recipe is read (`reading.parse`): a recipe has none of `auto`.
    """

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(core), {"const": "auto"}]}


class Problem(NamedTuple):
    """Settings that are valid alone, and not together.

    Attributes:
        message: What is wrong with them, and what to do.
        keys: Their keys, relative to the section that names the problem; "" for all of it.
    """

    message: str
    keys: tuple[str, ...]


class Section(BaseModel):
    """A section of a recipe. It cannot be changed once it is built, and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """Yields what is wrong with this section apart from the values of single fields."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_problems(self, info: ValidationInfo) -> Self:
        if UNCHECKED not in (info.context or {}):
            problems = [problem.message for problem in self.problems()]
            if problems:
                raise ValueError("; ".join(problems))
        return self
