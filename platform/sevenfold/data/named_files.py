"""Names of files in the JSON files of a Hugging Face directory, which may come from anywhere.

transformers opens most of them without a check. A name must be one inside the directory.
"""

from __future__ import annotations

import os
import re
from typing import Any

from sevenfold import storage
from sevenfold.errors import InputError

# fields that name files which transformers reads instead of, or besides, those with usual names
_LISTS = ("fast_tokenizer_files", "configuration_files")
_CONFIGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json")
# A key may be spelled with escapes of its letters.
_MAY_NAME_FILES = re.compile(rb"fast_tokenizer_files|\\u00[567]")


def check_named_files(folder: str) -> dict[str, None]:
    """Checks the names of files in a directory's configs and in its tokenizer.

    Args:
        folder: The local directory.

    Returns:
        Arguments for transformers' tokenizers, which override those names of files in
        tokenizer_config.json that are not inside the directory. Older versions of transformers
        wrote the paths of their own caches there, so that they are no reason to refuse a directory.

    Raises:
        InputError: A name could mean something outside the directory.
    """
    overridden: dict[str, None] = {}
    for name in _CONFIGS:
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            continue
        tree = storage.read_json(path, storage.json_object)
        check_file_lists(path, tree)
        for key, value in tree.items() if name != "config.json" else ():
            if key.endswith("_file") and value is not None and not _is_inside(value):
                if name == "special_tokens_map.json":
                    storage.plain_name(value, f"{path}: {key}")
                overridden[key] = None
    path = os.path.join(folder, "tokenizer.json")
    if os.path.lexists(path):
        with storage.open_read(path) as file:
            may_name_files = _MAY_NAME_FILES.search(file.read())
        if may_name_files:
            check_file_lists(path, storage.read_json(path, storage.json_object))
    return overridden


def check_file_lists(path: str, tree: dict[str, Any]) -> None:
    """Raises InputError if a JSON file has a list of files with one outside its directory."""
    for key in _LISTS:
        if key in tree:
            names = tree[key] if isinstance(tree[key], list) else [tree[key]]
            for name in names:
                storage.plain_name(name, f"{path}: {key}")


def _is_inside(name: object) -> bool:
    try:
        storage.plain_name(name, "")
    except InputError:
        return False
    return True
