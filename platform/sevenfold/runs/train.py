"""What pretraining and fine-tuning share: a prepared run on Ray Train, watched and finished."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import sevenfold
from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.errors import RunError
from sevenfold.recipe import Recipe
from sevenfold.report.console import Progress, say
from sevenfold.runs import cluster, prepare
from sevenfold.runs.prepare import Job
from sevenfold.storage import RunFolder

LONG = 30.0  # seconds without workers after which it is said what is missing
GRACE = 50  # seconds that a run has to save and end when it is asked to; `ray job stop` waits a minute


def launch(job: Job, work: Callable[[Job], dict[str, Any]], storage_path: str, name: str) -> dict[str, Any]:
    """Has each of Ray Train's workers do the work. Returns what rank 0's returned.

    Args:
        storage_path, name: where Ray Train keeps its own state of it.

    Raises:
        RunError: the workers failed more often than cluster.max_failures allows, or the work tells why it `ended` early.
    """
    from ray.train.torch import TorchTrainer  # brings torch

    queue = job.queue

    class Told(ray.train.UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if queue is not None:
                queue.actor.put_nowait.remote({rank: str(error) for rank, error in worker_exceptions.items()})

    c, alone = job.recipe.cluster, cluster.alone()
    if alone:
        from sevenfold.runs.loopback import Loopback
    starts = 3 + math.ceil(c.wait_seconds / cluster.START)  # a machine that was lost may take a while to be replaced
    trainer = TorchTrainer(
        lambda config: work(ray.get(config["job"])),
        train_loop_config={"job": ray.put(job)}, torch_config=Loopback() if alone else None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=c.num_workers, elastic_resize_monitor_interval_s=c.resize_seconds, use_gpu=c.gpus_per_worker > 0,
            label_selector=c.worker_labels or None,
            resources_per_worker={"CPU": c.cpus_per_worker, **({"GPU": c.gpus_per_worker} if c.gpus_per_worker else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name, storage_path=storage_path, callbacks=[Told()],
            failure_config=ray.train.FailureConfig(max_failures=c.max_failures, controller_failure_limit=starts),
            logging_config=ray.train.LoggingConfig(log_level="INFO" if job.verbose else "ERROR"),
        ),
    )  # fmt: skip
    try:
        reported = dict(trainer.fit().return_value)
    except ray.train.TrainingFailedError as e:
        if "sevenfold.errors." not in str(e):
            say(str(e))  # a bug of ours or a fault of the machine: the worker's traceback tells
        raise RunError(f"{job.folder}: training failed: {_cause(str(e))}; resubmit to go on from the last checkpoint") from e
    if "ended" in reported:
        raise RunError(reported["ended"])
    return reported


def _cause(error: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no word of why")
    return found.partition("sevenfold.errors.")[2].partition(": ")[2] or found


class Bell:
    """An actor: tells a run's workers that it is to end. They listen from their first step on: before it they have nothing to
    save that is not saved, and may be a minute from being able to."""

    def __init__(self) -> None:
        self._rung, self._listeners = asyncio.Event(), 0

    async def rung(self) -> None:
        """Returns when it is rung."""
        self._listeners += 1
        await self._rung.wait()

    async def deaf(self) -> None:
        """To whoever starts anew."""
        self._listeners = 0

    async def ring(self) -> bool:
        """Whether anybody listens, who saves and ends then."""
        self._rung.set()
        return self._listeners > 0


def _until_asked(work: Callable[[], dict[str, Any]], bell: Any) -> dict[str, Any]:
    """Does the work beside this thread. Ctrl-C or SIGTERM interrupts it: then the workers save, and end; or where they have not
    done a step yet, it ends at once. Raises as `work`."""
    doing: Future[dict[str, Any]] = Future()

    def do() -> None:
        try:
            doing.set_result(work())
        except BaseException as e:
            doing.set_exception(e)

    threading.Thread(target=do, daemon=True).start()
    try:
        return doing.result()
    except KeyboardInterrupt:
        if doing.done() or not ray.get(bell.ring.remote()):
            raise
        say("asked to end: saving the step under way; asked again, it ends at once")
        wait([doing], timeout=GRACE)
        if not doing.done():
            raise
        return doing.result()


class _Watcher:
    """Shows what rank 0 sends while fit() blocks."""

    def __init__(self, name: str, steps: int, need: dict[str, float]):
        """need: of the run; what is missing is told while no worker speaks."""
        self._need = need
        # beside the driver: with any other node it might be lost
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._progress, self._stop = Progress(name, steps), threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def _show(self) -> None:
        alone: float | None = time.monotonic()  # since when there are no workers
        while True:
            try:
                item = self.queue.get(timeout=0.5)
            except Empty:
                if self._stop.is_set():
                    return
                if alone is not None and time.monotonic() - alone > LONG:
                    say(f"waiting for workers: {cluster.awaited(self._need)}")
                    alone = time.monotonic()
                continue
            except RayActorError:  # the cluster is about to end, and this process with it
                if self._stop.wait(1):
                    return
                continue
            alone = time.monotonic() if isinstance(item, dict) else None
            if isinstance(item, str):
                say(item)
            elif isinstance(item, dict):
                rank, why = min(item.items())
                say(f"{len(item)} workers failed, rank {rank} by: {_cause(why)}")
            else:
                self._progress.log(*item)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self._progress.close()
        self.queue.shutdown(force=True)


def run(recipe: Recipe, verbose: bool = False) -> RunFolder:
    """Trains, resumes or finds finished what the recipe names; ends with a Hugging Face directory.

    Raises:
        InputError, RunError: see prepare.begin.
        RunError: the run failed.
    """
    folder = RunFolder(storage.join(storage.place(recipe.storage), recipe.name))
    began = time.time()
    what = f"{recipe.name} ({recipe.workers[0]} workers)"
    job = prepare.begin(recipe, folder, prepare.needs(recipe), what, verbose)
    if job is None:
        return folder

    def train(job: Job) -> dict[str, Any]:
        """In here, so that Ray's controller, which unpickles it too, does not import all that the workers need."""
        from sevenfold.runs.worker import Worker

        return Worker(job).run()

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    bell: Any = ray.remote(num_cpus=0, scheduling_strategy=here, max_concurrency=100)(Bell)
    job.bell = bell.remote()
    watcher = _Watcher(recipe.name, recipe.steps, prepare.needs(recipe))
    job.queue = watcher.queue
    try:
        reported = _until_asked(lambda: launch(job, train, folder.ray, "train"), job.bell)
    finally:
        watcher.close()
    finish(job, reported, time.time() - began)
    return folder


def finish(job: Job, metrics: dict[str, Any], seconds: float) -> None:
    """Exports the reported checkpoint and writes the summary, which is what says that a run is finished."""
    folder, checkpoint = RunFolder(job.folder), metrics["checkpoint"]
    cluster.fetch(_export.remote(job.recipe, checkpoint, job.tokenizer, job.train.plan.manifest, metrics, folder))
    summary = {
        "sevenfold": sevenfold.__version__, "recipe": job.identity, "steps": metrics["step"],
        "tokens": metrics["step"] * job.recipe.tokens_per_step, "seconds": round(seconds, 1), "checkpoint": checkpoint,
        "model": folder.model, "metrics": metrics,
    }  # fmt: skip
    storage.write(folder.summary, json.dumps(summary, indent=1))


@ray.remote(num_cpus=1)
def _export(
    recipe: Recipe, checkpoint: str, tokenizer: str, manifest: Manifest, metrics: dict[str, Any], to: RunFolder
) -> None:
    from sevenfold.engine import checkpoint as ckpt
    from sevenfold.model.export import export

    export(recipe, ckpt.verified(checkpoint), tokenizer, manifest, metrics, to.model, to.adapter)
