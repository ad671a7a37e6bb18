"""Faults, done for real to a run under way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from sevenfold import storage
from sevenfold.engine import checkpoint as ckpt
from sevenfold.errors import RunError
from sevenfold.runs.nodes import LocalNodes, Nodes
from sevenfold.storage import RunFolder

PATIENCE = 300.0  # seconds in which a run has to say something
NOTICE = 15  # seconds between a notice and the machine's end; spot machines give 30 to 120
PAUSE = 5.0  # seconds of a slow worker


class Run:
    """A job in a process of its own, watched line by line.

    Attributes:
        steps: (time, step) of each step that was logged.
        resumed: (time, step) of each time it went on from a checkpoint.
        failed: the time of each failure of its workers.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | None = None):
        self.steps: list[tuple[float, int]] = []
        self.resumed: list[tuple[float, int]] = []
        self.failed: list[float] = []
        self.lines: list[str] = []
        self._heard = time.monotonic()
        self.process = subprocess.Popen(
            words, env={**os.environ, **(env or {})}, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._heard = time.monotonic()
            self.lines.append(f"{self._heard:.1f} {line.rstrip()}")
            if ": step " in line:
                self.steps.append((self._heard, int(line.split(": step ")[1].split("/")[0])))
            elif line.startswith("going on from step "):
                self.resumed.append((self._heard, int(line.split()[4])))
            elif " workers failed, rank " in line:
                self.failed.append(self._heard)

    @property
    def story(self) -> tuple[list[Any], ...]:
        return self.steps, self.resumed, self.failed, self.lines

    @property
    def step(self) -> int:
        """The last one since it went on, or failed, or began; 0 before the first."""
        steps, since = list(self.steps), max([0.0, *self.failed, *(t for t, _ in self.resumed)])
        return steps[-1][1] if steps and steps[-1][0] > since else 0

    def reach(self, step: int) -> None:
        """Returns when a step ends that is not below. Raises RunError where the run ends before, or says nothing any more."""
        while self.step < step:
            if self.process.poll() is not None or time.monotonic() - self._heard > PATIENCE:
                raise RunError(f"step {step} was not reached: {self.told()}")
            time.sleep(0.01)

    def end(self) -> int:
        """Its exit code; it is killed where it says nothing any more."""
        while self.process.poll() is None:
            if time.monotonic() - self._heard > PATIENCE:
                self.kill()
            time.sleep(0.05)
        self._reading.join(10)
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL to the job itself; what it started on a cluster is the cluster's to end."""
        self.process.kill()
        self.process.wait()
        self._reading.join(10)

    def told(self) -> str:
        """Its last words."""
        return " | ".join(self.lines[-3:]) or "it said nothing"


@dataclass
class Scene:
    """A run under way that a fault is done to. start: the same command again."""

    nodes: Nodes
    folder: RunFolder
    start: Callable[[], Run]
    rng: random.Random
    run: Run = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.start()

    def resubmit(self) -> None:
        """The run goes on, and so does its story."""
        before = self.run
        self.run = self.start()
        for now, then in zip(self.run.story, before.story, strict=True):
            now[:0] = then

    def workers(self) -> list[dict[str, Any]]:
        """Rank, node, host and pid of each."""
        return list(storage.read_json(self.folder.workers))

    def victim(self) -> dict[str, Any]:
        """One of the workers."""
        return self.rng.choice(self.workers())

    def node(self) -> str:
        """The id of a worker's node that can be lost. Raises RunError where there is none."""
        found = sorted({w["node"] for w in self.workers()} - self.nodes.kept)
        if not found:
            raise RunError("all its workers are on the head, or where this drill runs, and those nodes are not ended")
        return str(self.rng.choice(found))

    def committed(self) -> dict[int, str]:
        """Step -> path of the committed checkpoints, oldest first."""
        return ckpt.steps(self.folder.checkpoints)


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and what it takes.

    Attributes:
        node: a node goes, so that there must be room on the others.
        local: needs nodes that can be added and left out, as a drill's own are.
        elastic: the number of workers changes: losses agree to rounding, not to the bit.
        spares: nodes beside one a worker, of a drill's own.
        damages: the newest checkpoint is lost on purpose.
        bears: the run bears it, and need not start anew.
        storage: where its run is kept, if not where the others are.
    """

    about: str
    do: Callable[[Scene], None]
    node: bool = False
    local: bool = False
    elastic: bool = False
    spares: int = 1
    damages: bool = False
    bears: bool = False
    storage: str | None = None


def _worker(scene: Scene) -> None:
    worker = scene.victim()
    ray.get(scene.nodes.hand(worker["node"]).signal.remote(worker["pid"], signal.SIGKILL))


def _slow(scene: Scene) -> None:
    worker = scene.victim()
    ray.get(scene.nodes.hand(worker["node"]).pause.remote(worker["pid"], PAUSE))


def _driver(scene: Scene) -> None:
    scene.run.kill()
    scene.resubmit()


def _node(scene: Scene) -> None:
    scene.nodes.end(scene.node())


def _power(scene: Scene) -> None:
    scene.nodes.end(scene.node(), "freeze")


def _notice(scene: Scene) -> None:
    node = scene.node()
    scene.nodes.hand(node)  # a draining node takes no new one
    scene.nodes.drain(node, NOTICE)
    time.sleep(NOTICE)
    scene.nodes.end(node)


def _join(scene: Scene) -> None:
    assert isinstance(scene.nodes, LocalNodes)
    scene.nodes.ready(len(scene.workers()) + 1)


def _head(scene: Scene) -> None:
    assert isinstance(scene.nodes, LocalNodes)
    scene.nodes.lose_head()
    scene.run.end()
    scene.nodes.again()
    scene.resubmit()


def _damaged(kind: str) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        hands = [(w["pid"], scene.nodes.hand(w["node"])) for w in scene.workers()]
        scene.run.kill()
        ray.get([hand.ended.remote(pid) for pid, hand in hands])  # until then they may save
        before, newest = list(scene.committed().values())[-2:]
        damage(newest, kind, scene.rng, before)
        scene.resubmit()

    return do


DAMAGES = ("flip", "cut", "grow", "zeros", "delete", "swap", "mix")


def damage(at: str, kind: str, rng: random.Random, before: str) -> str:
    """Does damage of one of DAMAGES to a file of a checkpoint; returns what was done. before: another checkpoint of the run,
    whose file is taken by `mix`."""
    names = storage.listdir(at)
    others = storage.listdir(before) if kind == "mix" else names
    name = rng.choice([n for n in names if n in others])
    file, raw = storage.join(at, name), bytearray(_bytes(storage.join(at, name)))
    match kind:
        case "flip":
            bit = rng.randrange(8 * len(raw))
            raw[bit // 8] ^= 1 << bit % 8
        case "cut":
            del raw[rng.randrange(len(raw)) :]
        case "grow":
            raw += rng.randbytes(rng.randint(1, 100))
        case "zeros":
            begin = rng.randrange(len(raw))
            end = min(len(raw), begin + rng.randint(1, 4096))
            raw[begin:end] = bytes(end - begin) if any(raw[begin:end]) else b"\1" * (end - begin)
        case "delete":
            storage.remove(file)
            return f"{name}: deleted"
        case "swap":
            other = rng.choice([n for n in names if n != name])
            taken = _bytes(storage.join(at, other))
            storage.write(storage.join(at, other), bytes(raw))
            storage.write(file, taken)
            return f"{name}: swapped with {other}"
        case "mix":
            raw = bytearray(_bytes(storage.join(before, name)))
    storage.write(file, bytes(raw))
    return f"{name}: {kind}"


def _bytes(path: str) -> bytes:
    with storage.open_read(path) as f:
        return f.read()


FAULTS: dict[str, Fault] = {
    "worker": Fault("SIGKILL of a worker", _worker),
    "slow": Fault(f"a worker stands still for {PAUSE:.0f} s", _slow, bears=True),
    "driver": Fault("SIGKILL of the driver, resubmitted", _driver),
    "node": Fault("SIGKILL of a raylet", _node, node=True),
    "power": Fault("a node falls silent", _power, node=True),
    "notice": Fault(f"a spot notice {NOTICE} s ahead", _notice, node=True),
    "head": Fault("the head is lost, resubmitted to a new cluster", _head, local=True),
    "flip": Fault("newest checkpoint: a bit flipped", _damaged("flip"), damages=True),
    "cut": Fault("newest checkpoint: a file cut off", _damaged("cut"), damages=True),
    "delete": Fault("newest checkpoint: a file deleted", _damaged("delete"), damages=True),
    "mix": Fault("newest checkpoint: a file of the one before", _damaged("mix"), damages=True),
    "leave": Fault("a node leaves, workers get fewer", _node, local=True, elastic=True, spares=0),
    "join": Fault("a node joins, workers get more", _join, local=True, elastic=True, spares=-1),
}
