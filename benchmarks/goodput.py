"""SIMULATION: the part of the time in which 1,024 GPUs train, from what a save costs here and assumptions that it prints.

    python benchmarks/goodput.py [--quick] [--json FILE] [--parameters N] [--workers N] [--recovery SECONDS] [...]

Nothing here ran on 1,024 GPUs. The call of a save and its time to the commit are measured (benchmarks/checkpoint.py) and
scaled by the bytes of a worker; the storage's rate, the recovery and the rates of failure are assumptions. The interval is
the one that `checkpoint.every: auto` chooses. A failure anywhere stops all, and another machine stands ready. Each figure is
simulated with many seeds, beside its closed form.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import checkpoint
import measure
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from sevenfold.engine.interval import best_seconds
from sevenfold.plan.cost import Policy, closed
from sevenfold.recipe import Checkpoint

BYTES = 12  # a parameter: float32 weights and AdamW's two moments, as we save them
NODE = 8  # GPUs
DAY, HOUR = 86_400.0, 3600.0
NOTICE = 120.0  # seconds before a spot machine of AWS is taken away
MARGIN = 3.0  # seconds, as runs/worker.py has it


def simulated(p: Policy, mtbf: float, days: float, seed: int, notice: float = 0, stops: bool = False) -> float:
    """As `closed`, of one run drawn at random. notice: seconds before each failure that it is known; then a save is made at
    once, and the run goes on until the machine is gone or, where it `stops`, recovers as soon as that is committed."""
    rng = np.random.default_rng(seed)
    up = rng.exponential(mtbf, int(2 * days * DAY / mtbf + 100))  # from one failure to the next
    trained = up - p.recovery  # below 0: it failed again before it went on
    period = p.interval + p.cost
    lasting = np.maximum(0, (trained + p.cost - p.committed) // period) * p.interval
    if notice >= p.committed:
        at = np.maximum(0, trained - notice)
        done = at // period * p.interval + np.minimum(at % period, p.interval)
        lasting = done if stops else np.maximum(lasting, done)
        up = np.where(at > 0, up - notice + p.committed, up) if stops else up
    over = int(np.searchsorted(np.cumsum(up), days * DAY)) + 1
    return float(lasting[:over].sum() / up[:over].sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="costs of a small model, few seeds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--workers", type=int, default=1024, help="GPUs")
    parser.add_argument("--storage", type=float, default=1.0, help="GB/s a node, writing and reading")
    parser.add_argument("--recovery", type=float, default=150.0, help="seconds from a failure to the step that goes on")
    parser.add_argument("--slower", type=float, default=0.05, help="of a step, while a save is written beside it")
    parser.add_argument("--days", type=float, default=54.0)
    a = parser.parse_args()
    here = checkpoint.measured(checkpoint.QUICK if a.quick else checkpoint.FULL)
    seeds = range(20 if a.quick else 200)

    share = a.parameters * BYTES / a.workers  # bytes of a worker
    scale = share / (here["mb"] * 1e6 / checkpoint.WORKERS)
    passing = share * NODE / (a.storage * 1e9)  # of a node's bytes through its way to the storage
    stall, committed = here["stall"] * scale, here["sync"] * scale + 2 * passing
    cost = stall + a.slower * committed
    naive = here["plain_save"] * scale + passing
    inputs = [
        ("workers", f"{a.workers:,} GPUs, {NODE} a node", "given"),
        ("bytes of a worker", f"{share / 1e9:.2f} GB", f"{a.parameters / 1e9:g}e9 parameters, {BYTES} bytes each"),
        ("call of a save", f"{stall:.2f} s", f"measured {here['stall']:.3f} s for {here['mb'] / checkpoint.WORKERS:,.0f} MB"),
        ("through the storage", f"{passing:.1f} s", f"assumed {a.storage:g} GB/s a node: Llama 3's 2 TB/s for 2,048 nodes"),
        ("until committed", f"{committed:.1f} s", f"measured {here['sync']:.3f} s, scaled, and twice through the storage"),
        ("steps beside it", f"{a.slower:.0%} slower", "assumed: the GPUs' nodes have cores to spare, this machine has none"),
        ("cost of a save", f"{cost:.2f} s", "call, and what the steps beside it take longer"),
        ("recovery", f"{a.recovery:g} s", "assumed: detection, restart, restore, warm-up"),
        ("naive: a save, recovery", f"{naive:.1f} s, 20 min", f"dcp.save here {here['plain_save']:.3f} s, waited for, hourly"),
        ("each simulation", f"{a.days:g} days", f"mean of {len(seeds)} seeds"),
    ]  # fmt: skip
    measure.show("SIMULATION: inputs", ("what", "value", "from"), inputs)

    nodes = a.workers / NODE
    failures = {
        "Llama 3: 419 in 54 days of 16,384 GPUs": Checkpoint().mtbf_hours * HOUR / a.workers,
        "Meta RSC-1: 6.5 in 1,000 node-days": 1000 / 6.5 * DAY / nodes,
        "Meta RSC-1: 7.9 h, seen at 1,024 GPUs": 7.9 * HOUR * 1024 / a.workers,
        "spot: 5% of the nodes a day": 20 * DAY / nodes,
    }
    rows, ours, plain = [], [], []
    for name, mtbf in failures.items():
        p = Policy(best_seconds(cost, mtbf, committed), cost, committed, a.recovery)
        for who, policy, found in (("ours", p, ours), ("naive", Policy(HOUR, naive, naive, 20 * 60), plain)):
            drawn = [simulated(policy, mtbf, a.days, seed) for seed in seeds]
            found.append(sum(drawn) / len(drawn))
            every = f"{policy.interval / 60:.1f} min"
            exact = f"{closed(policy, mtbf):.2%}"
            rows.append((name, f"{mtbf / HOUR:.1f}", who, every, f"{found[-1]:.2%}", f"{min(drawn):.2%}", exact))
    columns = ("failures", "hours between", "", "saves each", "effective time", "worst seed", "closed form")
    measure.show("SIMULATION: the part of the time whose steps last", columns, rows)

    spot = {
        "no notice": (0.0, False), f"{NOTICE:g} s: a save at once, on until the machine is gone": (NOTICE, False),
        f"{NOTICE:g} s: ours, and a second save as late as it is safe": (2 * committed + MARGIN, False),
        f"{NOTICE:g} s: a save at once, then anew without it": (NOTICE, True),
    }  # fmt: skip
    lost = []
    for what, (notice, stops) in spot.items():
        drawn = [simulated(p, mtbf, a.days, seed, notice, stops) for seed in seeds]
        mean = sum(drawn) / len(drawn)
        lost.append((what, f"{mean:.2%}", f"{(1 - mean) * mtbf:.0f} s"))
    measure.show("SIMULATION: what a spot notice saves", ("notice", "effective time", "lost a failure, saves included"), lost)
    claims = [
        measure.claim(f"effective_time_{a.workers}", ours[0], None, 0.98),
        measure.claim(f"effective_time_{a.workers}_spot", ours[-1], None, 0.93),
        measure.claim(f"lost_time_{a.workers}_vs_naive", 1 - ours[0], 1 - plain[0], 0.5, at_most=True),
    ]
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
