"""Which files of a source are read: by their names, and of datasets that `datasets` has saved."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from sevenfold import storage
from sevenfold.data.sources import hub_datasets
from sevenfold.data.sources.shards import BINARY, COMPRESSIONS, SUFFIXES, Format
from sevenfold.errors import InputError
from sevenfold.recipe import Source
from sevenfold.report.console import say

# Which files a run reads: EARLIER, those of parquet, JSON lines and text (.txt), and each line of a
# text is a document; CURRENT, what this module says. A manifest has the version of its run.
EARLIER, CURRENT = 1, 2
_EARLIER_FORMATS: tuple[Format, ...] = ("parquet", "jsonl", "txt")

# The suffixes of files that `format: txt` does not read: other data, and what is no text.
_OTHER_DATA = tuple(s for name, suffixes in SUFFIXES.items() if name != "txt" for s in suffixes)
_NO_TEXT = re.compile(
    r"\.(7z|avi|bin|bmp|bz2|class|ckpt|db|dll|doc|docx|dylib|eot|exe|flac|gguf|gif|h5|hdf5|ico|jar"
    r"|jpeg|jpg|lock|m4a|mkv|mov|mp3|mp4|msgpack|npy|npz|o|odt|ogg|onnx|orc|otf|pdf|pickle|pkl|png"
    r"|ppt|pptx|pt|pth|pyc|rar|safetensors|so|sqlite|sqlite3|svgz|tar|tgz|tif|tiff|ttf|wav|webm"
    r"|webp|whl|woff|woff2|xls|xlsx|xz|zip)$"
)
_HIDDEN = re.compile(r"(^|/)([._])")
_MAX_KINDS = 8  # of files that are not read, that are named
# The files by which `datasets` marks the folders that its save_to_disk writes.
_INFO, _STATE, _SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


class SourceFiles(NamedTuple):
    """The files of a source.

    Attributes:
        files: Those that are read.
        unread: The names of the others in its folder.
    """

    files: list[storage.InputFile]
    unread: tuple[str, ...] = ()


def find_files(source: Source, version: int = CURRENT) -> SourceFiles:
    """Finds the files of a source.

    Args:
        source: The source.
        version: EARLIER or CURRENT.

    Raises:
        InputError: There are none, or the folder is one of `datasets` that cannot be read.
    """
    path = storage.resolve_input(source.path)
    dataset = None
    if hub_datasets.is_hub(path):
        dataset = hub_datasets.parse(path)
        hub_datasets.require(dataset, path)
        path = dataset.url
    if version == EARLIER:
        return SourceFiles(storage.input_files(path, file_suffixes(source, _EARLIER_FORMATS)))
    suffixes = file_suffixes(source)
    try:
        listing = storage.list_input(path, suffixes, _is_text if source.format == "txt" else None)
    except storage.NoFilesError as e:
        raise InputError(f"{e}{_describe(e.unread, source)}") from None
    if dataset is not None:
        listing = hub_datasets.of_split(listing, dataset, source.path)
    if source.format not in (None, "arrow"):
        return SourceFiles(listing.files, listing.unread)
    return _of_saved_datasets(path, listing, source)


def file_suffixes(source: Source, formats: Sequence[Format] = tuple(SUFFIXES)) -> tuple[str, ...]:
    """Returns the suffixes of the files that are read when a source is a folder."""
    plain = {name: SUFFIXES[name] for name in ([source.format] if source.format else formats)}
    text = [s for name, suffixes in plain.items() if name not in BINARY for s in suffixes]
    return (
        *(s for suffixes in plain.values() for s in suffixes),
        *(s + compression for s in text for compression in COMPRESSIONS),
    )


def _is_text(name: str) -> bool:
    """Returns whether a file of a folder is read with `format: txt`."""
    stem, suffix = os.path.splitext(name.lower())
    plain = stem if suffix in COMPRESSIONS else name.lower()
    return not plain.endswith(_OTHER_DATA) and not _NO_TEXT.search(plain)


def _of_saved_datasets(path: str, listing: storage.InputListing, source: Source) -> SourceFiles:
    """Returns the files of a listing; if the folder was saved by `datasets`, those of its state."""
    names = {*listing.names, *listing.unread}
    if _SPLITS in names:
        found = storage.read_json(storage.join(path, _SPLITS), lambda tree: list(tree["splits"]))
        raise InputError(
            f"{path}: expected one split, found a DatasetDict with the splits "
            f"{', '.join(map(str, found))}: name one, as in `path: {source.path.rstrip('/')}/"
            f"{found[0] if found else 'train'}`"
        )
    saved = [n[: -len(_STATE)] for n in names if n == _STATE or n.endswith(f"/{_STATE}")]
    saved = [folder for folder in saved if folder + _INFO in names]
    if inner := sorted(filter(None, saved)):
        raise InputError(
            f"{path}: found a dataset that save_to_disk wrote in its folder {inner[0]}: name it "
            f"as a source of its own, `path: {source.path.rstrip('/')}/{inner[0].rstrip('/')}`"
        )
    if not saved:
        return SourceFiles(listing.files, listing.unread)
    state = storage.join(path, _STATE)
    wanted, is_selected = storage.read_json(state, _data_files)
    if is_selected:
        raise InputError(
            f"{path}: the dataset was saved with a selection of its rows (select, filter, shuffle, "
            "...), of which only the whole is in its files: call .flatten_indices() before "
            ".save_to_disk()"
        )
    by_name = dict(zip(listing.names, listing.files, strict=True))
    for name in wanted:
        if name not in by_name:
            raise InputError(
                f"{state}: names the file {name[:100]}, which is not in the folder: save the "
                "dataset again"
            )
    unread = names - {*wanted, _INFO, _STATE}
    return SourceFiles([by_name[name] for name in sorted(wanted)], tuple(sorted(unread)))


def _data_files(state: Any) -> tuple[list[str], bool]:
    """Returns the data files of a saved dataset by its state, and whether rows are selected.

    Earlier versions of `datasets` stored the numbers of the selected rows beside the data.
    """
    is_selected = bool(state.get("_indices_data_files") or state.get("_indices_files"))
    return [str(file["filename"]) for file in state["_data_files"]], is_selected


def report_unread(source: Source, unread: Sequence[str], reported: set[str]) -> None:
    """Says which files of a source's folder are not read, once for each folder.

    Args:
        source: The source.
        unread: Their names.
        reported: The folders of which it was said; this one is added.
    """
    if unread and source.path not in reported:
        reported.add(source.path)
        slash = "" if hub_datasets.is_hub(source.path) else "/"
        say(f"{source.path.rstrip('/')}{slash}{_describe(unread, source)}")


def _describe(unread: Sequence[str], source: Source) -> str:
    """Returns what of a folder is not read, as the rest of a sentence; "" if it is nothing."""
    if not unread:
        return ""
    kinds = Counter(map(_kind, unread))
    counts = [f"{n:,} {kind}" for kind, n in sorted(kinds.items(), key=lambda k: (-k[1], k[0]))]
    if len(counts) > _MAX_KINDS:
        counts[_MAX_KINDS:] = [f"and {len(counts) - _MAX_KINDS:,} other kinds"]
    text = [kind for kind in sorted(kinds) if kind.startswith(".") and _is_text(kind)]
    is_open = bool(text) and source.format is None
    hint = f"; add format: txt to read {', '.join(text[:5])} as text" if is_open else ""
    files = f"{len(unread):,} file{'s' if len(unread) > 1 else ''}"
    return f": not read: {files} ({', '.join(counts)}){hint}"


def _kind(name: str) -> str:
    """Returns the kind of a file that is not read, by its name."""
    if hidden := _HIDDEN.search(name):
        return f"beginning with {hidden[2]}"
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1] + suffix
    return suffix[:40] or "without a suffix"
