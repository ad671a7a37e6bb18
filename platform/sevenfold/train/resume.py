"""The state that a run resumes from, besides its weights and optimizers.

It consists of the position in the data, the guard and the best validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from platform import python_version
from typing import Any

import ray
import torch
import transformers
from torch import distributed as dist

import sevenfold
from sevenfold.data.ledger import Ledger
from sevenfold.data.reader import UNIT
from sevenfold.data.stream import LaneReader, ReaderState, ReadRange
from sevenfold.engine.checkpoint import Checkpoint, CheckpointManager
from sevenfold.engine.checkpoint.best import BestTracker
from sevenfold.engine.checkpoint.interval import is_due
from sevenfold.engine.guard import Guard
from sevenfold.engine.step_plan import DataProgress, StepPlan
from sevenfold.errors import RunError
from sevenfold.model.parallel import DataRank
from sevenfold.prepare.job import Job
from sevenfold.report.run_log import logged_metrics
from sevenfold.run_folder import RunFolder


class RunState:
    """The state of a run that is stored in its checkpoints. Every rank has one.

    Args:
        job: The run.
        place: The rank's place among the ranks that read data.
        rank: The rank's number; rank 0 writes the ledger.
        device: The rank's device.
        say: Shows a sentence to the user; called on rank 0.

    Attributes:
        plan: The number of steps.
        guard: Handles steps whose loss or gradient is not finite, or spikes.
        best: Tracks the best validation.
        reader: Reads the rows of this rank; None until `open_reader` is called.
        manager: Writes the checkpoints; the worker sets it once the model is built.
    """

    def __init__(
        self,
        job: Job,
        place: DataRank,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self._job, self._place, self._rank, self._say = job, place, rank, say
        self._device = device
        self._ledger = Ledger(RunFolder(job.folder).ledger)
        # ranges (first, last) of data steps that the guard skips
        self._skipped_data: list[tuple[int, int]] = []
        # the position in the data when the run was last restored
        self._restored = ReaderState()
        # what all ranks have read since the last committed checkpoint
        self._unsaved: list[ReadRange] = []
        self.guard = Guard(job.recipe.guard)
        self.best = BestTracker(job.recipe.validation, lambda: self.manager.committed_paths())
        # a sweep compares trials at the same steps, so theirs are not corrected
        is_corrected = job.estimated_steps and job.reporter is None
        self.plan = StepPlan(job.recipe.steps, self._progress if is_corrected else None)
        self.reader: LaneReader | None = None
        self.manager: CheckpointManager = None  # type: ignore[assignment]

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Restores the state of a checkpoint, and removes later steps from the ledger.

        Args:
            checkpoint: The checkpoint. None: the run starts afresh.

        Returns:
            The step to resume from.

        Raises:
            RunError: The checkpoint belongs to another run.
        """
        if checkpoint is not None and checkpoint.extra["recipe"] not in (
            self._job.identity,
            self._job.parent_identity,
        ):
            raise RunError(
                f"{checkpoint.path}: expected a checkpoint of this run, "
                "found one of another recipe: move it elsewhere"
            )
        step = checkpoint.step if checkpoint else 0
        self._unsaved = []
        if self._rank == 0:
            self._ledger.cut(step)
        if checkpoint is None:
            self._restored = ReaderState()
            self.plan.restore(None)
            return 0
        extra = checkpoint.extra
        if not self.plan.is_exact:
            self.plan.restore(extra.get("steps"))
        self.guard.load(extra["guard"], self.guard.rollbacks)
        self.best.load(extra["best"])
        self._skipped_data += [
            (first, last)
            for first, last in extra["passed"]
            if (first, last) not in self._skipped_data
        ]
        self._restored = ReaderState.from_json(extra["reader"])
        if self._rank == 0:
            self._say(f"resuming from step {step} ({checkpoint.path})")
            self._warn_of_skips(step)
        return step

    def missed_validation(self, checkpoint: Checkpoint | None) -> tuple[bool, float | None]:
        """Finds out whether an earlier start of the run left out the validation of its last step.

        A run that is stopped or killed at a step that is validated may have saved it before the
        validation; and a sweep may have missed the report of it.

        Args:
            checkpoint: The checkpoint that the run resumes from. None: it starts afresh.

        Returns:
            Whether the validation was not made, or its report was missed; and the step's training
            loss, None if it is not known. Both are the same on every rank.
        """
        found: list[tuple[bool, float | None]] = [(False, None)]
        if self._rank == 0 and checkpoint is not None:
            job, step = self._job, checkpoint.step
            logged = logged_metrics(RunFolder(job.folder).log, step)
            loss = logged.get("train/loss", checkpoint.extra.get("loss"))
            if loss is not None and not math.isfinite(loss):
                loss = math.inf
            if job.reporter is not None:
                missed = step > job.reporter.since
            else:
                validated = any(key.startswith("validation/") for key in logged)
                missed = job.validation is not None and not validated
            found = [(missed and is_due(step, job.recipe.validation.every), loss)]
        dist.broadcast_object_list(found)
        return found[0]

    def open_reader(self, step: int) -> LaneReader:
        """Opens a reader at the restored position, without the data that the guard skips.

        An earlier reader is closed.

        Args:
            step: The step to resume from.
        """
        self.close()
        stream = replace(self._job.train, skip=(*self._job.train.skip, *self._skipped_data))
        shard = stream.shard(self._place.rank, self._place.world_size)
        recipe = self._job.recipe
        self.reader = shard.reader(
            recipe.train.global_batch // self._job.train.order.lanes, self._restored, step
        )
        return self.reader

    def _progress(self) -> DataProgress:
        """Returns how much of the data all ranks together have read; every rank calls it."""
        assert self.reader is not None
        done = torch.tensor([self.reader.progress()], dtype=torch.int64, device=self._device)
        dist.all_reduce(done)
        # the ranks of one tensor-parallel group read the same rows
        total = int(done) // self._job.recipe.parallel.tensor
        return DataProgress(total, UNIT * self._job.train.order.lanes, self.reader.state.data_step)

    def close(self) -> None:
        """Closes the reader."""
        if self.reader is not None:
            self.reader.close()

    def skip_last(self, steps: int) -> tuple[int, int]:
        """Skips the data of the last steps from now on, and counts a rollback.

        Args:
            steps: The number of steps.

        Returns:
            The first and the last of the skipped data steps.
        """
        assert self.reader is not None
        last = self.reader.state.data_step
        skipped = (last - steps + 1, last)
        self._skipped_data.append(skipped)
        self.guard.rollbacks += 1
        return skipped

    def collect(self, loss: float | None) -> dict[str, Any]:
        """Gathers the state of all ranks for a checkpoint.

        Every rank calls it, while no save is pending.

        Args:
            loss: The training loss of the step; None if it is not known.

        Returns:
            The checkpoint's `extra`, plain JSON.
        """
        assert self.reader is not None
        parts: list[tuple[ReaderState, list[ReadRange]]] = [
            (ReaderState(), [])
        ] * dist.get_world_size()
        dist.all_gather_object(parts, (self.reader.state, self.reader.take_read_ranges()))
        # the ranks of one tensor-parallel group read the same rows
        parts = parts[:: self._job.recipe.parallel.tensor]
        state = ReaderState.together(
            [reader_state for reader_state, _ in parts], self._restored.skipped
        )
        # if a save has failed, the last committed checkpoint is more than one interval old
        saved = self.manager.last.step if self.manager.last else 0
        self._unsaved = [r for r in self._unsaved if r.step > saved]
        for _, read_ranges in parts:
            self._unsaved += read_ranges
        if self._rank == 0 and state.skipped > self._restored.skipped:
            self._say(f"{state.skipped:,} bad documents skipped so far (data.on_bad_document=skip)")
        is_known = loss is not None and math.isfinite(loss)  # JSON has no infinity
        return self._extra(state) | {"loss": loss if is_known else None}

    def write_ledger(self) -> Callable[[], None]:
        """Returns a function that writes the ledger.

        It writes what was read from the last committed checkpoint until now, and not what is read
        until it is called.
        """
        read_ranges = self._unsaved
        return lambda: self._ledger.write(read_ranges)

    def _extra(self, state: ReaderState) -> dict[str, Any]:
        """Returns the `extra` of a checkpoint.

        Args:
            state: The position in the data, of all ranks.
        """
        job = self._job
        libraries = (sevenfold, torch, transformers, ray)
        return {
            "recipe": job.identity,
            "settings": job.recipe.model_dump(mode="json"),
            "reader": state.to_json(),
            "encoder": {
                "backend": job.train.encoder.backend.name,
                "identity": job.train.encoder.identity(),
            },
            "guard": self.guard.state(),
            "passed": list(self._skipped_data),
            "steps": self.plan.total,
            "best": self.best.state(),
            "versions": {
                "python": python_version(),
                **{library.__name__: library.__version__ for library in libraries},
            },
        }

    def _warn_of_skips(self, step: int) -> None:
        """Warns if data that the recipe skips was trained on before the checkpoint."""
        skip = self._job.recipe.data.skip
        if not skip:
            return
        trained = {r.data_step for r in self._ledger.read(1, step)}
        for first, last in skip:
            if any(first <= data_step <= last for data_step in trained):
                self._say(
                    f"data.skip [{first}, {last}]: this data was trained on before step {step}, "
                    "which this run resumes from: to train without it, remove the checkpoints "
                    "that have been trained on it"
                )
