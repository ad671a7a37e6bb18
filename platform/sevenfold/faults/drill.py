"""Drills: trains a baseline run, then the same run under each fault, and compares the results."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ray.exceptions import RayError

from sevenfold import storage
from sevenfold.cluster import connect
from sevenfold.data.ledger import Ledger
from sevenfold.errors import InputError, RunError
from sevenfold.faults.inject import FAULTS, Fault, Run, Scene
from sevenfold.faults.nodes import LocalNodes, Nodes
from sevenfold.faults.outcome import Outcome, show
from sevenfold.faults.watch import CheckpointWatch
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.recipe.keys import did_you_mean
from sevenfold.report.console import say
from sevenfold.run_folder import RunFolder

# Of a drill's runs: long enough to inject a fault in the middle, with checkpoints before and after.
STEPS, EVERY = 60, 6

ROUNDING = 1e-5  # relative change of a loss that another number of workers may cause


def run(recipe: Recipe, faults: Sequence[str], steps: int = STEPS) -> list[Outcome]:
    """Drills a recipe, on the cluster of RAY_ADDRESS or on a new local cluster of several nodes.

    Prints a table and writes it to `drill.json` in the folder of the baseline run, `NAME-drill`.

    Args:
        recipe: The recipe.
        faults: Names of faults; if empty, all that can be injected here. On a cluster that was not
            started by the drill, nodes are ended only if their faults are named.
        steps: The number of steps of each run.

    Raises:
        InputError: A fault is unknown, or none can be injected here.
        RunError: The baseline run failed, or a fault changed the results.
    """
    if unknown := [name for name in faults if name not in FAULTS]:
        raise InputError(
            f"--faults: unknown fault {unknown[0]!r}{did_you_mean(unknown[0], list(FAULTS))}; "
            f"available: {', '.join(FAULTS)}"
        )
    if not 12 <= steps <= 100_000:
        raise InputError(
            f"--steps {steps}: expected 12 to 100,000, so that there are checkpoints before and "
            "after each fault"
        )
    if os.environ.get("RAY_ADDRESS"):
        connect.connect()
        nodes = Nodes()
    else:
        nodes = LocalNodes(recipe.cluster.cpus_per_worker)
    try:
        drill = Drill(recipe, nodes, steps)
        outcomes = drill.all(_choose_faults(drill, faults))
    finally:
        nodes.close()
    show(outcomes)
    storage.write(
        storage.join(drill.folder("drill").root, "drill.json"),
        json.dumps([asdict(outcome) for outcome in outcomes], indent=1),
    )
    if failed := [outcome.fault for outcome in outcomes if not outcome.passed]:
        raise RunError(
            f"results differ under {len(failed)} of {len(outcomes)} faults: {', '.join(failed)}"
        )
    return outcomes


def _choose_faults(drill: Drill, names: Sequence[str]) -> dict[str, Fault]:
    """Returns the named faults, or all, without those that cannot be injected here."""
    if not names:
        local = isinstance(drill.nodes, LocalNodes)
        names = [name for name, fault in FAULTS.items() if local or not fault.loses_node]
    chosen = {}
    for name in dict.fromkeys(names):
        reason = drill.impossible(FAULTS[name])
        if reason:
            say(f"{name} ({FAULTS[name].description}) is skipped: {reason}")
        else:
            chosen[name] = FAULTS[name]
    if not chosen:
        raise InputError("none of the faults can be injected here")
    return chosen


class _Injection(NamedTuple):
    """When a fault was injected.

    Attributes:
        step: The last step before it.
        time: The time, by time.monotonic().
        committed: The steps of the checkpoints that were committed, oldest first.
    """

    step: int
    time: float
    committed: list[int]


class Drill:
    """The runs of a drill: NAME-drill, the baseline run, and NAME-drill-FAULT for each fault."""

    def __init__(self, recipe: Recipe, nodes: Nodes, steps: int = STEPS):
        """Changes the recipe for the drill, with frequent checkpoints and a log line per step."""
        every = max(1, steps * EVERY // STEPS)
        changes = {
            "train.steps": steps,
            "train.log_every": 1,
            "checkpoint.every": every,
            "cluster.num_workers": recipe.workers[1],
            "storage": storage.resolve_output(recipe.storage),
            "cluster.resize_seconds": 2,
            "checkpoint.keep": max(2, recipe.checkpoint.keep),
            "validation.patience": None,
        }
        if isinstance(nodes, LocalNodes):
            changes |= nodes.recipe_overrides
        self.recipe = recipe.override(changes)
        self.nodes = nodes
        self.steps = steps
        self.every = every
        self._temporary = tempfile.TemporaryDirectory(prefix="drill-")
        self._recipe_file = Path(self._temporary.name, "recipe.yaml")
        self._recipe_file.write_text(self.recipe.to_yaml())
        self._job = "pretrain" if recipe.objective in PRETRAINING else "finetune"

    def folder(self, name: str, storage_root: str | None = None) -> RunFolder:
        """Returns the folder of one of the drill's runs."""
        root = storage_root or self.recipe.storage
        return RunFolder(storage.join(root, f"{self.recipe.name}-{name}"))

    def impossible(self, fault: Fault) -> str | None:
        """Returns why a fault cannot be injected here; None if it can."""
        workers = self.recipe.workers[1]
        if fault.elastic and workers < 2:
            return "it requires cluster.num_workers of 2 or more"
        if isinstance(self.nodes, LocalNodes):
            return None
        if fault.local:
            return (
                "it requires nodes that the drill may start: unset RAY_ADDRESS to drill on this "
                "machine"
            )
        if fault.loses_node:
            room = self.nodes.workers_without_a_node(self.recipe)
            if room < workers:
                return (
                    f"after the loss of a node the cluster has room for {room} of {workers} workers"
                )
        return None

    def all(self, faults: Mapping[str, Fault]) -> list[Outcome]:
        """Trains the baseline run, then a run under each fault.

        Raises:
            RunError: The baseline run failed.
        """
        name = f"{self.recipe.name}-drill"
        say(f"{name}: baseline run of {self.steps} steps")
        _clear(self.folder("drill"))
        self._set_nodes(0)
        baseline = self.start("drill")
        try:
            if baseline.wait():
                raise RunError(f"{name}, the baseline run, failed: {baseline.last_lines()}")
        finally:
            baseline.kill()
        outcomes = []
        for fault_name, fault in faults.items():
            outcome = self.one(fault_name, fault)
            outcomes.append(outcome)
            effect = outcome.error or (
                f"paused {outcome.pause_s:.1f} s, repeated {outcome.redone} steps"
            )
            verdict = "identical to the baseline run" if outcome.passed else "RESULTS DIFFER"
            say(
                f"{fault_name}: {fault.description} after step {outcome.struck}: {effect}; "
                f"{verdict}"
            )
        return outcomes

    def one(self, name: str, fault: Fault) -> Outcome:
        """Trains a run, injects a fault into it, and compares it with the baseline run."""
        storage_root = fault.storage or self.recipe.storage
        folder = self.folder(f"drill-{name}", storage_root)
        _clear(folder)
        self._set_nodes(fault.spare_nodes)
        rng = random.Random(name)  # noqa: S311 (the same draws at each drill)
        workers = f"[1,{self.recipe.workers[1]}]" if fault.elastic else str(self.recipe.workers[1])
        changes = [f"cluster.num_workers={workers}", f"storage={storage_root}"]
        scene = Scene(self.nodes, folder, lambda: self.start(f"drill-{name}", *changes), rng)
        allowed = ROUNDING if fault.elastic else 0.0
        injection = _Injection(0, time.monotonic(), [])
        try:
            with CheckpointWatch(folder.checkpoints) as watch:
                # by then two checkpoints are committed, and saving the third has begun
                earliest = 3 * self.every + 1
                scene.run.wait_for_step(rng.randint(earliest, max(earliest, self.steps // 2)))
                committed = list(scene.committed())
                injection = _Injection(scene.run.step, time.monotonic(), committed)
                fault.inject(scene)
                exit_code = scene.run.wait()
        except (RunError, InputError, RayError) as e:
            return Outcome(name, fault.description, allowed, injection.step, error=str(e))
        finally:
            scene.run.kill()
            storage.write(storage.join(folder.root, "drill.log"), "\n".join(scene.run.lines))
        return self._outcome(name, fault, allowed, scene, injection, exit_code, watch)

    def _outcome(
        self,
        name: str,
        fault: Fault,
        allowed: float,
        scene: Scene,
        injection: _Injection,
        exit_code: int,
        watch: CheckpointWatch,
    ) -> Outcome:
        """Returns the outcome of a run that has ended."""
        job = scene.run
        steps = [step for _, step in job.steps]
        times = [injection.time, *(when for when, _ in job.steps if when > injection.time)]
        repeated = len(steps) - len(set(steps))
        # a run that died before its first checkpoint starts again from step 0
        resumed_from = min(
            (step for when, step in job.resumed if when >= injection.time),
            default=0 if repeated else None,
        )
        must_keep = injection.committed[-2] if fault.damages else injection.committed[-1]
        error, difference = None, None
        if exit_code:
            error = job.last_lines()
        elif resumed_from is None and not fault.bears:
            error = "the run had finished before the fault took effect: increase --steps"
        else:
            difference = self.difference(scene.folder)
        return Outcome(
            fault=name,
            about=fault.description,
            allowed=allowed,
            struck=injection.step,
            pause_s=max((b - a for a, b in itertools.pairwise(times)), default=0.0),
            went_on=resumed_from,
            redone=repeated,
            lost=0 if resumed_from is None else max(0, must_keep - resumed_from),
            difference=difference,
            looks=watch.checks,
            unguarded=watch.unguarded,
            error=error,
        )

    def start(self, name: str, *changes: str) -> Run:
        """Starts a run in a process of its own, as a user would start it."""
        library = str(Path(__file__).parents[2])
        paths = os.pathsep.join(p for p in (library, os.environ.get("PYTHONPATH")) if p)
        command = [
            sys.executable,
            "-P",  # not from the current folder
            "-m",
            "sevenfold.cli",
            self._job,
            str(self._recipe_file),
            f"name={self.recipe.name}-{name}",
            *changes,
        ]
        # the recipe's file has no secrets of URLs
        urls = " ".join(storage.all_full_urls().values())
        secrets = {storage.URLS_VARIABLE: urls} if urls else {}
        return Run(command, {"PYTHONPATH": paths, **secrets})

    def difference(self, other: RunFolder) -> float | None:
        """Compares a run with the baseline run; see Outcome.difference."""
        baseline = self.folder("drill")
        expected_data, data = (Ledger(f.ledger).read(1, self.steps) for f in (baseline, other))
        expected, actual = _logged_values(baseline), _logged_values(other)
        if expected_data != data or expected.keys() != actual.keys():
            return None
        if {row.step for row in data} != set(range(1, self.steps + 1)):
            return None
        if expected == actual:
            return 0.0
        return max(
            sys.float_info.min,  # above 0, even if only gradient norms differ
            *(
                abs(values.loss - actual[step].loss) / abs(values.loss)
                for step, values in expected.items()
            ),
        )

    def _set_nodes(self, spare: int) -> None:
        """Gives a local cluster one node per worker and some spare ones (may be negative)."""
        if isinstance(self.nodes, LocalNodes):
            self.nodes.set_count(self.recipe.workers[1] + spare)


def _clear(folder: RunFolder) -> None:
    """Removes an earlier drill's run of this name.

    Raises:
        InputError: The folder contains files that no drill wrote.
    """
    marker = storage.join(folder.root, "drill.log")
    if storage.listdir(folder.root) and not storage.exists(marker):
        raise InputError(
            f"{folder.root}: expected no folder or an earlier drill's run, found another run: give "
            "the recipe another name"
        )
    if foreign := folder.other_files():
        raise InputError(
            f"{folder.root}: the drill would replace this folder, but it contains files that no "
            f"drill wrote ({', '.join(foreign[:3])}): move them elsewhere, or give the recipe "
            "another name"
        )
    storage.remove(folder.root)
    storage.write(marker, "")


class _Values(NamedTuple):
    """The logged values of a step."""

    loss: float
    grad_norm: float


def _logged_values(folder: RunFolder) -> dict[int, _Values]:
    """Returns the training loss and gradient norm of each step, from metrics.jsonl."""
    lines = map(json.loads, storage.read_text(folder.log).splitlines())
    return {
        line["step"]: _Values(line["train/loss"], line["train/grad_norm"])
        for line in lines
        if "train/loss" in line
    }
