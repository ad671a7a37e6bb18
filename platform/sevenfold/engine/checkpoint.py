"""Checkpoints: whole, or not there. Shards and their sums first, MANIFEST.json last: that is the commit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from sevenfold import storage
from sevenfold.errors import InputError, RunError

log = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})\.(\d{2,})")  # of a checkpoint's directory: the step, and which save of it
# what a save writes beside the manifest, and temporary files of a write that was interrupted
_UNFINISHED = re.compile(r"(__\d+_\d+\.distcp|\.metadata)(\.tmp)?|MANIFEST\.json\..+\.tmp")
RETRIES = (2.0, 8.0, 30.0)  # seconds before a save is tried again
MOST_FAILED = 3  # saves in a row
PATIENCE = timedelta(hours=2)  # for the slowest rank's shard
T = TypeVar("T")


class DamagedError(RunError):
    """A checkpoint that is not what its manifest says."""


class TakenOverError(RunError):
    """The folder is another's now: nothing more may be written to it."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as its manifest describes it.

    Attributes:
        path: The checkpoint's directory.
        step: The training step that it holds the state of.
        world_size: The number of ranks that wrote it.
        files: The size in bytes and the SHA-256 of each file, by its name.
        extra: What the run wants to find again (plain JSON).
        run: The identity of the run whose folder it was written to. Only that run may remove it.
    """

    path: str
    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    extra: dict[str, Any]
    run: str = ""


class Saver:
    """Writes checkpoints beside the training, one at a time. Every rank has one and calls it at the same steps.

    A save copies what is trained, and the training goes on; a thread writes the copy, a shard a rank, reads it back, commits
    it and removes what is no longer kept. One that fails is tried again, then told and given up: the last good one stays.

    Attributes:
        spared: steps whose checkpoints the next save leaves there, however old.
        seconds: what the last save that was committed took, from the call to the end of its thread's work.
    """

    def __init__(
        self, folder: str, keep: int = 2, keep_every: int | None = None, tell: Callable[[str], None] = log.warning,
        last: Checkpoint | None = None, run: str = "",
    ):  # fmt: skip
        """
        Args:
            keep: newest checkpoints that stay.
            keep_every: those of its multiples of steps stay for good.
            tell: Receives rank 0's messages: saves that failed, and files in the folder that no save wrote.
            last: the checkpoint that training went on from.
            run: The identity of the run. Checkpoints of other runs are never removed.
        """
        self._folder, self._keep, self._every, self._tell, self._run = folder, keep, keep_every, tell, run
        self._named: set[str] = set()  # foreign files that were reported
        self.begin_from(last)
        # of its own: in the step's group its messages and the step's would be taken for each other
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))  # keeps its buffers from save to save
        self._thread = ThreadPoolExecutor(1, "sevenfold-checkpoint")
        self._under_way: Future[Checkpoint] | None = None
        self._failed, self._begin, self.seconds = 0, 0.0, 0.0
        self.spared: Collection[int] = ()

    def begin_from(self, last: Checkpoint | None) -> None:
        """Goes on from a checkpoint, or from none: those after it were passed over, and are not counted as good ones."""
        self.last = last
        begin = _number(_base(last.path)) if last else (-1, 0)
        self._passed_over = {n for n in _names(self._folder) if _number(n) > begin} if dist.get_rank() == 0 else set[str]()

    def save(
        self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], extra: dict[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Begins a checkpoint of the trained parameters and the optimizers' state; waits for the one before to end.

        Args:
            before_commit: what rank 0 has to write before the checkpoint counts; it fails with it, and is tried again with it,
                unless it raises TakenOverError, which is raised on all ranks at the next call.

        Raises RunError where MOST_FAILED in a row could not be written.
        """
        self.wait()
        self._begin = time.perf_counter()
        weights, state = get_state_dict(model, optimizers, options=_options())
        copy: Any = self._stager.stage({"model": weights, "optimizer": state})
        self._under_way = self._thread.submit(self._persist, copy, step, extra, before_commit)

    @property
    def under_way(self) -> bool:
        """Whether a save is being written by this rank."""
        return self._under_way is not None and not self._under_way.done()

    def wait(self) -> Checkpoint | None:
        """The last one that was committed, once none is under way. Raises as save."""
        if self._under_way is not None:
            try:
                self.last, self._failed = self._under_way.result(), 0
            except TakenOverError:
                raise
            except RunError as e:
                self._failed += 1
                stays = f"step {self.last.step} is the last one" if self.last else "there is none"
                if dist.get_rank() == 0:
                    self._tell(f"{e}; {stays}")
                if self._failed == MOST_FAILED:
                    raise RunError(f"{MOST_FAILED} checkpoints in a row could not be written; {stays}: {e}") from None
            finally:
                self._under_way = None
        return self.last

    def committed(self) -> dict[int, str]:
        """Where the checkpoints lie, by step, once none is under way; the same on every rank. Raises as save."""
        self.wait()
        return self._each(lambda: steps(self._folder) if dist.get_rank() == 0 else {})[0]

    def close(self) -> None:
        """Leaves what is under way to its end."""
        self._thread.shutdown(wait=True)
        self._stager.close()
        dist.destroy_process_group(self._group)

    def _persist(self, *save: Any) -> Checkpoint:
        for wait in RETRIES:
            try:
                return self._written(*save)
            except TakenOverError:
                raise
            except RunError:
                time.sleep(wait)
        return self._written(*save)

    def _written(self, state: dict[str, Any], step: int, extra: dict[str, Any], before: Callable[[], None]) -> Checkpoint:
        rank, world = dist.get_rank(), dist.get_world_size()
        path = self._each(lambda: storage.join(self._folder, _fresh(self._folder, step)) if rank == 0 else "")[0]
        try:
            made: list[Any] = []
            self._each(lambda: made.append(_writer(path)))
            writer, sums = made[0]
            self._each(lambda: dcp.save(state, storage_writer=writer, process_group=self._group))
            files = {name: s for part in self._each(lambda: sums) for name, s in part.items()}
            found = Checkpoint(path, step, world, files, extra, self._run)
            self._each(lambda: verify(found, list(sums)))
            self._each(lambda: before() if rank == 0 else None)
            self._each(lambda: _commit(found) if rank == 0 else None)
        except RunError as e:
            with contextlib.suppress(Exception):
                self._each(lambda: storage.remove(path) if rank == 0 else None)
            if isinstance(e, TakenOverError):
                raise
            raise RunError(f"{path}: could not be written ({e})") from None
        if rank == 0:
            try:
                foreign = set(prune(found, self._keep, self._every, self._passed_over, self.spared))
            except (InputError, RunError) as e:  # it is committed all the same, and the next save removes it
                log.warning("%s", e)
            else:
                if foreign - self._named:
                    self._tell(
                        f"{self._folder}: kept, since this run did not write it: {', '.join(sorted(foreign - self._named))}"
                    )
                self._named |= foreign
        self.seconds = time.perf_counter() - self._begin
        return found

    def _each(self, work: Callable[[], T]) -> list[T]:
        return _each(work, self._group)


