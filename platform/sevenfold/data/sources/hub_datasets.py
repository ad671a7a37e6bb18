"""Datasets of the Hugging Face Hub, named hf://datasets/ORGANIZATION/NAME[@REVISION][:SPLIT].

Their files are read where they are, through huggingface_hub's filesystem of fsspec. It is asked
first whether the hub has the dataset, since a filesystem tries again for minutes if there is no
network.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from sevenfold import storage
from sevenfold.errors import InputError, first_line

PREFIX = "hf://"
TIMEOUT_SECONDS = 5.0
# The words by which the hub, too, finds the split of a file in its name or its folders' names.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class HubDataset(NamedTuple):
    """A dataset of the hub.

    Attributes:
        url: The URL of the dataset, or of a file or folder in it, without a split.
        repository: ORGANIZATION/NAME.
        revision: A commit, branch or tag; None if the name has none.
        split: The split; "" if the name has none.
    """

    url: str
    repository: str
    revision: str | None
    split: str


def is_hub(path: str) -> bool:
    """Returns whether this is the name of something on the hub."""
    return path.startswith(PREFIX)


def parse(path: str) -> HubDataset:
    """Splits the name of a dataset.

    Raises:
        InputError: It does not name a dataset.
    """
    from huggingface_hub.utils import parse_hf_uri

    match = re.fullmatch(r"(.+?)(?::([\w.-]+))?", path.rstrip("/"))
    url, split = (match[1], match[2] or "") if match else (path, "")
    try:
        parsed: Any = parse_hf_uri(url)
    except ValueError:
        parsed = None
    if parsed is None or parsed.type != "dataset":
        raise InputError(
            f"{path}: expected {PREFIX}datasets/ORGANIZATION/NAME, with or without @REVISION, "
            "/FOLDER and :SPLIT"
        )
    return HubDataset(url, parsed.id, parsed.revision, split)


def require(dataset: HubDataset, path: str) -> None:
    """Asks the hub for a dataset.

    Raises:
        InputError: The hub cannot be reached, has no such dataset, or gives no access to it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().dataset_info(dataset.repository, revision=dataset.revision, timeout=TIMEOUT_SECONDS)
        return
    except GatedRepoError:
        reason = (
            "the hub gives this dataset only to those who accepted its terms: accept them on its "
            "page, then set HF_TOKEN"
        )
    except RevisionNotFoundError:
        reason = "the hub's dataset has no such revision"
    except RepositoryNotFoundError:
        reason = "the hub has no such dataset, or it is private: check the name, or set HF_TOKEN"
    except Exception as e:  # network errors have the types of huggingface_hub's HTTP library
        reason = (
            f"the hub cannot be reached ({first_line(e)}): where there is a network, get it with: "
            f"hf download --repo-type dataset {dataset.repository} --local-dir FOLDER; then set "
            "the source's path to the files of one split, such as FOLDER/data/train-*.parquet"
        )
    raise InputError(f"{path}: {reason}")


def of_split(listing: storage.InputListing, dataset: HubDataset, path: str) -> storage.InputListing:
    """Returns the files of a dataset's split; those of other splits become unread ones.

    Args:
        listing: The data files of the dataset, or of its folder.
        dataset: The dataset.
        path: Its name, for messages.

    Raises:
        InputError: There is no such split, the files are of several splits and none is named, or
            they are in several folders, which are different sets of data on the hub.
    """
    if not listing.names:  # a single file, or a glob
        if dataset.split:
            raise InputError(f"{path}: expected a dataset or its folder before the split")
        return listing
    splits = [split_of(name) for name in listing.names]
    found = [split for split in SPLIT_WORDS if split in splits]
    if not dataset.split and len(found) > 1:
        raise InputError(
            f"{path}: expected one split, found {', '.join(found)}: name one, as in "
            f"{dataset.url}:{found[0]}"
        )
    chosen = [
        i
        for i, split in enumerate(splits)
        if not dataset.split or split == dataset.split or _has(listing.names[i], dataset.split)
    ]
    if not chosen:
        raise InputError(
            f"{path}: expected files of the split {dataset.split!r}, such as "
            f"{dataset.split}.parquet or {dataset.split}/0.parquet, found those of "
            f"{', '.join(found) or 'none'}: {', '.join(listing.names[:3])}"
        )
    names = [listing.names[i] for i in chosen]
    if len(folders := sorted({name.rpartition("/")[0] for name in names})) > 1:
        raise InputError(
            f"{path}: expected the files of one folder, found some in "
            f"{', '.join(folder or '(none)' for folder in folders[:8])}: name one, as in "
            f"{dataset.url}/{folders[-1]}{':' * bool(dataset.split)}{dataset.split}"
        )
    rest = [name for i, name in enumerate(listing.names) if i not in set(chosen)]
    return storage.InputListing(
        [listing.files[i] for i in chosen], tuple(names), (*listing.unread, *rest)
    )


def split_of(name: str) -> str:
    """Returns the split that a file's name says, from its last part on; "" if it says none."""
    for part in reversed(name.split("/")):
        for split, words in SPLIT_WORDS.items():
            if any(_has(part, word) for word in words):
                return split
    return ""


def _has(name: str, word: str) -> bool:
    """Returns whether a name has a word, between what separates words in the names of files."""
    return re.search(rf"(^|[-._ 0-9/]){re.escape(word)}($|[-._ 0-9/])", name) is not None
