"""A folder with modules that are named like those that sevenfold imports, and note each import."""

from __future__ import annotations

from pathlib import Path

MODULES = (
    *("pyarrow", "fsspec", "pydantic", "torch", "numpy", "transformers", "ray", "yaml", "typer"),
    *("rich", "filelock", "psutil", "tokenizers", "safetensors", "peft", "jinja2", "aiohttp"),
    *("sevenfold", "pip", "random", "tempfile", "dataclasses"),
)


def write_tripwires(folder: Path, tripped: Path) -> None:
    """Writes the modules into a folder.

    Args:
        folder: An existing folder.
        tripped: The file to which each module appends its name, and the command, when it is
            imported. The import then fails.
    """
    for name in MODULES:
        (folder / f"{name}.py").write_text(
            f"import sys\nwith open({str(tripped)!r}, 'a') as f:\n"
            f"    f.write({name!r} + ' ' + repr(sys.orig_argv) + '\\n')\n"
            f"raise ImportError({name!r})\n"
        )
