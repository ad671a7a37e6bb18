"""Commands that explain recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from sevenfold.errors import InputError


def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A key or section of a recipe, a setting of another tool (lr), or a word.",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page of all keys, in Markdown.")
    ] = False,
) -> None:
    """Explain a key of a recipe, or list all keys."""
    from sevenfold.recipe import explain as explanations
    from sevenfold.report.console import print_text

    if markdown and key is not None:
        raise InputError("explain: expected either KEY or --markdown, found both")
    if markdown:
        print_text(explanations.markdown(), end="")
    else:
        print_text(explanations.all_lines() if key is None else explanations.explain(key))


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from sevenfold.recipe.explain import schema_text
    from sevenfold.report.console import print_text

    print_text(schema_text(), end="")
