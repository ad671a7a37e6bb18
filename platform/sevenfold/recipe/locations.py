"""Paths and URLs in recipes, which have no secrets of URLs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from sevenfold import storage

# How pydantic is to read locations: keys of pydantic's context.
STORED, WITH_SECRETS = "stored", "with_secrets"


def _location(path: str, info: ValidationInfo) -> str:
    context = info.context or {}
    return path if WITH_SECRETS in context else storage.keep_secrets(path, STORED in context)


def _output(url: str) -> str:
    short = storage.without_secrets(url)
    if short != url:
        raise ValueError(
            f"expected a URL without user information and query ({short}): credentials for writing "
            "come from the environment or the machine's role"
        )
    return url


# A path or URL to read from. No section of a recipe has the secrets of URLs, which `storage` keeps.
Location = Annotated[str, AfterValidator(_location)]

# A path or URL to write to. Ray writes there too, which knows no secrets of URLs.
OutputLocation = Annotated[str, AfterValidator(_output)]


def last_part(path: str) -> str:
    """Returns what follows the last "/" of a path or URL."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def default_name(path: str) -> str:
    """Returns the name of a source that gives none."""
    return last_part(storage.without_secrets(path))


def with_short_names(tree: dict[str, Any], lists: Sequence[str]) -> dict[str, Any]:
    """Returns the section `data` with a curriculum that names sources without secrets of URLs.

    Args:
        tree: The section.
        lists: Its keys that hold lists of sources.

    Raises:
        ValueError: Two URLs differ in nothing else.
    """
    paths = [
        source["path"]
        for key in lists
        if isinstance(tree.get(key), list)
        for source in tree[key]
        if isinstance(source, dict) and isinstance(source.get("path"), str)
    ]
    urls: dict[str, str] = {}
    for path in paths:
        short = storage.without_secrets(path)
        if path != short and urls.setdefault(short, path) != path:
            raise ValueError(
                f"two sources have the URL {short} and differ only in user information, query or "
                "fragment, which are kept secret: give each file a path of its own"
            )
    names = {last_part(path): default_name(path) for path in paths}

    def renamed(stage: Any) -> Any:
        if not isinstance(stage, dict) or not isinstance(stage.get("weights"), dict):
            return stage
        weights = {names.get(name, name): share for name, share in stage["weights"].items()}
        return stage | {"weights": weights}

    stages = tree.get("curriculum")
    return tree | {"curriculum": list(map(renamed, stages))} if isinstance(stages, list) else tree
