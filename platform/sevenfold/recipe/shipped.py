"""The recipes and cluster files that come with sevenfold.

A checkout has them in jobs/recipes/, cluster.yaml and platform/deploy/. The wheel has them in the
package's folder shipped/, where the build backend puts them (pyproject.toml).
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import sevenfold
from sevenfold.errors import InputError

_PACKAGE = Path(sevenfold.__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    installed = _PACKAGE / "shipped" / in_wheel
    return installed if installed.exists() else _CHECKOUT / in_checkout


def recipes() -> dict[str, Path]:
    """Returns the files of the shipped recipes by their names, in alphabetical order."""
    files = sorted(_shipped("recipes", "jobs/recipes").glob("*.yaml"))
    return {file.stem: file for file in files}


def cluster_files() -> dict[str, Path]:
    """Returns the files to start a cluster with: their paths in a folder of their own, and here."""
    deploy = _shipped("deploy", "platform/deploy")
    files = {f"deploy/{file.name}": file for file in sorted(deploy.iterdir()) if file.is_file()}
    return {"cluster.yaml": _shipped("cluster.yaml", "cluster.yaml")} | files


SCHEMA = Path(__file__).with_name("schema.json")
_SCHEMA_LINE = re.compile(r"^# yaml-language-server: \$schema=.*\n")


def schema_line() -> str:
    """Returns the comment by which editors find the schema of a recipe that is in any folder."""
    return f"# yaml-language-server: $schema={SCHEMA.as_uri()}\n"


def text(name: str) -> str:
    """Returns the text of a recipe that comes with sevenfold, to be saved in any folder.

    Raises:
        InputError: There is no recipe of this name.
    """
    content = Path(recipe_file(name)).read_text(encoding="utf-8")
    return schema_line() + _SCHEMA_LINE.sub("", content)


def summary(recipe: Path) -> str:
    """Returns the first sentence of the comment at the top of a recipe."""
    words: list[str] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):  # commands are indented
            break
        if "yaml-language-server" not in line:
            words += line[2:].split()
    return re.split(r"(?<!al)\.\s", " ".join(words), maxsplit=1)[0].rstrip(".:")


def recipe_file(name: str) -> str:
    """Returns the file of a recipe that is given by its path, or by the name of a shipped one.

    A file of the same name takes precedence, as it is the user's own.

    Raises:
        InputError: It looks like a name, but there is neither a file nor a recipe of that name.
    """
    if os.path.exists(name) or not re.fullmatch(r"[\w-]+", name):
        return name
    shipped = recipes()
    if name in shipped:
        return str(shipped[name])
    nearest = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise InputError(
        f"{name}: expected a recipe: a YAML file, or the name of one that comes with sevenfold, "
        f"found neither: {hint}`sevenfold recipes` lists them"
    )
