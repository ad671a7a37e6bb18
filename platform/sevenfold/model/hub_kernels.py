"""Keeps transformers from running kernels of the hub, which are code of others.

transformers downloads and runs them where the package `kernels` is installed: for an attention or
experts' implementation that is named like a repository, for model types that have some, and for
quantized weights. Importing this module refuses them all; `sevenfold/__init__.py` turns off those
that transformers adds to its layers when it is imported.
"""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.integrations import hub_kernels

from sevenfold.errors import InputError


def refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    """Raises InputError for a kernel; takes the place of transformers' function that loads it."""
    raise InputError(f"{name}: a kernel of the hub is code of others, which is not run")


hub_kernels.get_kernel = refuse
hub_kernels._kernels_enabled = False
