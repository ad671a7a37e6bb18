"""The faults of a drill, injected into a job that is running."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from sevenfold import storage
from sevenfold.engine.checkpoint import checkpoint_paths
from sevenfold.errors import RunError
from sevenfold.faults.nodes import LocalNodes, Nodes
from sevenfold.run_folder import RunFolder

PATIENCE = 300.0  # seconds without a line of output after which a job counts as hung
NOTICE = 15  # seconds from a preemption notice to the node's end; spot machines get 30 to 120
PAUSE = 5.0  # seconds for which a slow worker is stopped

_WORKERS_FAILED = re.compile(r" workers? failed, rank ")


class Run:
    """A job in a process of its own, whose output is read line by line.

    Attributes:
        steps: (time, step) of each step that was logged.
        resumed: (time, step) of each time that it resumed from a checkpoint.
        failed: The time of each failure of its workers.
        lines: The output so far, each line with its time in front.
        process: The process of the job.
    """

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | None = None
    ):
        """Starts the job.

        Args:
            words: The command and its arguments.
            env: Environment variables to add to those of this process.
            cwd: The folder to run it in.
        """
        self.steps: list[tuple[float, int]] = []
        self.resumed: list[tuple[float, int]] = []
        self.failed: list[float] = []
        self.lines: list[str] = []
        self._last_output = time.monotonic()
        self.process = subprocess.Popen(
            words,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Reads the output; recognizes the lines that train/ and report/console.py print."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            now = self._last_output = time.monotonic()
            self.lines.append(f"{now:.1f} {line.rstrip()}")
            if ": step " in line:
                self.steps.append((now, int(line.split(": step ")[1].split("/")[0])))
            elif line.startswith("resuming from step "):
                self.resumed.append((now, int(line.split()[3])))
            elif _WORKERS_FAILED.search(line):
                self.failed.append(now)

    @property
    def history(self) -> tuple[list[Any], ...]:
        """All lists of what has happened so far, each in the order of time."""
        return self.steps, self.resumed, self.failed, self.lines

    @property
    def step(self) -> int:
        """The last step since the job started, failed or resumed; 0 before the first one."""
        steps = list(self.steps)
        since = max([0.0, *self.failed, *(when for when, _ in self.resumed)])
        return steps[-1][1] if steps and steps[-1][0] > since else 0

    def wait_for_step(self, step: int) -> None:
        """Waits until the job has logged this step or a later one.

        Raises:
            RunError: The job has ended before, or has printed nothing for PATIENCE seconds.
        """
        while self.step < step:
            if self.process.poll() is not None or self._hangs():
                raise RunError(f"step {step} was not reached: {self.last_lines()}")
            time.sleep(0.01)

    def wait(self) -> int:
        """Waits for the job's end and returns its exit code; kills it if it hangs."""
        while self.process.poll() is None:
            if self._hangs():
                self.kill()
            time.sleep(0.05)
        self._reader.join(10)
        return self.process.returncode

    def kill(self) -> None:
        """Sends SIGKILL to the job itself; Ray ends the processes that it started on a cluster."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)

    def last_lines(self) -> str:
        """Returns the last three lines of output, for messages."""
        return " | ".join(self.lines[-3:]) or "it printed nothing"

    def _hangs(self) -> bool:
        return time.monotonic() - self._last_output > PATIENCE


@dataclass
class Scene:
    """A running job that a fault is injected into.

    Attributes:
        nodes: The nodes that it runs on.
        folder: Its run folder.
        start: Starts the job; called again, it starts the same command again.
        rng: Draws what the fault strikes.
        run: The job.
    """

    nodes: Nodes
    folder: RunFolder
    start: Callable[[], Run]
    rng: random.Random
    run: Run = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.start()

    def resubmit(self) -> None:
        """Starts the job again; its history continues."""
        previous = self.run
        self.run = self.start()
        for events, earlier in zip(self.run.history, previous.history, strict=True):
            events[:0] = earlier

    def workers(self) -> list[dict[str, Any]]:
        """Returns the rank, node, host and pid of each worker."""
        return storage.read_json(self.folder.workers, list)

    def random_worker(self) -> dict[str, Any]:
        """Draws one of the workers."""
        return self.rng.choice(self.workers())

    def random_node(self) -> str:
        """Draws the id of a node that has a worker and may be ended.

        Raises:
            RunError: There is no such node.
        """
        node_ids = sorted({worker["node"] for worker in self.workers()} - self.nodes.protected)
        if not node_ids:
            raise RunError(
                "all workers are on the head or on the node of the drill itself, which are not "
                "ended"
            )
        return str(self.rng.choice(node_ids))

    def committed(self) -> dict[int, str]:
        """Returns the path of each committed checkpoint by step, oldest first."""
        return checkpoint_paths(self.folder.checkpoints)


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and what that requires.

    Attributes:
        description: For tables and messages.
        inject: Injects the fault into a running job.
        loses_node: A node is lost: the others must have room for its workers.
        local: Needs nodes that can be added and removed, as those of a local cluster.
        elastic: The number of workers changes: losses agree up to rounding, not bitwise.
        spare_nodes: The number of nodes of a local cluster beyond one per worker.
        damages: The latest checkpoint is damaged, so that its steps are lost on purpose.
        bears: The run survives the fault and need not resume from a checkpoint.
        storage: Where the run's folder is, if not at the recipe's storage.
    """

    description: str
    inject: Callable[[Scene], None]
    loses_node: bool = False
    local: bool = False
    elastic: bool = False
    spare_nodes: int = 1
    damages: bool = False
    bears: bool = False
    storage: str | None = None


