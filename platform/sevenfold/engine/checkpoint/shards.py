"""The shards of a checkpoint, written and read by torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from sevenfold import storage
from sevenfold.engine.checkpoint import tensor_index
from sevenfold.engine.checkpoint.manifest import Checkpoint
from sevenfold.errors import RunError, first_line


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> set[str]:
    """Loads a verified checkpoint into a model and its optimizers.

    The number of ranks may differ from that of the save. The hyperparameters of the optimizers'
    parameter groups are not loaded: they stay those of the recipe.

    Returns:
        The names of the parameters that another optimizer updated when the checkpoint was saved, by
        an earlier version of sevenfold. Their optimizer begins anew.
    """
    options = state_dict_options(model)
    model_state, optimizer_state = get_state_dict(model, optimizers, options=options)
    reader = shard_reader(checkpoint)
    states: Any = optimizer_state["state"]
    unused, moved = _without_saved_state(states, reader.read_metadata().state_dict_metadata)
    saved_states = {n: state for n, state in states.items() if n not in unused | moved}
    dcp.load({"model": model_state, "optimizer": {"state": saved_states}}, storage_reader=reader)
    optimizer_state["state"] = states | saved_states
    set_state_dict(
        model,
        optimizers,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    for name, parameter in model.named_parameters():
        if name in unused | moved:  # set_state_dict requires a state of every parameter
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
    return moved


def _without_saved_state(
    states: Mapping[str, Mapping[str, Any]], saved: Iterable[str]
) -> tuple[set[str], set[str]]:
    """Finds the parameters of which a checkpoint has not the state that their optimizer needs.

    Args:
        states: The state of each parameter by its name, as the optimizers need it.
        saved: The keys in the checkpoint.

    Returns:
        The names of the parameters without any state: an optimizer keeps none of a parameter that
        never had a gradient, such as that of BERT's pooler where hidden states are averaged. And
        the names of those with the state of another optimizer.
    """
    prefix = "optimizer.state."
    fields: dict[str, set[str]] = defaultdict(set)
    for key in saved:
        if key.startswith(prefix):
            name, _, field = key[len(prefix) :].rpartition(".")
            fields[name].add(field)
    unused = {name for name in states if not fields[name]}
    return unused, {name for name in states if not states[name].keys() <= fields[name]} - unused


class CheckpointWeights:
    """The model's weights in a verified checkpoint, as full tensors on the CPU.

    Each tensor is read when it is accessed.

    Args:
        checkpoint: The checkpoint.
        like: For each name, a tensor of the expected shape and dtype; it may be on the meta device.

    Raises:
        InputError: The checkpoint's index cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, like: Mapping[str, torch.Tensor]):
        self._path, self._like = checkpoint.path, like
        self._reader = shard_reader(checkpoint)
        self._reader.read_metadata()  # DCP would log a traceback of its error

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads a tensor.

        Raises:
            RunError: The tensor cannot be read, or its shape is not the expected one.
        """
        tensor = torch.empty_like(self._like[name], device="cpu")
        try:
            with warnings.catch_warnings():
                # DCP warns that it loads in a single process, which is intended here
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load({"model": {name: tensor}}, storage_reader=self._reader, no_dist=True)
        except (Exception, dcp.CheckpointException) as e:  # the latter derives from BaseException
            raise RunError(
                f"{self._path}: {name} cannot be read ({type(e).__name__}: {first_line(e)})"
            ) from None
        return tensor


def state_dict_options(model: nn.Module) -> StateDictOptions:
    """Returns the options for state dicts: an adapter's checkpoints leave out its frozen base.

    A model without an adapter may have frozen parameters too, such as fixed positions; they are
    saved.
    """
    has_adapter = any("lora_" in name for name, _ in model.named_parameters())
    return StateDictOptions(ignore_frozen_params=has_adapter)


def shard_writer(path: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Creates a DCP storage writer that computes the checksums of the files that this rank writes.

    The checksums are those of the data passed to the stream. Comparing them with the files read
    back finds errors of the storage.

    Args:
        path: The checkpoint's directory.

    Returns:
        The writer, and a dict that is filled while it writes: for each file name, its size
        ("bytes") and SHA-256 ("sha256").
    """
    if storage.is_url(path):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer: Any = FsspecWriter(path, single_file_per_rank=True)
    else:
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, overwrite=False)
    checksums: dict[str, dict[str, Any]] = {}
    create_stream = writer.fs.create_stream

    @contextlib.contextmanager
    def create_hashing_stream(path: Any, mode: str) -> Iterator[Any]:
        with create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashing = _HashingStream(stream)
            try:
                yield hashing
            except RuntimeError:  # torch.save loses the reason, such as a full disk
                if hashing.error is not None:
                    raise hashing.error from None
                raise
        name = str(path).replace("\\", "/").rsplit("/", 1)[-1]
        checksums[name] = {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()}

    def write_index(metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {result.index: result.storage_data for part in results for result in part}
        content = tensor_index.to_json(metadata, stored).encode()
        storage.write(storage.join(path, tensor_index.INDEX), content)
        digest = hashlib.sha256(content).hexdigest()
        checksums[tensor_index.INDEX] = {"bytes": len(content), "sha256": digest}

    writer.fs.create_stream = create_hashing_stream
    writer.finish = write_index  # of DCP, which calls it on rank 0
    return writer, checksums


class _HashingStream:
    """Wraps a binary stream, and counts and hashes the bytes that are written to it."""

    def __init__(self, stream: Any):
        self._stream, self.digest, self.size = stream, hashlib.sha256(), 0
        self.error: OSError | None = None  # of a write

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        try:
            self._stream.write(view)
        except OSError as e:
            self.error = e
            raise
        return len(view)

    def tell(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def shard_reader(checkpoint: Checkpoint) -> Any:
    """Creates a DCP storage reader of a checkpoint's tensors, which runs no code in its files.

    DCP itself reads tensors by torch.load with weights_only. Its index is read by `tensor_index`,
    once, and lists nothing but tensors: DCP unpickles anything else.
    """
    if storage.is_url(checkpoint.path):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        reader: Any = FsspecReader(checkpoint.path)
    else:
        reader = dcp.FileSystemReader(checkpoint.path)

    @functools.cache
    def read_metadata() -> Metadata:
        metadata = tensor_index.read_index(checkpoint.path, checkpoint.files)
        metadata.storage_meta = StorageMeta(load_id=reader.load_id)
        return metadata

    reader.read_metadata = read_metadata
    return reader
