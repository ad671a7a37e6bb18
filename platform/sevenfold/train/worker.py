"""What each Ray Train worker runs: it connects the model, the data and the training loop."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util import get_node_ip_address

from sevenfold import storage
from sevenfold.cluster import connect
from sevenfold.data.lanes import max_rows_per_rank
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.engine import cpu, loop, optim
from sevenfold.engine.checkpoint import (
    Checkpoint,
    CheckpointManager,
    TakenOverError,
    latest_checkpoint,
    load_checkpoint,
)
from sevenfold.engine.checkpoint.best import UnknownMetricError
from sevenfold.engine.checkpoint.interval import Interval
from sevenfold.engine.guard import DIVERGENCE_ADVICE, describe_divergence
from sevenfold.engine.meter import Meter
from sevenfold.engine.objectives import (
    Objective,
    Preference,
    attach_losses,
    build_objective,
)
from sevenfold.engine.signals import Signal
from sevenfold.errors import DivergedError, InputError, RunError, StoppedError
from sevenfold.model import build, parallel
from sevenfold.prepare.encoder import set_first_token
from sevenfold.prepare.job import Job
from sevenfold.report.run_log import RunLog
from sevenfold.run_folder import RunFolder
from sevenfold.train.messages import describe_moved, pluralize
from sevenfold.train.resume import RunState
from sevenfold.train.signals import SignalReceiver
from sevenfold.train.validate import Validator

log = logging.getLogger(__name__)

TAKEN_OVER = "{}: this run was started again and continues there; these workers stop"


class Worker:
    """One rank of a training run.

    Attributes:
        job: The run.
        recipe: The run's recipe.
        folder: The run's folder.
        rank: This worker's rank, from 0.
        world: The number of ranks.
        place: This rank's place among the ranks that read data.
        device: The device that this rank trains on.
        tokenizer: The run's tokenizer.
        state: What checkpoints store besides weights and optimizers.
        signals: Receives requests to the run.
        last_report: The last metrics that were reported, with step and checkpoint.
        ranks: What this start of the run wrote to workers.json: the process and node of each rank.
        run_log: Writes metrics.jsonl and TensorBoard's files; None on all ranks but rank 0.
        taken_over: Whether rank 0 has found that a later start of the run owns the folder.
    """

    def __init__(self, job: Job):
        if not job.verbose:
            connect.quieten()
        context = ray.train.get_context()
        self.job, self.recipe, self.folder = job, job.recipe, RunFolder(job.folder)
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.data_rank = parallel.DataRank.from_rank(
            self.rank, self.world, self.recipe.parallel.tensor
        )
        self.device = ray.train.torch.get_device()
        cpu.prepare(
            threads=max(1, min(int(self.recipe.cluster.cpus_per_worker), os.cpu_count() or 1))
        )
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.state = RunState(job, self.data_rank, self.rank, self.device, self._send)
        self.signals = SignalReceiver(job, self.rank)
        self.last_report: dict[str, Any] = {}
        self.ranks: list[dict[str, Any]] = []
        self.run_log: RunLog | None = None
        self.taken_over = False

    def run(self) -> dict[str, Any]:
        """Trains until the run ends.

        Returns:
            The last report: metrics, step and checkpoint. If the run ended early, this is instead
            `ended`, a sentence with the reason, and `stopped`, whether it was asked to stop.
        """
        # first, since afterwards no earlier start of this run writes into its folder any more
        self._announce()
        checkpoint = self._latest_checkpoint()
        start = self.state.restore(checkpoint)
        self.state.open_reader(start)  # Ray Data starts while the model is built
        try:
            self._train(start, checkpoint)
        except (TakenOverError, UnknownMetricError, DivergedError, StoppedError) as e:
            # returned and not raised: on an exception, Ray would restart the workers
            self.last_report = {"ended": str(e), "stopped": isinstance(e, StoppedError)}
            if self.taken_over or isinstance(e, TakenOverError):
                self.last_report = {"ended": TAKEN_OVER.format(self.folder.root), "stopped": False}
                if self.run_log:  # the later start of this run writes these files now
                    self.run_log.abandon()
                self.run_log = None
        finally:
            self.state.close()
            if self.run_log:
                self.run_log.close()
        return self.last_report

    def _train(self, start: int, checkpoint: Checkpoint | None) -> None:
        """Builds what the training loop needs, and trains.

        Args:
            start: The step to start or resume from.
            checkpoint: The checkpoint of that step, None for a fresh start.
        """
        recipe, state = self.recipe, self.state
        self.objective, self.model, flops_per_token = self._build_model()
        self.optimizers = optim.build(self.model, recipe.optimizer)
        if checkpoint is not None:
            moved = load_checkpoint(checkpoint, self.model, self.optimizers)
            if moved:
                self._say(describe_moved(moved))
        self.manager = state.manager = CheckpointManager(
            self.folder.checkpoints,
            keep=recipe.checkpoint.keep,
            keep_every=recipe.checkpoint.keep_every,
            say=self._send,
            last=checkpoint,
            run=self.job.identity,
        )
        self.interval = Interval(recipe.checkpoint, self.world, start, self.manager, self._say)
        self.validator = Validator(
            self.job, self.model, self.objective, self.tokenizer, self.data_rank, self.device
        )
        if self.rank == 0:
            self.run_log = RunLog(self.folder, start, self._send)
        self.trainer = self._build_trainer(flops_per_token)
        missed, self.trainer.loss = state.missed_validation(checkpoint)
        hooks = loop.Hooks(
            signal=self._receive_signal,
            roll_back=self._roll_back,
            log=self._log,
            say=self._say,
            save=self._save,
            wait_for_save=self._wait_for_save,
            validate=self._validate,
            report=self._report,
        )
        try:
            last_step = loop.fit(self.trainer, hooks, start, missed=missed)
            saved = self.manager.wait()
            if not state.best.exhausted and (saved is None or saved.step < last_step):
                raise RunError(
                    f"the checkpoint of the last step ({last_step}) could not be written: "
                    "free some space, then run the same command again"
                )
            self.last_report |= self._best() or {"checkpoint": saved.path if saved else None}
        finally:
            self.manager.close()

    def _build_trainer(self, flops_per_token: float) -> loop.Trainer:
        """Returns what takes the training steps."""
        recipe, state = self.recipe, self.state
        peak = recipe.cluster.peak_tflops * 1e12 if recipe.cluster.peak_tflops else None
        return loop.Trainer(
            recipe=recipe,
            plan=state.plan,
            model=self.model,
            optimizers=self.optimizers,
            objective=self.objective,
            # not state.reader itself, since a rollback replaces it
            rows=iter(lambda: next(state.reader), None),  # type: ignore[arg-type]
            rows_per_rank=max_rows_per_rank(
                recipe.train.global_batch, self.data_rank.world_size, self.job.train.order.lanes
            ),
            device=self.device,
            meter=Meter(flops_per_token, peak, self.world, self.device),
            guard=state.guard,
            interval=self.interval,
            best=state.best,
        )

    def _build_model(self) -> tuple[Objective, Any, float]:
        """Returns the objective, the model sharded over the ranks, and the FLOPs per token."""
        recipe = self.recipe
        config = build.config_of(recipe, len(self.tokenizer), self.tokenizer)
        kernel = build.choose_attention(recipe, self.device, config)
        model = build.build(recipe, config, weights=self.rank == 0, attention=kernel)
        set_first_token(model, self.job.train.encoder)
        if recipe.adapter is not None:
            build.with_adapter(model, recipe)
        train = recipe.train
        objective = build_objective(recipe, self.tokenizer, config, self.job.support)
        if isinstance(objective, Preference) and recipe.adapter is None:
            objective.reference = self._build_reference(config, objective)
        attach_losses(model, objective, train.loss_chunk, train.z_loss, train.label_smoothing)
        flops = build.flops_per_token(model, recipe)
        return objective, parallel.shard(model, self.device, recipe.train, recipe.parallel), flops

    def _build_reference(self, config: Any, objective: Preference) -> Any:
        """Returns the reference model of DPO, frozen and sharded over the ranks.

        It is the model that the run started from.
        """
        recipe = self.recipe
        kernel = build.choose_attention(recipe, self.device, config)
        model = build.build(recipe, config, weights=self.rank == 0, attention=kernel)
        attach_losses(model, objective.reference_objective(), recipe.train.loss_chunk)
        settings = recipe.train.model_copy(update={"activation_checkpointing": "none"})
        return parallel.shard(
            model.requires_grad_(False), self.device, settings, recipe.parallel
        ).eval()

    def _announce(self) -> None:
        """Writes the process and node of each rank to workers.json.

        The start of the run that wrote this file last owns the run's folder.
        """
        context = ray.get_runtime_context()
        own = {
            "rank": self.rank,
            "node": context.get_node_id(),
            "host": get_node_ip_address(),
            "pid": os.getpid(),
        }
        self.ranks = [own] * self.world
        torch.distributed.all_gather_object(self.ranks, own)
        if self.rank == 0:
            storage.write(self.folder.workers, json.dumps(self.ranks, indent=1))
            if self.job.queue is not None:
                machines = len({rank["node"] for rank in self.ranks})
                workers = pluralize(self.world, "worker")
                self._send(f"training with {workers} on {pluralize(machines, 'machine')}")

    def _latest_checkpoint(self) -> Checkpoint | None:
        """Returns the latest valid checkpoint, the same one on every rank."""
        return latest_checkpoint(self.folder.checkpoints, self._send)

    # hooks of the training loop, see loop.Hooks

    def _receive_signal(self) -> Signal:
        return Signal.ABANDON if self.taken_over else self.signals.receive(self.manager)

    def _roll_back(self, step: int, steps: int) -> int:
        """Loads the latest checkpoint, and skips the data of the last steps from now on.

        Args:
            step: The number of steps done.
            steps: The number of last steps whose data is skipped.

        Returns:
            The step of the checkpoint.

        Raises:
            DivergedError: There is no checkpoint.
        """
        self.manager.wait()
        first, last = self.state.skip_last(steps)
        checkpoint = self._latest_checkpoint()
        if checkpoint is None:
            raise DivergedError(
                describe_divergence(steps, step)
                + f", and there is no checkpoint to roll back to: {DIVERGENCE_ADVICE}"
            )
        self.state.close()
        self.manager.resume_from(checkpoint)
        start = self.state.restore(checkpoint)
        load_checkpoint(checkpoint, self.model, self.optimizers)
        self.state.guard.skipped_in_a_row = 0
        self.state.open_reader(start)
        if self.rank == 0:
            assert self.run_log is not None
            self.run_log.close()
            self.run_log = RunLog(self.folder, start, self._send)
            self._send(f"data steps {first} to {last} are skipped from now on")
        return start

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of a step, after warnings about bad documents."""
        assert self.state.reader is not None
        while self.state.reader.bad_documents:
            bad = self.state.reader.bad_documents.pop()
            documents = pluralize(bad.count, "bad document")
            self._send(f"skipped {documents} of a chunk; the first: {bad.first}")
        if self.run_log is None:
            return
        # files at a URL are written by saves only, which check this too
        if not storage.is_url(self.folder.root):
            with contextlib.suppress(InputError, RunError):  # of a disk that does not answer
                self.taken_over = not self._owns_folder()
        if self.taken_over:
            return
        self.run_log.add(step, metrics)
        self._send((step, metrics))

    def _save(self, step: int) -> None:
        """Starts to save a checkpoint after a step."""
        with self.interval.saving(step):
            extra = self.state.collect(self.trainer.loss)
            best = self.state.best
            # the checkpoint that was last reported to a sweep may be that of the previous best
            # validation
            pinned = (best.best, best.previous if self.job.reporter else None)
            self.manager.pinned_steps = [validation.step for validation in pinned if validation]
            write_ledger = self.state.write_ledger()

            def before_commit() -> None:
                self._check_owner()
                write_ledger()
                assert self.run_log is not None
                self.run_log.flush()

            self.manager.save(step, self.model, self.optimizers, extra, before_commit)

    def _check_owner(self) -> None:
        """Checks that no later start of the run owns its folder.

        There can be one if, for example, these workers have lost the connection to their driver and
        the user has started the run again.

        Raises:
            TakenOverError: There is a later start.
        """
        if not self._owns_folder():
            raise TakenOverError(TAKEN_OVER.format(self.folder.root))

    def _owns_folder(self) -> bool:
        return bool(storage.read_json(self.folder.workers) == self.ranks)

    def _wait_for_save(self) -> None:
        self.manager.wait()
        self.signals.restart_clock()

    def _validate(self, step: int, between: Callable[[], None]) -> dict[str, float]:
        """Validates after a step, logs the metrics and returns them; see loop.Hooks."""

        def show(name: str, text: str) -> None:
            if self.run_log is not None:
                self.run_log.text(name, text, step)

        metrics = self.validator(show, between)
        if metrics:
            self._log(step, metrics)
            if self.run_log is not None:
                # the checkpoint of this step may have flushed the log before these metrics
                self.run_log.flush()
        return metrics

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        """Reports the metrics of a validation to Ray Train, or to the sweep."""
        reporter = self.job.reporter
        saved = self.manager.wait() if reporter is not None else self.manager.last
        self.last_report = {"step": step, "checkpoint": saved.path if saved else None, **metrics}
        if reporter is None:
            ray.train.report(self.last_report)
            return
        self.last_report |= self._best()
        if self.rank == 0:
            reporter.report(self.recipe, self.folder, self.last_report)

    def _best(self) -> dict[str, Any]:
        """Returns metrics, step and checkpoint of the best validation that has a checkpoint.

        The result is empty if the recipe does not ask to keep the best one, or if there is none.
        """
        if not self.state.best.enabled:
            return {}
        paths = self.manager.committed_paths()
        self.state.best.forget_uncommitted(paths)
        best = self.state.best.best
        if best is None:
            return {}
        return {**best.metrics, "best_step": best.step, "checkpoint": paths[best.step]}

    # messages

    def _say(self, sentence: str) -> None:
        """Shows a sentence to the user; called on every rank."""
        if self.rank == 0:
            self._send(sentence)

    def _send(self, message: str | tuple[int, dict[str, float]]) -> None:
        """Sends a sentence, or a step and its metrics, to the driver."""
        if self.job.queue is not None:
            # the result is not awaited, so that a step does not wait for the driver
            self.job.queue.actor.put_nowait.remote(message)
        elif isinstance(message, str):
            log.warning(message)