def _kill_worker(scene: Scene) -> None:
    worker = scene.random_worker()
    agent = scene.nodes.agent(worker["node"])
    ray.get(agent.signal.remote(worker["pid"], signal.SIGKILL))


def _pause_worker(scene: Scene) -> None:
    worker = scene.random_worker()
    agent = scene.nodes.agent(worker["node"])
    ray.get(agent.pause.remote(worker["pid"], PAUSE))


def _kill_driver(scene: Scene) -> None:
    scene.run.kill()
    scene.resubmit()


def _kill_node(scene: Scene) -> None:
    scene.nodes.kill_node(scene.random_node())


def _freeze_node(scene: Scene) -> None:
    scene.nodes.freeze(scene.random_node())


def _preempt_node(scene: Scene) -> None:
    node_id = scene.random_node()
    scene.nodes.agent(node_id)  # Ray starts no new actor on a node that is being drained
    scene.nodes.drain(node_id, NOTICE)
    time.sleep(NOTICE)
    scene.nodes.kill_node(node_id)


def _add_node(scene: Scene) -> None:
    assert isinstance(scene.nodes, LocalNodes)
    scene.nodes.set_count(len(scene.workers()) + 1)


def _kill_head(scene: Scene) -> None:
    assert isinstance(scene.nodes, LocalNodes)
    scene.nodes.kill_head()
    scene.run.wait()
    scene.nodes.restart()
    scene.resubmit()


def _damage_checkpoint(kind: str) -> Callable[[Scene], None]:
    """Returns a fault that kills the job, damages its latest checkpoint and starts it again."""

    def inject(scene: Scene) -> None:
        workers = [(worker["pid"], scene.nodes.agent(worker["node"])) for worker in scene.workers()]
        scene.run.kill()
        # the workers may still be saving a checkpoint until they have ended
        ray.get([agent.wait_for_end.remote(pid) for pid, agent in workers])
        previous, latest = list(scene.committed().values())[-2:]
        damage(latest, kind, scene.rng, previous)
        scene.resubmit()

    return inject


DAMAGES = ("flip", "cut", "grow", "zeros", "delete", "swap", "mix")


def damage(at: str, kind: str, rng: random.Random, before: str) -> str:
    """Damages a random file of a checkpoint.

    Args:
        at: The checkpoint's folder.
        kind: One of DAMAGES.
        rng: Draws the file and the place in it.
        before: Another checkpoint of the run, from which `mix` takes the file.

    Returns:
        A description of the damage.
    """
    names = storage.listdir(at)
    candidates = storage.listdir(before) if kind == "mix" else names
    name = rng.choice([n for n in names if n in candidates])
    path = storage.join(at, name)
    raw = bytearray(_read_bytes(path))
    match kind:
        case "flip":
            bit = rng.randrange(8 * len(raw))
            raw[bit // 8] ^= 1 << bit % 8
        case "cut":
            del raw[rng.randrange(len(raw)) :]
        case "grow":
            raw += rng.randbytes(rng.randint(1, 100))
        case "zeros":
            start = rng.randrange(len(raw))
            stop = min(len(raw), start + rng.randint(1, 4096))
            # bytes that are zero already would not change
            filler = b"\0" if any(raw[start:stop]) else b"\1"
            raw[start:stop] = filler * (stop - start)
        case "delete":
            storage.remove(path)
            return f"{name}: deleted"
        case "swap":
            other = rng.choice([n for n in names if n != name])
            other_raw = _read_bytes(storage.join(at, other))
            storage.write(storage.join(at, other), bytes(raw))
            storage.write(path, other_raw)
            return f"{name}: swapped with {other}"
        case "mix":
            raw = bytearray(_read_bytes(storage.join(before, name)))
    storage.write(path, bytes(raw))
    return f"{name}: {kind}"


def _read_bytes(path: str) -> bytes:
    with storage.open_read(path) as f:
        return f.read()


FAULTS: dict[str, Fault] = {
    "worker": Fault("SIGKILL of a worker", _kill_worker),
    "slow": Fault(f"a worker is stopped for {PAUSE:.0f} s", _pause_worker, bears=True),
    "driver": Fault("SIGKILL of the driver, resubmitted", _kill_driver),
    "node": Fault("SIGKILL of a raylet", _kill_node, loses_node=True),
    "power": Fault("a node stops responding", _freeze_node, loses_node=True),
    "notice": Fault(
        f"a spot node is preempted with {NOTICE} s notice", _preempt_node, loses_node=True
    ),
    "head": Fault("the head is lost, resubmitted to a new cluster", _kill_head, local=True),
    "flip": Fault("latest checkpoint: a bit flipped", _damage_checkpoint("flip"), damages=True),
    "cut": Fault("latest checkpoint: a file truncated", _damage_checkpoint("cut"), damages=True),
    "delete": Fault(
        "latest checkpoint: a file deleted", _damage_checkpoint("delete"), damages=True
    ),
    "mix": Fault(
        "latest checkpoint: a file from the previous one", _damage_checkpoint("mix"), damages=True
    ),
    "leave": Fault(
        "a node leaves, the run shrinks", _kill_node, local=True, elastic=True, spare_nodes=0
    ),
    "join": Fault(
        "a node joins, the run grows", _add_node, local=True, elastic=True, spare_nodes=-1
    ),
}
