"""The checkpoint manager: writes checkpoints in the background, one at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict

from sevenfold import storage
from sevenfold.engine.checkpoint.collective import T, on_each_rank
from sevenfold.engine.checkpoint.manifest import (
    Checkpoint,
    base_name,
    checkpoint_names,
    checkpoint_paths,
    commit,
    fresh_name,
    log,
    number_of,
    read_manifest,
    verify_files,
)
from sevenfold.engine.checkpoint.retention import prune_checkpoints
from sevenfold.engine.checkpoint.shards import shard_writer, state_dict_options
from sevenfold.errors import InputError, RunError

RETRIES = (2.0, 8.0, 30.0)  # seconds to wait before each retry of a failed save
MAX_FAILED_SAVES = 3  # in a row, until the run fails
GROUP_TIMEOUT = timedelta(hours=2)  # for the slowest rank to write its shard


class TakenOverError(RunError):
    """Another start of the run owns its folder now: nothing more may be written to it."""


class CheckpointManager:
    """Writes checkpoints in the background, one at a time.

    Every rank has one and calls it at the same steps.

    A save copies the state, and the training continues. A thread then writes the copy (one shard
    per rank), reads it back, commits it, and removes the checkpoints that are no longer kept. A
    save that fails is retried; if the retries fail too, this is reported and the save is given up.
    The last committed checkpoint stays.

    Args:
        folder: The folder of checkpoints, a path or URL.
        keep: The number of newest checkpoints to keep.
        keep_every: Checkpoints whose step is a multiple of this are kept forever.
        say: Receives rank 0's messages: saves that failed, and files in the folder that no save of
            this run wrote.
        last: The checkpoint that the training resumed from.
        run: The identity of the run. Checkpoints of other runs are never removed.

    Attributes:
        last: The last committed checkpoint.
        pinned_steps: Steps whose checkpoints the next save does not remove, regardless of their
            age.
        save_seconds: The duration of the last committed save, from the call until its thread had
            finished.
    """

    def __init__(
        self,
        folder: str,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        say: Callable[[str], None] = log.warning,
        last: Checkpoint | None = None,
        run: str = "",
    ):
        self._folder, self._say, self._run = folder, say, run
        self._keep, self._keep_every = keep, keep_every
        self._reported_foreign: set[str] = set()  # files of others that were reported
        self.resume_from(last)
        # a group of its own: in the group of the training steps, the messages of this thread and
        # of a step would be mistaken for each other
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        cuda = torch.cuda.is_available()
        # the stager reuses its buffers from save to save
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )
        self._thread = ThreadPoolExecutor(1, "sevenfold-checkpoint")
        self._pending: Future[Checkpoint] | None = None
        self._failed_saves = 0  # in a row
        self._save_start, self.save_seconds = 0.0, 0.0
        self.pinned_steps: Collection[int] = ()

    def resume_from(self, last: Checkpoint | None) -> None:
        """Sets the checkpoint that the training resumes from, None if it starts afresh.

        Later checkpoints were skipped as damaged, and do not count as checkpoints to keep.
        """
        self.last = last
        start = number_of(base_name(last.path)) if last else (-1, 0)
        self._damaged = (
            {name for name in checkpoint_names(self._folder) if number_of(name) > start}
            if dist.get_rank() == 0
            else set[str]()
        )

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        extra: dict[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts to save the trained parameters and the state of the optimizers.

        Waits for a pending save first.

        Args:
            step: The training step.
            model: The model.
            optimizers: Its optimizers.
            extra: Further state, plain JSON.
            before_commit: Called on rank 0 before the checkpoint is committed, to write other
                files of the run. If it raises an exception, the save fails and is retried.
                TakenOverError is not retried: the next call of this manager raises it on all
                ranks.

        Raises:
            RunError: MAX_FAILED_SAVES saves in a row have failed.
        """
        self.wait()
        self._save_start = time.perf_counter()
        model_state, optimizer_state = get_state_dict(
            model, optimizers, options=state_dict_options(model)
        )
        state: Any = {"model": model_state}
        if optimizers:  # without their hyperparameters, which the recipe has
            state["optimizer"] = {"state": optimizer_state["state"]}
        copy: Any = self._stager.stage(state)
        self._pending = self._thread.submit(self._persist, copy, step, extra, before_commit)

    @property
    def saving(self) -> bool:
        """Whether this rank is writing a checkpoint."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> Checkpoint | None:
        """Waits for the pending save, and returns the last committed checkpoint.

        Raises:
            TakenOverError: Another start of the run owns the folder.
            RunError: MAX_FAILED_SAVES saves in a row have failed.
        """
        if self._pending is None:
            return self.last
        try:
            self.last, self._failed_saves = self._pending.result(), 0
        except TakenOverError:
            raise
        except RunError as e:
            self._failed_saves += 1
            last = (
                f"the last checkpoint is of step {self.last.step}"
                if self.last
                else "there is no checkpoint yet"
            )
            if dist.get_rank() == 0:
                self._say(f"{e}; {last}")
            if self._failed_saves == MAX_FAILED_SAVES:
                raise RunError(
                    f"{MAX_FAILED_SAVES} checkpoints in a row could not be written; {last}: {e}"
                ) from None
        finally:
            self._pending = None
        return self.last

    def committed_paths(self) -> dict[int, str]:
        """Waits for the pending save, and returns the directory of each checkpoint by its step.

        The result is the same on every rank.

        Raises:
            RunError: As `wait`.
        """
        self.wait()
        return self.on_each_rank(
            lambda: checkpoint_paths(self._folder) if dist.get_rank() == 0 else {}
        )[0]

    def close(self) -> None:
        """Waits for a pending save to finish, and releases all resources."""
        self._thread.shutdown(wait=True)
        self._stager.close()
        dist.destroy_process_group(self._group)

    def _persist(self, *save: Any) -> Checkpoint:
        """Writes a checkpoint as `_write` does, with retries."""
        for delay in RETRIES:
            try:
                return self._write(*save)
            except TakenOverError:
                raise
            except RunError:
                time.sleep(delay)
        return self._write(*save)

    def _write(
        self,
        state: dict[str, Any],
        step: int,
        extra: dict[str, Any],
        before_commit: Callable[[], None],
    ) -> Checkpoint:
        """Writes a checkpoint, commits it and removes those no longer kept.

        Raises:
            TakenOverError: `before_commit` raised it.
            RunError: The checkpoint could not be written, on some rank.
        """
        rank = dist.get_rank()
        path = self.on_each_rank(
            lambda: storage.join(self._folder, fresh_name(self._folder, step)) if rank == 0 else ""
        )[0]
        try:
            checkpoint = self._write_and_commit(path, state, step, extra, before_commit)
        except RunError as e:
            with contextlib.suppress(Exception):
                self.on_each_rank(lambda: storage.remove(path) if rank == 0 else None)
            if isinstance(e, TakenOverError):
                raise
            raise RunError(f"{path}: could not be written ({e})") from None
        if rank == 0:
            self._prune(checkpoint)
        self.save_seconds = time.perf_counter() - self._save_start
        return checkpoint

    def _write_and_commit(
        self,
        path: str,
        state: dict[str, Any],
        step: int,
        extra: dict[str, Any],
        before_commit: Callable[[], None],
    ) -> Checkpoint:
        """Writes the shards into a directory, reads them back, and writes the manifest."""
        rank, world = dist.get_rank(), dist.get_world_size()
        created: list[Any] = []  # only this rank's: a writer cannot be sent to the other ranks
        self.on_each_rank(lambda: created.append(shard_writer(path)))
        writer, checksums = created[0]
        self.on_each_rank(lambda: dcp.save(state, storage_writer=writer, process_group=self._group))
        files = {
            name: checksum
            for part in self.on_each_rank(lambda: checksums)
            for name, checksum in part.items()
        }
        checkpoint = Checkpoint(path, step, world, files, extra, self._run)
        self.on_each_rank(lambda: verify_files(checkpoint, list(checksums)))
        self.on_each_rank(lambda: before_commit() if rank == 0 else None)
        self.on_each_rank(lambda: commit(checkpoint) if rank == 0 else None)
        return checkpoint

    def _prune(self, newest: Checkpoint) -> None:
        """Removes the checkpoints that are no longer kept, and reports files of others once."""
        try:
            foreign = set(
                prune_checkpoints(
                    newest, self._keep, self._keep_every, self._damaged, self.pinned_steps
                )
            )
        except (InputError, RunError) as e:
            # the new checkpoint is committed regardless; the next save removes the rest
            log.warning("%s", e)
            return
        unreported = sorted(foreign - self._reported_foreign)
        if unreported:
            self._say(
                f"{self._folder}: kept files not written by this run: {', '.join(unreported)}"
            )
        self._reported_foreign |= foreign

    def on_each_rank(self, work: Callable[[], T]) -> list[T]:
        """Calls `on_each_rank` with this manager's process group."""
        return on_each_rank(work, self._group)


def copy_checkpoint(path: str, folder: str, run: str) -> Checkpoint:
    """Copies a committed checkpoint into the folder of another run, which resumes from it.

    Args:
        path: The checkpoint's directory.
        folder: The other run's folder of checkpoints.
        run: The other run's identity, so that it may remove the copy.

    Raises:
        DamagedError: The manifest cannot be read; see `read_manifest`.
    """
    source = read_manifest(path)
    copy = replace(source, path=storage.join(folder, fresh_name(folder, source.step)), run=run)
    for name in source.files:
        storage.copy(storage.join(path, name), storage.join(copy.path, name))
    commit(copy)
    return copy
