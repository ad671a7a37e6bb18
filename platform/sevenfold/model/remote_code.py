"""Models with Python code of their own, which runs only if the user agrees to that very code.

The user agrees by the option --trust-remote-code of a command, with the hash of the code; a refusal
says what it is. A file, such as the recipe of a run that was handed over, cannot agree.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sevenfold.errors import InputError
from sevenfold.recipe import Recipe

_HASH_DIGITS = 32  # hexadecimal digits of SHA-256


def is_allowed(recipe: Recipe, folder: str) -> bool:
    """Returns whether the Python code in a model's local folder may run.

    Args:
        recipe: The recipe of a run, with the user's consent.
        folder: The folder.

    Raises:
        InputError: The user agreed to run code, but to other code than this.
    """
    if not (recipe.trusted_code and _files(folder)):
        return False
    if code_hash(folder) not in recipe.trusted_code:
        raise refusal(folder)
    return True


def code_hash(folder: str) -> str:
    """Returns the hash of the names and contents of all Python files in a folder."""
    digest = hashlib.sha256()
    for path in _files(folder):
        content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:_HASH_DIGITS]


def refusal(folder: str) -> InputError:
    """Returns the error for a model whose code the user has not agreed to."""
    names = ", ".join(path.relative_to(folder).as_posix() for path in _files(folder))
    return InputError(
        f"{folder}: the model needs Python code of its own ({names or 'which is not there'}): "
        f"review it, and if you trust it, add --trust-remote-code {code_hash(folder)}"
    )


def _files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*.py") if path.is_file())
