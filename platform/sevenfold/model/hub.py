"""Models of the Hugging Face Hub, named hf://ORGANIZATION/NAME@REVISION.

huggingface_hub is imported only where a name is given, since that takes a quarter of a second.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sevenfold import storage
from sevenfold.errors import InputError, first_line

PREFIX = "hf://"
TIMEOUT_SECONDS = 20.0
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^\s@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# other copies of the weights, in folders of their own, are not needed
_IGNORED = ["original/*", "onnx/*", "*/*.safetensors", "*/*.bin"]


class HubModel(NamedTuple):
    """A model of the hub.

    Attributes:
        repository: ORGANIZATION/NAME.
        revision: A commit, branch or tag; None if the name has none.
    """

    repository: str
    revision: str | None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, so that it always means the same files."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def is_hub(path: str) -> bool:
    """Returns whether this is the name of a model of the hub."""
    return path.startswith(PREFIX)


def parse(path: str) -> HubModel:
    """Splits the name of a model of the hub.

    Raises:
        InputError: The name does not have the form hf://ORGANIZATION/NAME@REVISION.
    """
    match = _NAME.fullmatch(path.rstrip("/"))
    if match is None:
        raise InputError(
            f"model.path: expected {PREFIX}ORGANIZATION/NAME, with or without @REVISION, "
            f"found {path}"
        )
    return HubModel(match[1], match[2])


def pinned(path: str, stored: str | None = None) -> str:
    """Returns the name of a model with the commit that its revision refers to now.

    Args:
        path: A name. Without a revision it means the branch main.
        stored: The name that was pinned when the run was started. It is returned if `path` names
            the same model without a revision.

    Raises:
        InputError: The hub has no such model, cannot be reached, or does not give access.
    """
    model = parse(path)
    if model.is_pinned:
        return path
    if stored is not None and is_hub(stored) and model == (parse(stored).repository, None):
        return stored
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            model.repository, revision=model.revision, timeout=TIMEOUT_SECONDS
        )
    except Exception as e:  # network errors have the types of huggingface_hub's HTTP library
        raise _refusal(path, e) from None
    return f"{PREFIX}{model.repository}@{info.sha}"


def local_folder(path: str, *, weights: bool) -> str:
    """Returns a local folder with the files of a model, which is downloaded once per machine.

    Files are kept in the cache of huggingface_hub. What is there needs no network.

    Args:
        path: A pinned name.
        weights: Whether to download the weights too: those in safetensors files, or in .bin files
            if there are none.

    Raises:
        InputError: The files are not in the cache, and the hub cannot be reached or does not give
            access.
    """
    patterns = [*storage.SMALL_FILES, *(["*.safetensors"] if weights else [])]
    folder = _snapshot(path, patterns)
    if weights and not list(Path(folder).glob("*.safetensors")):
        return _snapshot(path, [*storage.SMALL_FILES, "*.bin"])
    return folder


def _snapshot(path: str, patterns: list[str]) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    model = parse(path)

    def download(offline: bool) -> str:
        return snapshot_download(
            model.repository,
            revision=model.revision,
            allow_patterns=patterns,
            ignore_patterns=_IGNORED,
            local_files_only=offline,
        )

    try:
        return download(offline=True)
    except LocalEntryNotFoundError:
        pass
    try:
        # asked first, since a download tries again for half a minute if there is no network
        HfApi().model_info(model.repository, revision=model.revision, timeout=TIMEOUT_SECONDS)
        return download(offline=False)
    except Exception as e:  # network errors have the types of huggingface_hub's HTTP library
        raise _refusal(path, e) from None


def _refusal(path: str, error: Exception) -> InputError:
    """Returns the error for a model that cannot be had, with what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return InputError(
            f"{path}: the hub gives this model only to those who accepted its terms: accept them "
            "on its page, then set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{path}: the hub's model has no such revision")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{path}: the hub has no such model, or it is private: check the name, or set HF_TOKEN"
        )
    return InputError(
        f"{path}: the model hub cannot be reached ({first_line(error)}): set model.path to a "
        "folder with the model's files, or run this where there is a network"
    )
