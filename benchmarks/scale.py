"""Measures what must not grow, or only slowly, with shards, sources, steps, ranks and trials.

    python benchmarks/scale.py [--quick] [--only PART] [--json FILE]

Parts and claims:
- lanes: `lanes_used`, the least share of their time in which the workers of a plan do not wait for
  the busiest one, over every number of GPUs from 1 to 1,024 for which the plan advises no other;
- order: `order_10_sources_over_1`, the time to find the row groups of a chunk (seven) with ten
  weighted sources, over that with one;
- shards: `manifest_seconds_100k_shards` and `resume_seconds_100k_shards`, to examine 100,000
  parquet files, and to find them unchanged, in a file system that waits 40 ms before each answer;
- ledger: `ledger_seconds`, to find a step in the ledger of 100,000 steps on 1,024 ranks;
- schedulers: `schedulers_end`, whether each scheduler brings sweeps with random curves to an end,
  with each concurrency, and stops no trial before its grace;
- trials: `trials_2000_flat`, whether memory, threads, open files and processes grow by at most 1%
  from the 500th to the 2,000th trial of a sweep whose trials do nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import slow_store

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]
Claims = list[dict[str, Any]]


def lanes(quick: bool) -> Claims:
    """Plans every world, with the batches that recipes have."""
    from sevenfold.data.lanes import ENOUGH, advice, best_lanes, share_used

    least, rows = 1.0, []
    for batch in (256, 512, 1024, 2048):
        proposed = 0
        for world in range(1, min(batch, 1024) + 1):
            count = best_lanes(batch, world)
            assert count is not None
            used = share_used(batch, world, count)
            if advice(batch, world, count) is None:  # else the plan names better numbers
                proposed += 1
                least = min(least, used)
        from_64 = sum(share_used(batch, world, 64) >= ENOUGH for world in range(1, 65))
        rows.append((f"{batch:,}", f"{proposed}", f"{from_64} of 64"))
    columns = ("sequences per step", "numbers of GPUs in plans", "with 64 lanes, as before")
    measure.show("Lanes: numbers of GPUs that are used for 95% or more", columns, rows)
    measure.show(
        "Lanes: 48 workers, 512 sequences per step",
        ("lanes", "used"),
        [(str(n), f"{share_used(512, 48, n):.0%}") for n in (64, 256, 512)],
    )
    return [measure.claim("lanes_used", least, None, ENOUGH)]


def order(quick: bool) -> Claims:
    """Times DataOrder.chunk for one source and for ten, and for the lists that runs had before."""
    from sevenfold.data.manifest import Manifest
    from sevenfold.data.order import FEISTEL, LISTED, DataOrder
    from sevenfold.data.sources.shards import Shard
    from sevenfold.recipe import Source

    groups = 200_000 if quick else 2_000_000

    def seconds(sources: int, version: int) -> Callable[[], float]:
        each = groups // sources
        table = np.zeros((each * sources, 6), np.int64)
        table[:, 0] = np.repeat(np.arange(sources), each)
        table[:, -1] = 2 << 20
        manifest = Manifest(
            tuple(Source(path=f"{s}.parquet") for s in range(sources)),
            tuple(Shard(f"{s}.parquet", s, "parquet", None, "0-") for s in range(sources)),
            table,
            tokens_per_byte=(0.25,) * sources,
        )
        weights = tuple(float(1 + s) for s in range(sources))
        data_order = DataOrder(manifest, 0, 16, ((0, weights),), version=version)
        assert data_order.groups_per_chunk > 4
        # a list of two million takes a quarter of a second, where it is sorted for each chunk
        chunks = 300 if version == FEISTEL else 5

        def run() -> float:
            data_order.chunk(0)
            start = time.perf_counter()
            for index in range(1, chunks + 1):
                data_order.chunk(index)
            return (time.perf_counter() - start) / chunks

        return run

    sides = {
        f"{name}, {sources} source{'s' if sources > 1 else ''}": seconds(sources, version)
        for name, version in (("Feistel", FEISTEL), ("lists", LISTED))
        for sources in (1, 10)
    }
    times = {name: measure.median(values) for name, values in measure.interleaved(sides, 5).items()}
    rows = [(name, f"{1e6 * value:,.0f} us") for name, value in times.items()]
    measure.show(f"Order: time per chunk, {groups:,} row groups", ("side", "time"), rows)
    feistel = [value for name, value in times.items() if name.startswith("Feistel")]
    return [measure.claim("order_10_sources_over_1", feistel[1], feistel[0], 1.5, at_most=True)]


def shards(quick: bool) -> Claims:
    """Starts and resumes on many files in a store that is slow to answer."""
    from sevenfold.data.scan import scan
    from sevenfold.prepare.data import Inputs, load_unchanged_inputs, write_inputs
    from sevenfold.recipe import Source
    from sevenfold.run_folder import RunFolder

    store = slow_store.SlowStore
    store.count = 5_000 if quick else 100_000
    start = time.perf_counter()
    manifest = scan([Source(path="slow://corpus")], "causal")
    first, requests, store.requests = time.perf_counter() - start, store.requests, 0
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(RunFolder(folder), Inputs(manifest, None))
        start = time.perf_counter()
        load_unchanged_inputs(RunFolder(folder))
        again = time.perf_counter() - start
    rows = [
        ("start", f"{first:.1f} s", f"{requests:,}"),
        ("resume", f"{again:.1f} s", f"{store.requests:,}"),
    ]
    title = f"Shards: {store.count:,} files, {slow_store.WAIT * 1000:.0f} ms per request"
    measure.show(title, ("", "time", "requests"), rows)
    return [
        measure.claim("manifest_seconds_100k_shards", first, None, 60, at_most=True),
        measure.claim("resume_seconds_100k_shards", again, None, 10, at_most=True),
    ]


def ledger(quick: bool) -> Claims:
    """Writes the ledger of a long run on many ranks, and finds steps in it."""
    from sevenfold.data.ledger import Ledger
    from sevenfold.data.reader import ReadRange

    ranks, saves, every = 1024, 20 if quick else 200, 500
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        book, written, step = Ledger(folder), [], 0
        for _ in range(saves):
            hashes = rng.integers(0, 2**62, (every, ranks))
            reads = [
                ReadRange(step + s + 1, lane, step + s + 1, lane, s, 1, value)
                for s, row in enumerate(hashes.tolist())
                for lane, value in enumerate(row)
            ]
            start = time.perf_counter()
            book.write(reads)
            written.append(time.perf_counter() - start)
            step += every
        times = []
        for wanted in rng.integers(1, step + 1, 20).tolist():
            start = time.perf_counter()
            assert len(book.step(wanted)) == ranks
            times.append(time.perf_counter() - start)
        files = len(book.parts())
    rows = [
        ("files", f"{files:,}"),
        ("a save's part, median", f"{measure.median(written):.2f} s"),
        ("finding a step, slowest of 20", f"{max(times):.2f} s"),
    ]
    measure.show(f"Ledger: {step:,} steps on {ranks:,} ranks", ("", ""), rows)
    return [measure.claim("ledger_seconds", max(times), None, 1, at_most=True)]


def _simulations(seeds: int) -> Iterator[tuple[str, str]]:
    """Simulates sweeps; yields (scheduler, what went wrong or "")."""
    import math

    from helpers.simulated_tune import Simulation

    from sevenfold.recipe import Sweep

    steps, every = 18, 2
    kinds: dict[str, Callable[[random.Random, float, int], float]] = {
        "better": lambda r, level, step: level + 1 / (step + 1),
        "worse": lambda r, level, step: level + step,
        "noise": lambda r, level, step: r.random(),
        "walk": lambda r, level, step: level + sum(r.gauss(0, 1) for _ in range(step)),
        "not a number": lambda r, level, step: r.choice([r.random(), math.nan]),
    }
    for scheduler in ("asha", "hyperband", "bohb", "median", "pbt", "none"):
        for seed in range(seeds):
            r = random.Random(seed)  # noqa: S311
            trials, concurrent = r.choice([1, 2, 4, 9, 13, 27]), r.choice([1, 2, 3, 8, 32])
            tree = {
                "trials": trials,
                "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}},
                "scheduler": scheduler,
                "algorithm": "tpe" if scheduler == "bohb" else "random",
                "grace": r.choice([0.1, 0.2, 0.5, 1.0]),
                "eta": r.choice([2, 3, 4]),
                "quantile": r.choice([0.25, 0.5]),
            }
            settings = Sweep.model_validate(tree)
            curve = kinds[r.choice(list(kinds))]
            curves = [partial(curve, r, r.random()) for _ in range(trials)]
            run = Simulation(settings, curves, steps, every, concurrent, seed, r.choice([0, 0.05]))
            try:
                run.run(max_reports=trials * math.ceil(steps / every))
            except AssertionError as e:
                yield scheduler, f"seed {seed}: {e}"
                continue
            early = [
                trial.trial_id
                for trial in run.trials
                if trial.status == "TERMINATED"
                and run.steps[trial.trial_id] < min(steps, math.ceil(settings.grace * steps))
            ]
            yield scheduler, f"seed {seed}: {early} ended before the grace" if early else ""


def schedulers(quick: bool) -> Claims:
    """Counts the simulated sweeps that end as they should."""
    outcomes: dict[str, list[str]] = {}
    for scheduler, problem in _simulations(20 if quick else 300):
        outcomes.setdefault(scheduler, []).append(problem)
    rows = [
        (name, f"{problems.count('')} of {len(problems)}", next(filter(None, problems), ""))
        for name, problems in outcomes.items()
    ]
    measure.show("Schedulers: sweeps that end", ("scheduler", "as they should", "first"), rows)
    good = sum(problems.count("") for problems in outcomes.values())
    return [
        measure.claim("schedulers_end", good, sum(map(len, outcomes.values())), 1),
    ]


def trials(quick: bool) -> Claims:
    """Runs a sweep whose trials report once, in a process of its own."""
    count = 200 if quick else 2000
    with tempfile.TemporaryDirectory() as home:
        env = {"SEVENFOLD_HOME": home, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("many_trials.py")), str(count)]
        done = measure.run(command, env, timeout=7200)
    samples = done.stdout_json
    first, last = samples[0], samples[-1]
    rows = [
        (name, *(f"{sample[name]:,.0f}" for sample in samples), f"{last[name] / first[name]:.3f}")
        for name in first
    ]
    columns = ("", *(f"{sample['trials']:,} trials" for sample in samples), "ratio")
    measure.show(f"A sweep of {count:,} trials ({done.wall_s:.0f} s)", columns, rows)
    grown = [name for name in first if name != "trials" and last[name] > 1.01 * first[name]]
    if grown:
        print("grown by more than 1%:", ", ".join(grown))
    return [measure.claim("trials_2000_flat", float(not grown), None, 1)]


PARTS = {f.__name__: f for f in (lanes, order, shards, ledger, schedulers, trials)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller; goals are not checked")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    claims = []
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            claims += part(arguments.quick)
    holds = measure.report(claims, arguments.json)
    return 0 if holds or arguments.quick else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