def _each(work: Callable[[], T], group: Any = None) -> list[T]:
    """What `work` returned on each rank. Raises RunError on all of them where it raised on any."""
    try:
        mine: Any = work()
    except RunError as e:
        mine = e
    except (Exception, dcp.CheckpointException) as e:  # one rank's is everyone's: no rank may wait for one that has given up
        mine = RunError(f"{type(e).__name__}: {_first_line(e)}")
    parts = [mine]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, mine, group=group)
    for part in parts:
        if isinstance(part, RunError):
            raise part
    return parts


def _first_line(error: BaseException) -> str:
    """Of what began it: torch wraps a rank's error in one of all ranks."""
    inner = next(iter(getattr(error, "failures", {}).values()), error)
    error = inner[0] if isinstance(inner, tuple) else inner
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _commit(found: Checkpoint) -> None:
    tree = {k: v for k, v in asdict(found).items() if k != "path"}
    storage.write(storage.join(found.path, MANIFEST), json.dumps({**tree, "sha256": _of_tree(tree)}, indent=1))


def _of_tree(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def load(checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Reads a verified checkpoint into a model of any number of ranks. The optimizers' settings stay what they are: the
    recipe's."""
    kept = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
    options = _options()
    weights, optim = get_state_dict(model, optimizers, options=options)
    dcp.load({"model": weights, "optimizer": optim}, storage_reader=_reader(checkpoint.path))
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=optim, options=options)
    for optimizer, groups in zip(optimizers, kept, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)


class Weights:
    """The model's tensors in a verified checkpoint, whole and on the CPU; each is read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, like: Mapping[str, torch.Tensor]):
        """like: by name, of the shape and dtype that are wanted; they may lie on the meta device."""
        self._path, self._like = checkpoint.path, like
        self._reader = _reader(checkpoint.path)
        self._reader.read_metadata = functools.cache(self._reader.read_metadata)  # else once a tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises RunError where it cannot be read or is of another shape."""
        found = torch.empty_like(self._like[name], device="cpu")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
                dcp.load({"model": {name: found}}, storage_reader=self._reader, no_dist=True)
        except (Exception, dcp.CheckpointException) as e:
            raise RunError(f"{self._path}: {name} cannot be read ({type(e).__name__}: {_first_line(e)})") from None
        return found


def steps(folder: str) -> dict[int, str]:
    """Where the committed checkpoints lie, by step, the oldest first."""
    return {_number(n)[0]: storage.join(folder, n) for n in _committed(folder)}


def latest(folder: str, warn: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The newest checkpoint that is whole, the same on every rank, each of which looks at a part of the files. A damaged one
    is named to rank 0's `warn` and passed over. Nothing is unpickled.

    Raises RunError where the storage keeps failing.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = _each(lambda: _committed(folder) if rank == 0 else [])[0]
    for name in reversed(names):
        try:
            return _each(functools.partial(verified, storage.join(folder, name), rank, world))[0]
        except DamagedError as e:
            if rank == 0:
                warn(f"{e}; passed over for the one before")
    return None


def verified(path: str, rank: int = 0, world: int = 1) -> Checkpoint:
    """A checkpoint whose files are sound, or this rank's part of them. Raises DamagedError."""
    found = read(path)
    verify(found, sorted(found.files)[rank::world])
    return found


def adopt(path: str, folder: str, run: str) -> Checkpoint:
    """Copies a committed checkpoint into the folder of another run, which resumes from it.

    Args:
        path: The checkpoint's directory.
        folder: The other run's folder of checkpoints.
        run: The other run's identity: it may remove the copy.

    Raises:
        DamagedError: As `read`.
    """
    found = read(path)
    made = replace(found, path=storage.join(folder, _fresh(folder, found.step)), run=run)
    for name in found.files:
        storage.copy(storage.join(path, name), storage.join(made.path, name))
    _commit(made)
    return made


def read(path: str) -> Checkpoint:
    """Raises DamagedError where the manifest cannot be read or names a file outside its folder."""
    try:
        tree = storage.read_json(storage.join(path, MANIFEST))
        if tree.pop("sha256") != _of_tree(tree):
            raise DamagedError(f"{path}: damaged: {MANIFEST} is not what its own checksum says")
        tree.setdefault("run", tree["extra"].get("recipe", ""))  # before this field, that was all that told the run
        found = Checkpoint(path=path, **tree)
    except (InputError, OSError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise DamagedError(f"{path}: damaged: {MANIFEST} cannot be read ({type(e).__name__})") from None
    for name in found.files:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise DamagedError(f"{path}: damaged: {MANIFEST} names {name!r}, which leaves its folder")
    if _NAME.fullmatch(_base(path)) and _number(_base(path))[0] != found.step:
        raise DamagedError(f"{path}: {MANIFEST} says step {found.step}: a copy of another checkpoint under this name")
    return found


def verify(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> None:
    """Raises DamagedError, naming the file, where a size or sum is not what the manifest says. names: of these files alone."""
    for name in checkpoint.files if names is None else names:
        file, expected = storage.join(checkpoint.path, name), checkpoint.files[name]
        if not storage.exists(file):
            raise DamagedError(f"{file}: damaged: missing")
        if storage.size(file) != expected["bytes"] or _sum(file) != expected:
            raise DamagedError(f"{file}: damaged: its checksum is not the manifest's")


def prune(
    newest: Checkpoint, keep: int, keep_every: int | None = None, damaged: Collection[str] = (), spared: Collection[int] = ()
) -> list[str]:
    """Removes the checkpoints of a run that are no longer kept, and the remains of its interrupted saves.

    Only files that a save of this run wrote are removed: a directory must have the exact name of a checkpoint, and a committed
    one a manifest that names this run. Everything else in the folder belongs to somebody else and stays. What lies after
    `newest` (damaged, and passed over) stays too, for whoever wants to look at it.

    Args:
        newest: The checkpoint that was just committed.
        keep: The number of newest checkpoints to keep, `newest` among them.
        keep_every: Checkpoints of a multiple of this number of steps are kept for good.
        damaged: Names of checkpoints that do not count as kept ones.
        spared: Steps whose checkpoints are kept, however old.

    Returns:
        The names in the folder that no save of this run wrote.
    """
    folder = newest.path.replace("\\", "/").rsplit("/", 1)[0]
    names = _names(folder)
    foreign = [n for n in storage.listdir(folder) if n not in names]
    earlier = [n for n in names if _number(n) < _number(_base(newest.path))]
    committed = set(_committed(folder))
    older = [n for n in earlier if n in committed and n not in damaged]
    kept = set(older[-(keep - 1) :] if keep > 1 else ())
    kept |= {n for n in older if _number(n)[0] in spared or (keep_every and _number(n)[0] % keep_every == 0)}
    for name in earlier:
        if name in kept:
            continue
        path = storage.join(folder, name)
        left = _remove(path, newest.run) if name in committed else _remove_unfinished(path)
        foreign += [name] if MANIFEST in left else [f"{name}/{file}" for file in left]
    return foreign


def _remove(path: str, run: str) -> list[str]:
    """Removes the files of a committed checkpoint; the manifest first, so that no half of a checkpoint is left by an
    interruption. Returns the names that stay: all of them where the manifest cannot be read or names another run."""
    if _is_link(path):
        return storage.listdir(path)
    try:
        found = read(path)
    except DamagedError:
        return storage.listdir(path)
    if found.run != run:
        return storage.listdir(path)
    for name in (MANIFEST, *found.files):
        storage.remove(storage.join(path, name))
    storage.remove_empty(path)
    return storage.listdir(path)


def _remove_unfinished(path: str) -> list[str]:
    """Removes the files of a save that was never committed. Returns the names that stay."""
    if not _is_link(path):
        for name in storage.listdir(path):
            if _UNFINISHED.fullmatch(name):
                storage.remove(storage.join(path, name))
        storage.remove_empty(path)
    return storage.listdir(path)


def _is_link(path: str) -> bool:
    """Returns whether a directory is a link: what it leads to lies elsewhere, and is not this run's to remove."""
    return not storage.is_url(path) and os.path.islink(path)


def _base(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def _names(folder: str) -> list[str]:
    """Returns the names in a folder that are a checkpoint's, in the order of their steps, whether committed or not."""
    return sorted((n for n in storage.listdir(folder) if _NAME.fullmatch(n)), key=_number)


def _committed(folder: str) -> list[str]:
    """Returns the names of the checkpoints that have a manifest, oldest first."""
    return [n for n in _names(folder) if storage.exists(storage.join(folder, n, MANIFEST))]


def _number(name: str) -> tuple[int, int]:
    """Returns the step of a checkpoint's directory, and which save of that step it is."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2])


def _fresh(folder: str, step: int) -> str:
    """A name that no directory has: an interrupted save of the same step is never written into."""
    taken, n = set(storage.listdir(folder)), 0
    while (name := f"step-{step:08d}.{n:02d}") in taken:
        n += 1
    return name


def _options() -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True)


def _writer(path: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A writer, and the sums of this rank's files once it is done: of what was meant to be written."""
    if storage.is_url(path):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer: Any = FsspecWriter(path, single_file_per_rank=True)
    else:
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, overwrite=False)
    sums: dict[str, dict[str, Any]] = {}
    create = writer.fs.create_stream

    @contextlib.contextmanager
    def summed(path: Any, mode: str) -> Iterator[Any]:
        with create(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            made = _Summed(stream)
            yield made
        name = str(path).replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".tmp")  # .metadata is renamed
        sums[name] = {"bytes": made.size, "sha256": made.digest.hexdigest()}

    writer.fs.create_stream = summed
    return writer, sums


class _Summed:
    """A stream that adds up what is written to it."""

    def __init__(self, stream: Any):
        self._stream, self.digest, self.size = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        self._stream.write(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _reader(path: str) -> Any:
    if storage.is_url(path):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(path)
    return dcp.FileSystemReader(path)


def _sum(path: str) -> dict[str, Any]:
    with storage.open_read(path) as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return {"bytes": f.tell(), "sha256": digest}
