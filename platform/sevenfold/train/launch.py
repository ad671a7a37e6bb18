"""Pretraining and fine-tuning: starts a run on Ray Train, shows its progress, exports the model."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import sevenfold
from sevenfold import storage
from sevenfold.cluster import capacity, connect, ray_private
from sevenfold.data.manifest import Manifest
from sevenfold.errors import InputError, RunError, StoppedError, cause_of
from sevenfold.prepare.job import Job, prepare_job, required_resources
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.report.console import Progress, print_text, say
from sevenfold.run_folder import RunFolder
from sevenfold.train.signals import run_until_stopped, start_stop_signal

QUIET_SECONDS = 30.0  # time without workers after which the resources waited for are shown


def pretrain(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """Pretrains a model on text; see `run`.

    Raises:
        InputError: The recipe's objective is one of fine-tuning.
    """
    if recipe.objective not in PRETRAINING:
        raise InputError(
            f"{recipe.name}: objective {recipe.objective} is fine-tuning: "
            "run it with jobs/finetune.py"
        )
    return run(recipe, verbose)


def finetune(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """Fine-tunes an exported run or any Hugging Face model directory; see `run`.

    A `sweep` section is ignored: jobs/sweep.py uses it.

    Raises:
        InputError: The recipe's objective is one of pretraining.
    """
    if recipe.objective in PRETRAINING:
        raise InputError(
            f"{recipe.name}: objective {recipe.objective} is pretraining: "
            "run it with jobs/pretrain.py"
        )
    return run(recipe, verbose)


def run(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """Trains a model as a recipe describes, and exports it as a Hugging Face model directory.

    A run that was interrupted is resumed. A run that is finished already is left as it is.

    Args:
        recipe: The recipe.
        verbose: Shows Ray's logs.

    Returns:
        The run's folder.

    Raises:
        InputError: The recipe, its data or its model cannot be used; see `prepare_job`.
        StoppedError: The run was asked to stop, and has saved a checkpoint.
        RunError: The run failed.
    """
    folder = RunFolder(storage.join(storage.resolve_output(recipe.storage), recipe.name))
    start = time.time()
    need = required_resources(recipe)
    job = prepare_job(recipe, folder, need, f"{recipe.name} ({recipe.workers[0]} workers)", verbose)
    if job is None:
        return folder

    def train(job: Job) -> dict[str, Any]:
        # Ray's controller unpickles this function too. With the import in here, it does not have
        # to import all that the workers need.
        from sevenfold.train.worker import Worker

        return Worker(job).run()

    job.stop_signal = start_stop_signal()
    watcher = _Watcher(recipe.name, recipe.steps, need)
    job.queue = watcher.queue
    try:
        report = run_until_stopped(lambda: launch(job, train, folder.ray, "train"), job.stop_signal)
    finally:
        watcher.close()
    finish(job, report, time.time() - start)
    return folder


def launch(
    job: Job, work: Callable[[Job], dict[str, Any]], storage_path: str, name: str
) -> dict[str, Any]:
    """Runs a function on each of Ray Train's workers, and waits for it.

    Args:
        job: The prepared run.
        work: The function; it is called with the job.
        storage_path: The folder in which Ray Train keeps its own state.
        name: The name of that state; the same name resumes it.

    Returns:
        What rank 0 returned.

    Raises:
        StoppedError: The run was asked to stop.
        InputError: A worker found that the input is wrong.
        RunError: The workers failed more often than cluster.max_failures allows, or the function
            reported that the run `ended` early.
    """
    trainer = _build_trainer(job, work, storage_path, name)
    try:
        report = dict(trainer.fit().return_value)
    except ray.train.TrainingFailedError as e:
        for error in getattr(e, "worker_failures", {}).values():
            if isinstance(error, InputError):
                raise error from None
        if "sevenfold.errors." not in str(e):
            # a bug in sevenfold or a fault of the machine: the worker's traceback explains it
            print_text(storage.hide_secrets(str(e)))
        raise RunError(
            f"{job.folder}: training failed: {cause_of(str(e))}; "
            "run the same command again to resume from the last checkpoint"
        ) from e
    if "ended" in report:
        raise (StoppedError if report["stopped"] else RunError)(report["ended"])
    return report


def _build_trainer(
    job: Job, work: Callable[[Job], dict[str, Any]], storage_path: str, name: str
) -> Any:
    """Returns the TorchTrainer that `launch` runs; the arguments are the same."""
    from ray.train.torch import TorchTrainer  # imports torch

    queue = job.queue

    class SendFailures(ray.train.UserCallback):
        """Sends the errors of failed workers to the driver, which shows them."""

        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            if queue is not None:
                queue.actor.put_nowait.remote(
                    {rank: str(error) for rank, error in worker_exceptions.items()}
                )

        def __setstate__(self, state: dict[str, Any]) -> None:
            # Called where Ray Train's controller receives the callback, before it asks for
            # resources: the only code of ours that runs in the controller's process.
            self.__dict__.update(state)
            ray_private.shorten_reservations()
            # restarted workers would find the same input
            ray_private.end_at_once(InputError)

        def __getstate__(self) -> dict[str, Any]:
            return {"queue": queue}  # __setstate__ is not called with an empty state

    settings, torch_config = job.recipe.cluster, None
    if connect.is_local():
        from sevenfold.cluster.loopback import Loopback

        torch_config = Loopback()
    # Ray's controller may fail this often to start the workers: it can take a while until a lost
    # machine is replaced
    max_failed_starts = 3 + math.ceil(settings.wait_seconds / connect.WORKER_START_SECONDS)
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    return TorchTrainer(
        lambda config: work(ray.get(config["job"])),
        train_loop_config={"job": ray.put(job)},
        torch_config=torch_config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            elastic_resize_monitor_interval_s=settings.resize_seconds,
            use_gpu=settings.gpus_per_worker > 0,
            label_selector=settings.worker_labels or None,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            callbacks=[SendFailures()],
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=max_failed_starts
            ),
            logging_config=ray.train.LoggingConfig(log_level="INFO" if job.verbose else "ERROR"),
        ),
    )


class _Watcher:
    """Shows in the driver what the workers send while the run trains.

    While no worker sends anything, it shows which resources the run waits for.

    Args:
        name: The run's name.
        steps: The run's number of steps.
        need: The resources that the run needs.

    Attributes:
        queue: Receives the messages: a sentence, a tuple of step and metrics, or a dict of the
            errors of failed workers by rank.
    """

    def __init__(self, name: str, steps: int, need: dict[str, float]):
        self._need = need
        # on the driver's node: on another one the queue could be lost while the driver lives
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._progress, self._stop = Progress(name, steps), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def _show(self) -> None:
        """Shows messages until the watcher is closed."""
        quiet_since: float | None = time.monotonic()  # None while there are workers
        while True:
            try:
                message = self.queue.get(timeout=0.5)
            except Empty:
                if self._stop.is_set():
                    return
                if quiet_since is not None and time.monotonic() - quiet_since > QUIET_SECONDS:
                    say(f"waiting for workers: {capacity.describe_wait(self._need)}")
                    quiet_since = time.monotonic()
                continue
            except RayActorError:  # the cluster is shutting down, and this process too
                if self._stop.wait(1):
                    return
                continue
            quiet_since = time.monotonic() if isinstance(message, dict) else None
            if isinstance(message, str):
                say(message)
            elif isinstance(message, dict):
                rank, error = min(message.items())
                say(f"{len(message)} workers failed, rank {rank} with: {cause_of(error)}")
            else:
                self._progress.log(*message)

    def close(self) -> None:
        """Shows the messages that have arrived, then stops the thread and the queue."""
        self._stop.set()
        self._thread.join(10)
        self._progress.close()
        self.queue.shutdown(force=True)


def finish(job: Job, metrics: dict[str, Any], seconds: float) -> None:
    """Exports the reported checkpoint, then writes the summary, which marks the run as finished.

    Args:
        job: The run.
        metrics: The run's last report.
        seconds: The time for which this process has worked on the run.
    """
    folder, checkpoint = RunFolder(job.folder), metrics["checkpoint"]
    manifest = job.train.order.manifest
    connect.fetch(_export.remote(job.recipe, checkpoint, job.tokenizer, manifest, metrics, folder))
    summary = {
        "sevenfold": sevenfold.__version__,
        "recipe": job.identity,
        "steps": metrics["step"],
        "tokens": metrics["step"] * job.recipe.tokens_per_step,
        "seconds": round(seconds, 1),
        "checkpoint": checkpoint,
        "model": folder.model,
        "metrics": metrics,
    }
    storage.write_json(folder.summary, summary)


@ray.remote(num_cpus=1)
def _export(
    recipe: Recipe,
    checkpoint: str,
    tokenizer: str,
    manifest: Manifest,
    metrics: dict[str, Any],
    folder: RunFolder,
) -> None:
    """Exports a checkpoint into a run's folder, in a Ray task."""
    from sevenfold.engine.checkpoint import verified_checkpoint
    from sevenfold.export.hugging_face import export

    export(
        recipe,
        verified_checkpoint(checkpoint),
        tokenizer,
        manifest,
        metrics,
        folder.model,
        folder.adapter,
    )
