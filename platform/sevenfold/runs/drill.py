"""Drills: a run left alone, and the same run again under each fault. What must not show is looked for."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ray.exceptions import RayError

from sevenfold import storage
from sevenfold.data.ledger import Ledger
from sevenfold.engine import checkpoint as ckpt
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.report.console import say, table
from sevenfold.runs import cluster
from sevenfold.runs.faults import FAULTS, Fault, Run, Scene
from sevenfold.runs.nodes import LocalNodes, Nodes
from sevenfold.storage import RunFolder

STEPS, EVERY = 60, 6  # of a drill: long enough to be struck in the middle, with checkpoints before and after
ROUNDING = 1e-5  # relative: what another number of workers may change in a loss


@dataclass(frozen=True)
class Outcome:
    """What a fault did.

    Attributes:
        allowed: the most that losses may differ, see `difference`.
        struck: the last step before it.
        pause_s: the longest time without a step from then on.
        went_on: the step that was gone on from; None where nothing had to.
        redone: steps done more than once.
        lost: committed steps that were lost; those of a checkpoint that was damaged on purpose do not count.
        difference: of the losses from the unfaulted run's, relative, at most; 0 where gradient norms are the same too, to the
            bit. None where the ledger is another, or the run did not end.
        unguarded: how often, of `looks`, there was no verified checkpoint.
        error: why it did not come to its end.
    """

    fault: str
    about: str
    allowed: float = 0.0
    struck: int = 0
    pause_s: float = 0.0
    went_on: int | None = None
    redone: int = 0
    lost: int = 0
    difference: float | None = None
    looks: int = 0
    unguarded: int = 0
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference <= self.allowed and not self.lost and not self.unguarded


def run(recipe: Recipe, faults: Sequence[str], steps: int = STEPS) -> list[Outcome]:
    """Drills a recipe, on the cluster of RAY_ADDRESS or on several nodes that are started on this machine; prints a table and
    writes it to `drill.json` in the folder of the unfaulted run, `NAME-drill`.

    Raises:
        InputError: an unknown fault, or none that can be done here.
        RunError: the unfaulted run failed, or a fault showed.
    """
    if unknown := [f for f in faults if f not in FAULTS]:
        raise InputError(f"--faults: no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    if not 12 <= steps <= 100_000:
        raise InputError(f"--steps {steps}: expected 12 to 100,000: a fault needs checkpoints before and after it")
    if os.environ.get("RAY_ADDRESS"):
        cluster.connect()
        nodes = Nodes()
    else:
        nodes = LocalNodes(recipe.cluster.cpus_per_worker)
    try:
        drill = Drill(recipe, nodes, steps)
        own = isinstance(nodes, LocalNodes)  # others' nodes are ended only by name
        chosen = {name: FAULTS[name] for name in faults or (n for n, f in FAULTS.items() if own or not f.node)}
        left_out = {name: why for name, fault in chosen.items() if (why := drill.impossible(fault))}
        for name, why in left_out.items():
            say(f"{name} ({FAULTS[name].about}) is left out: {why}")
        if len(left_out) == len(chosen):
            raise InputError("no fault can be done here")
        found = drill.all({name: fault for name, fault in chosen.items() if name not in left_out})
    finally:
        nodes.close()
    show(found)
    storage.write(storage.join(drill.folder("drill").root, "drill.json"), json.dumps([asdict(o) for o in found], indent=1))
    if showed := [o.fault for o in found if not o.passed]:
        raise RunError(f"{len(showed)} of {len(found)} faults left a trace: {', '.join(showed)}")
    return found


def show(found: Sequence[Outcome]) -> None:
    """The table of faults."""
    columns = ["fault", "struck after step", "longest pause s", "went on from", "steps redone", "committed lost",
               "without a verified checkpoint", "identical"]  # fmt: skip
    rows = [
        [o.about, o.struck, round(o.pause_s, 1), o.went_on, o.redone, o.lost, f"{o.unguarded} of {o.looks}",
         "to the bit" if o.difference == 0 else "NO" if o.difference is None else f"to {o.difference:.0e}"]
        for o in found
    ]  # fmt: skip
    table("Drills", columns, rows)
    for o in found:
        if o.error:
            say(f"{o.fault}: {o.error}")


class Drill:
    """Runs of one recipe of so many steps, under the names NAME-drill (left alone) and NAME-drill-FAULT."""

    def __init__(self, recipe: Recipe, nodes: Nodes, steps: int = STEPS):
        every = max(1, steps * EVERY // STEPS)
        changes = {
            "train.steps": steps, "train.log_every": 1, "checkpoint.every": every, "cluster.num_workers": recipe.workers[1],
            "storage": storage.place(recipe.storage), "cluster.resize_seconds": 2,
            "checkpoint.keep": max(2, recipe.checkpoint.keep), "validation.patience": None,
        }  # fmt: skip
        if isinstance(nodes, LocalNodes):
            changes |= nodes.worker
        self.recipe, self.nodes, self.steps, self.every = recipe.override(changes), nodes, steps, every
        self._aside = tempfile.TemporaryDirectory(prefix="drill-")
        self._file = Path(self._aside.name, "recipe.yaml")
        self._file.write_text(self.recipe.to_yaml())
        self._job = "pretrain" if recipe.objective in PRETRAINING else "finetune"

    def folder(self, name: str, place: str | None = None) -> RunFolder:
        return RunFolder(storage.join(place or self.recipe.storage, f"{self.recipe.name}-{name}"))

    def impossible(self, fault: Fault) -> str | None:
        """Why a fault cannot be done here; None where it can."""
        workers = self.recipe.workers[1]
        if fault.elastic and workers < 2:
            return "it takes cluster.num_workers of 2 or more"
        if isinstance(self.nodes, LocalNodes):
            return None
        if fault.local:
            return "it takes nodes that the drill may start: unset RAY_ADDRESS to drill on this machine"
        if fault.node and (room := self.nodes.room(self.recipe)) < workers:
            return f"without one of its nodes the cluster has room for {room} of {workers} workers"
        return None

    def all(self, faults: Mapping[str, Fault]) -> list[Outcome]:
        """Raises RunError where the run that is left alone fails."""
        say(f"{self.recipe.name}-drill: {self.steps} steps, left alone")
        _clear(self.folder("drill"))
        self._nodes(0)
        whole = self.start("drill")
        try:
            if whole.end():
                raise RunError(f"{self.recipe.name}-drill, left alone, failed: {whole.told()}")
        finally:
            whole.kill()
        found = []
        for name, fault in faults.items():
            found.append(self.one(name, fault))
            o = found[-1]
            did = o.error or f"paused {o.pause_s:.1f} s, {o.redone} steps redone"
            say(f"{name}: {fault.about} after step {o.struck}: {did}, {'as if nothing was' if o.passed else 'IT SHOWS'}")
        return found

    def one(self, name: str, fault: Fault) -> Outcome:
        place = fault.storage or self.recipe.storage
        folder = self.folder(f"drill-{name}", place)
        _clear(folder)
        self._nodes(fault.spares)
        rng = random.Random(name)  # noqa: S311 (drawn again the same)
        workers = f"[1,{self.recipe.workers[1]}]" if fault.elastic else str(self.recipe.workers[1])
        changes = [f"cluster.num_workers={workers}", f"storage={place}"]
        scene = Scene(self.nodes, folder, lambda: self.start(f"drill-{name}", *changes), rng)
        allowed = ROUNDING if fault.elastic else 0.0
        struck, kept, begin = 0, [], time.monotonic()
        try:
            with Watch(folder.checkpoints) as watch:
                earliest = 3 * self.every + 1  # two saves are committed, and the third has begun
                scene.run.reach(rng.randint(earliest, max(earliest, self.steps // 2)))
                kept = list(scene.committed())
                struck, begin = scene.run.step, time.monotonic()
                fault.do(scene)
                code = scene.run.end()
        except (RunError, InputError, RayError) as e:
            return Outcome(name, fault.about, allowed, struck, error=str(e))
        finally:
            scene.run.kill()
            storage.write(storage.join(folder.root, "drill.log"), "\n".join(scene.run.lines))
        seen, story = [s for _, s in scene.run.steps], scene.run.steps
        times = [begin, *(t for t, _ in story if t > begin)]
        redone = len(seen) - len(set(seen))
        went_on = min((s for t, s in scene.run.resumed if t >= begin), default=0 if redone else None)
        safe = kept[-2] if fault.damages else kept[-1]
        error = scene.run.told() if code else None
        if not code and went_on is None and not fault.bears:
            code, error = 1, "the run was at its end before it was struck: give it more --steps"
        return Outcome(
            name, fault.about, allowed, struck, max((b - a for a, b in itertools.pairwise(times)), default=0.0), went_on,
            redone, max(0, safe - (safe if went_on is None else went_on)),
            self.difference(folder) if code == 0 else None, watch.looks, watch.unguarded, error,
        )  # fmt: skip

    def start(self, name: str, *changes: str) -> Run:
        """The job in a process of its own, as a person would start it."""
        library = str(Path(__file__).parents[2])
        paths = os.pathsep.join(p for p in (library, os.environ.get("PYTHONPATH")) if p)
        words = [sys.executable, "-m", "sevenfold.cli", self._job, str(self._file), f"name={self.recipe.name}-{name}", *changes]
        return Run(words, {"PYTHONPATH": paths})

    def difference(self, other: RunFolder) -> float | None:
        """As Outcome has it: of a faulted run from the one left alone."""
        one = self.folder("drill")
        a, b = (Ledger(f.ledger).read(1, self.steps) for f in (one, other))
        losses, found = _losses(one), _losses(other)
        if a != b or {d.step for d in a} != set(range(1, self.steps + 1)) or losses.keys() != found.keys():
            return None
        if losses == found:
            return 0.0
        return max(sys.float_info.min, *(abs(losses[s][0] - found[s][0]) / abs(losses[s][0]) for s in losses))

    def _nodes(self, spares: int) -> None:
        if isinstance(self.nodes, LocalNodes):
            self.nodes.ready(self.recipe.workers[1] + spares)


def _clear(folder: RunFolder) -> None:
    """Removes an earlier drill's run of this name.

    Raises:
        InputError: There is something in the folder that no drill wrote.
    """
    mark = storage.join(folder.root, "drill.log")
    if storage.listdir(folder.root) and not storage.exists(mark):
        raise InputError(f"{folder.root}: expected nothing, or a drill's run, found another: give the recipe another name")
    if foreign := folder.foreign():
        raise InputError(
            f"{folder.root}: the drill would replace this folder, and did not write {', '.join(foreign[:3])} in it: move that "
            "elsewhere, or give the recipe another name"
        )
    storage.remove(folder.root)
    storage.write(mark, "")


def _losses(folder: RunFolder) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm, as metrics.jsonl has them."""
    lines = map(json.loads, storage.read_text(folder.log).splitlines())
    return {line["step"]: (line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line}


class Watch:
    """Looks again and again, from the first one on, whether a folder has a checkpoint that verifies."""

    def __init__(self, folder: str):
        self._folder, self._stop = folder, threading.Event()
        self.looks = self.unguarded = 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        pause = 0.5
        while not self._stop.wait(pause):
            begin = time.monotonic()
            try:  # the newest, or the one after it where that was removed in the meantime
                found = self._whole() or self._whole()
            except RunError:  # the storage is away
                continue
            if found or self.looks:
                self.looks += 1
                self.unguarded += not found
            pause = max(0.5, 4 * (time.monotonic() - begin))  # a large one takes its time

    def _whole(self) -> bool:
        return ckpt.latest(self._folder, lambda _: None) is not None

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
