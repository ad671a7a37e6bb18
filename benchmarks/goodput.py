"""SIMULATES the goodput of 1,024 GPUs, from the measured cost of a save and printed assumptions.

    python benchmarks/goodput.py [--quick] [--json FILE] [--parameters N] [--workers N] [...]

Goodput is the share of the time whose steps are kept. Nothing here ran on 1,024 GPUs: the call of a
save, its time until the commit and the slowdown of the steps beside it are measured here (see
benchmarks/checkpoint.py), on a machine without a free core, and scaled by the bytes per worker;
the storage's speed, the recovery time and the failure rates are assumed. The interval is the one
that `checkpoint.every: auto` chooses. The naive run saves as torch does, synchronously, at the
interval that is best for it. A failure of any machine stops all of them, and another machine is
available at once. Each figure is simulated with many seeds and shown beside its closed form.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import checkpoint
import measure
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from sevenfold.engine.checkpoint.interval import optimal_interval
from sevenfold.plan.cost import Policy, expected_goodput
from sevenfold.recipe import Checkpoint

BYTES = 12  # per parameter: float32 weights and AdamW's two moments, as a checkpoint stores them
NODE = 8  # GPUs per node
DAY, HOUR = 86_400.0, 3600.0
NOTICE = 120.0  # seconds before AWS takes a spot machine away
MARGIN = 3.0  # seconds, as MARGIN_SECONDS in train/signals.py


def simulated(
    p: Policy, mtbf: float, days: float, seed: int, notice: float = 0, stops: bool = False
) -> float:
    """Simulates the goodput of one run; `expected_goodput` is its expectation in closed form.

    Args:
        p: The times of saves and recovery.
        mtbf: Mean time between two failures, in seconds.
        days: The duration of the run.
        seed: Seed of the failures.
        notice: Seconds before a failure at which it is announced; a save then starts at once.
        stops: Whether the run stops and recovers as soon as that save is committed, instead of
            training until the machine is lost.
    """
    rng = np.random.default_rng(seed)
    # the times from one failure to the next
    uptimes = rng.exponential(mtbf, int(2 * days * DAY / mtbf + 100))
    trained = uptimes - p.recovery  # below 0: it failed again before it had recovered
    period = p.interval + p.cost
    kept = np.maximum(0, (trained + p.cost - p.committed) // period) * p.interval
    if notice >= p.committed:
        noticed = np.maximum(0, trained - notice)
        saved = noticed // period * p.interval + np.minimum(noticed % period, p.interval)
        kept = saved if stops else np.maximum(kept, saved)
        if stops:
            uptimes = np.where(noticed > 0, uptimes - notice + p.committed, uptimes)
    failures = int(np.searchsorted(np.cumsum(uptimes), days * DAY)) + 1
    return float(kept[:failures].sum() / uptimes[:failures].sum())


def _share(part: tuple[str, float, str]) -> float:
    """Sorts parts by their share of the time, the largest first."""
    return -part[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, few seeds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--workers", type=int, default=1024, help="GPUs")
    parser.add_argument(
        "--storage", type=float, default=1.0, help="GB/s per node, writing and reading"
    )
    parser.add_argument(
        "--recovery",
        type=float,
        default=150.0,
        help="seconds from a failure to the first step after it",
    )
    parser.add_argument(
        "--slower",
        type=float,
        help="slowdown of steps while a save is written; default: as measured here",
    )
    parser.add_argument(
        "--naive-recovery",
        type=float,
        default=1200.0,
        help="the same of the naive run, which a person or a script starts again",
    )
    parser.add_argument("--days", type=float, default=54.0)
    a = parser.parse_args()
    measured = checkpoint.measured(checkpoint.QUICK if a.quick else checkpoint.FULL)
    seeds = range(20 if a.quick else 200)

    share = a.parameters * BYTES / a.workers  # bytes per worker
    scale = share / (measured["mb"] * 1e6 / checkpoint.WORKERS)
    transfer = share * NODE / (a.storage * 1e9)  # seconds to transfer a node's bytes to the storage
    stall, committed = measured["stall"] * scale, measured["sync"] * scale + 2 * transfer
    measured_slower = max(0.0, measured["beside"] / measured["step"] - 1)
    slower = measured_slower if a.slower is None else a.slower
    cost = stall + slower * committed
    naive = measured["plain_save"] * scale + transfer
    inputs = [
        ("workers", f"{a.workers:,} GPUs, {NODE} per node", "given"),
        (
            "bytes per worker",
            f"{share / 1e9:.2f} GB",
            f"{a.parameters / 1e9:g}e9 parameters, {BYTES} bytes each",
        ),
        (
            "call of a save",
            f"{stall:.2f} s",
            f"measured {measured['stall']:.3f} s for {measured['mb'] / checkpoint.WORKERS:,.0f} MB",
        ),
        (
            "transfer to the storage",
            f"{transfer:.1f} s",
            f"assumed {a.storage:g} GB/s per node: Llama 3's 2 TB/s for 2,048 nodes",
        ),
        (
            "until committed",
            f"{committed:.1f} s",
            f"measured {measured['sync']:.3f} s, scaled, and two transfers",
        ),
        (
            "steps during a save",
            f"{slower:.0%} slower",
            f"measured {measured_slower:.0%}: this machine has no free core, GPU nodes have",
        ),
        ("cost of a save", f"{cost:.2f} s", "the call and the slowdown of steps"),
        ("recovery", f"{a.recovery:g} s", "assumed: detection, restart, restore, warm-up"),
        (
            "naive: save, recovery",
            f"{naive:.1f} s, {a.naive_recovery / 60:g} min",
            f"synchronous dcp.save, here {measured['plain_save']:.3f} s",
        ),
        ("each simulation", f"{a.days:g} days", f"mean of {len(seeds)} seeds"),
    ]
    measure.show("SIMULATION: inputs", ("what", "value", "from"), inputs)

    nodes = a.workers / NODE
    failures = {
        "Llama 3: 419 in 54 days of 16,384 GPUs": Checkpoint().mtbf_hours * HOUR / a.workers,
        "Meta RSC-1: 6.5 in 1,000 node-days": 1000 / 6.5 * DAY / nodes,
        "Meta RSC-1: 7.9 h, seen at 1,024 GPUs": 7.9 * HOUR * 1024 / a.workers,
        "spot: 5% of the nodes a day": 20 * DAY / nodes,
    }
    rows, ours, baseline = [], [], []
    for name, mtbf in failures.items():
        p = Policy(optimal_interval(cost, mtbf, committed), cost, committed, a.recovery)
        for side, policy, results in (
            ("ours", p, ours),
            (
                "naive",
                Policy(optimal_interval(naive, mtbf, naive), naive, naive, a.naive_recovery),
                baseline,
            ),
        ):
            goodputs = [simulated(policy, mtbf, a.days, seed) for seed in seeds]
            results.append(sum(goodputs) / len(goodputs))
            every = f"{policy.interval / 60:.1f} min"
            exact = f"{expected_goodput(policy, mtbf):.2%}"
            rows.append(
                (
                    name,
                    f"{mtbf / HOUR:.1f}",
                    side,
                    every,
                    f"{results[-1]:.2%}",
                    f"{min(goodputs):.2%}",
                    exact,
                )
            )
    columns = (
        "failures",
        "MTBF, hours",
        "",
        "saves every",
        "goodput",
        "worst seed",
        "closed form",
    )
    measure.show("SIMULATION: goodput", columns, rows)

    mtbf = next(iter(failures.values()))
    p = Policy(optimal_interval(cost, mtbf, committed), cost, committed, a.recovery)
    every = p.interval + p.cost
    parts = [
        ("the call of saves", stall / every, "a copy that overlaps with the next step"),
        (
            "steps slowed down by saves",
            slower * committed / every,
            "cores that training does not use",
        ),
        (
            "steps repeated after a failure",
            p.interval / 2 / mtbf,
            "saves that cost less: the interval is chosen so that both cost the same",
        ),
        ("saves not committed yet", committed / mtbf, "a faster storage"),
        (
            "recovery",
            a.recovery / mtbf,
            "spare machines that run already, and a restore from peers",
        ),
    ]
    measure.show(
        f"SIMULATION: where the time goes, {next(iter(failures))}",
        ("part", "of the time", "what would take it away"),
        [(name, f"{share:.2%}", remedy) for name, share, remedy in sorted(parts, key=_share)],
    )

    mtbf = failures["spot: 5% of the nodes a day"]
    p = Policy(optimal_interval(cost, mtbf, committed), cost, committed, a.recovery)
    spot = {
        "no notice": (0.0, False),
        f"{NOTICE:g} s: one save at once, training until the machine is lost": (NOTICE, False),
        f"{NOTICE:g} s: ours, with a second save as late as is safe": (
            2 * committed + MARGIN,
            False,
        ),
        f"{NOTICE:g} s: one save at once, then a restart without the machine": (NOTICE, True),
    }
    lost = []
    for what, (notice, stops) in spot.items():
        goodputs = [simulated(p, mtbf, a.days, seed, notice, stops) for seed in seeds]
        mean = sum(goodputs) / len(goodputs)
        lost.append((what, f"{mean:.2%}", f"{(1 - mean) * mtbf:.0f} s"))
    measure.show(
        "SIMULATION: the effect of a spot notice",
        ("notice", "goodput", "time lost per failure, with saves"),
        lost,
    )
    claims = [
        measure.claim(f"effective_time_{a.workers}", ours[0], None, 0.98),
        measure.claim(f"effective_time_{a.workers}_spot", ours[-1], None, 0.93),
        measure.claim(
            f"lost_time_{a.workers}_vs_naive", 1 - ours[0], 1 - baseline[0], 1.0, at_most=True
        ),
    ]
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
