"""The index of a checkpoint: which tensors it holds, and where each part lies in the shards.

torch.distributed.checkpoint (DCP) pickles this index as `.metadata`, and unpickling can run any
code that someone put into the file. Checkpoints hold it as JSON instead. Earlier versions of
sevenfold wrote `.metadata`; it is read without running anything.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from sevenfold import storage
from sevenfold.errors import InputError, first_line

INDEX = "tensors.json"
PICKLED_INDEX = ".metadata"  # DCP's own

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


class _Part(NamedTuple):
    """A part of a tensor, which lies in one piece in a file.

    Attributes:
        offset: Where the part begins in the tensor, by dimension.
        size: Its size by dimension.
        file: The name of the file.
        start: Where it begins in the file, in bytes.
        length: Its length in the file in bytes.
    """

    offset: list[int]
    size: list[int]
    file: str
    start: int
    length: int


def to_json(metadata: Metadata, stored: Mapping[MetadataIndex, _StorageInfo]) -> str:
    """Returns the index of a new checkpoint.

    Args:
        metadata: DCP's metadata of the state.
        stored: Where DCP has written each part of a tensor.

    Raises:
        TypeError: The state holds something that is not a tensor.
    """
    tensors: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise TypeError(f"{name}: expected a tensor")
        parts = []
        for chunk in tensor.chunks:
            info = stored[MetadataIndex(name, chunk.offsets)]
            parts.append(
                _Part(
                    list(chunk.offsets),
                    list(chunk.sizes),
                    info.relative_path,
                    info.offset,
                    info.length,
                )
            )
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(tensor.size), "parts": parts}
    # one line per tensor
    lines = (f"{storage.to_json(n)}: {storage.to_json(t)}" for n, t in tensors.items())
    return '{"tensors": {\n' + ",\n".join(lines) + "\n}}\n"


def read_index(folder: str, files: Container[str]) -> Metadata:
    """Reads the index of a checkpoint, as DCP's metadata.

    Args:
        folder: The checkpoint's directory.
        files: The names of the checkpoint's files, as its manifest lists them.

    Raises:
        InputError: The index cannot be read, or it names a file that is not among them.
    """
    if INDEX not in files:
        return _read_pickled(storage.join(folder, PICKLED_INDEX), files)
    return storage.read_json(storage.join(folder, INDEX), lambda tree: _metadata(tree, files))


def _metadata(tree: Any, files: Container[str]) -> Metadata:
    """Returns DCP's metadata of the tree of a JSON index; see `read_index`."""
    metadata = Metadata({}, storage_data={})
    for name, tensor in storage.json_object(tree["tensors"]).items():
        parts = [_Part(*part) for part in tensor["parts"]]
        _add_tensor(metadata, name, tensor["dtype"], tensor["size"], parts, files)
    return metadata


def _add_tensor(
    metadata: Metadata,
    name: str,
    dtype: str,
    size: Iterable[int],
    parts: Iterable[_Part],
    files: Container[str],
) -> None:
    """Adds a tensor to DCP's metadata.

    Raises:
        ValueError: The file of a part is not known, or the parts do not make up the tensor.
    """
    whole, chunks = _whole_numbers(size), []
    for part in parts:
        if part.file not in files:
            raise ValueError(f"{name} lies in {part.file!r}, which the manifest does not list")
        start, length = _whole_numbers([part.start, part.length])
        chunk = ChunkStorageMetadata(_whole_numbers(part.offset), _whole_numbers(part.size))
        info = _StorageInfo(part.file, start, length)
        metadata.storage_data[MetadataIndex(name, chunk.offsets)] = info
        chunks.append(chunk)
        ends = [a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > limit for end, limit in zip(ends, whole, strict=True)):
            raise ValueError(f"a part of {name} lies outside the tensor")
    # DCP would leave the rest of the tensor as it is, without an error
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(whole):
        raise ValueError(f"the parts of {name} do not make up the tensor")
    properties = TensorProperties(dtype=_DTYPES[dtype])
    metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, whole, chunks)


def _whole_numbers(numbers: Iterable[int]) -> torch.Size:
    numbers = list(numbers)
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"expected whole numbers, found {numbers!r}")
    return torch.Size(numbers)


class _Record:
    """Stands for an object in a pickle: holds what it was made of, and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> _Record:
        """Holds the arguments that the object is made with."""
        record = super().__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state: Any) -> None:
        """Holds the object's state."""
        self.state = state


class _RecordUnpickler(pickle.Unpickler):
    """Unpickles an index of DCP without its classes.

    Each object becomes a record of its own class, made for this one pickle, so that nothing that a
    pickle does to objects or to their classes reaches anything outside.
    """

    # the classes and functions in pickles that torch wrote
    _KNOWN = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "TensorStorageMetadata",
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "TensorProperties",
                    "MetadataIndex",
                    "StorageMeta",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "Path"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
            ("collections", "OrderedDict"),
        }
    )

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class of records for a known name, and the name itself of a dtype."""
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint has")
        return self._classes.setdefault((module, name), type(name, (_Record,), {}))


def _read_pickled(path: str, files: Container[str]) -> Metadata:
    """Reads an index that DCP has pickled; see `read_index`."""
    with storage.open_read(path) as file:
        content = file.read()
    try:
        root = _RecordUnpickler(content).load().state
        infos: dict[tuple[str, tuple[int, ...]], Any] = {
            (index.state["fqn"], _size(index.state["offset"])): info.state
            for index, info in root["storage_data"].items()
            if index.state.get("offset") is not None  # else it is not a tensor
        }
        metadata = Metadata({}, storage_data={})
        for name, tensor in root["state_dict_metadata"].items():
            if type(tensor).__name__ != "TensorStorageMetadata":
                continue  # hyperparameters of the optimizers, which the recipe has
            parts = []
            for chunk in tensor.state["chunks"]:
                offset, size = _size(chunk.state["offsets"]), _size(chunk.state["sizes"])
                info = infos[name, offset]
                file, start, length = (info[k] for k in ("relative_path", "offset", "length"))
                parts.append(_Part(list(offset), list(size), file, start, length))
            dtype, *_ = tensor.state["properties"].state
            _add_tensor(metadata, name, dtype, _size(tensor.state["size"]), parts, files)
    except Exception as e:  # a pickle that torch did not write can hold anything
        raise InputError(
            f"{path}: expected the index of a checkpoint that torch wrote, found another content: "
            f"{first_line(e)}; {storage.DAMAGED_HINT}"
        ) from None
    return metadata


def _size(record: _Record) -> tuple[int, ...]:
    """Returns the numbers of a record that stands for a torch.Size."""
    (numbers,) = record.args
    return tuple(numbers)
