"""What a checkpoint costs the training, and how fast it is written, verified and restored: engine/checkpoint.py as it is.

    python benchmarks/checkpoint.py [--quick] [--json FILE]

Two processes, FSDP2 over gloo, one thread each, a decoder with AdamW's state, a temporary folder on this machine's disk. The
sides take turns: a save that is waited for, the call of one alone, one beside steps, torch's own dcp.save and dcp.load. What
is read to restore was dropped from the page cache before. Time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))
WORKERS, LENGTH, ROWS = 2, 128, 2  # rows a worker and step
GOAL = 0.05  # of a synchronous save
FREE = 2  # steps a round without a save


class Size(NamedTuple):
    hidden: int
    layers: int
    vocabulary: int
    rounds: int


FULL, QUICK = Size(768, 12, 32_000, 5), Size(384, 6, 8192, 2)


def recipe_of(size: Size) -> dict[str, Any]:
    return {
        "name": "checkpoint",
        "data": {"sources": [{"path": "none"}], "sequence_length": LENGTH},
        "tokenizer": {"vocab_size": size.vocabulary},
        "model": {"config": {
            "model_type": "llama", "hidden_size": size.hidden, "intermediate_size": size.hidden * 8 // 3 // 32 * 32,
            "num_hidden_layers": size.layers, "num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True,
        }},
        "train": {"global_batch": ROWS * WORKERS, "micro_batch": ROWS, "steps": 1},
        "cluster": {"num_workers": WORKERS},
    }  # fmt: skip


def rank_of(rank: int, size: Size, at: str) -> None:
    """Measures on one rank; the first writes out.json."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from sevenfold.engine import checkpoint as ckpt
    from sevenfold.engine import cpu, optim
    from sevenfold.engine.batch import Batch
    from sevenfold.engine.objectives import Causal, Words, attach
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel
    from sevenfold.recipe import Recipe

    dist.init_process_group("gloo", init_method=f"file://{at}/store", rank=rank, world_size=WORKERS)
    cpu.prepare(threads=1)
    recipe = Recipe.model_validate(recipe_of(size))
    model: Any = build.build(recipe, build.config_of(recipe, size.vocabulary), weights=rank == 0)
    attach(model, Causal(Words(size.vocabulary), 0, 0.15, 3), recipe.train.loss_chunk)
    parameters = sum(p.numel() for p in model.parameters())
    model = parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
    optimizers = optim.build(model, recipe.optimizer)
    ids = torch.randint(size.vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
    edges = torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32)
    batch = Batch(ids, torch.arange(LENGTH).repeat(ROWS, 1), ids, edges)
    seen = defaultdict[str, list[float]](list)

    def most(value: float) -> float:
        of_all = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
        return float(of_all)

    def timed(work: Callable[[], Any], name: str | None = None) -> float:
        dist.barrier()
        begin = time.perf_counter()
        work()
        seconds = most(time.perf_counter() - begin)
        if name:
            seen[name].append(seconds)
        return seconds

    def step() -> float:
        return timed(lambda: train_step(model, [batch], optimizers, 1e-4, 1.0))

    saves = 0

    def save() -> None:
        nonlocal saves
        saves += 1
        saver.save(saves, model, optimizers, {})

    def beside() -> None:
        """Steps while a save is under way on any rank; what they took longer than others, and the save's call."""
        taken = [timed(save)]
        while most(saver.under_way):
            taken.append(step())
        free = measure.median(seen["step"])
        seen["beside"].append(sum(taken[1:]) / max(1, len(taken) - 1))
        seen["cost"].append(sum(taken) - free * (len(taken) - 1))
        seen["beside_commit"].append(most(saver.seconds))

    def plain_save() -> None:
        weights, state = get_state_dict(model, optimizers)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{at}/plain")

    def plain_load() -> None:
        weights, state = get_state_dict(model, optimizers)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{at}/plain")
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state)

    for _ in range(3):
        step()
    folder = f"{at}/checkpoints"
    saver = ckpt.Saver(folder, keep=1)
    timed(save, "first_stall")
    saver.wait()
    for _ in range(size.rounds):
        seen["step"] += [step() for _ in range(FREE)]
        timed(lambda: (save(), saver.wait()), "sync")
        step()
        timed(save, "stall")
        saver.wait()
        step()
        beside()
        saver.wait()
        timed(plain_save, "plain_save")

        found = saver.last
        assert found is not None
        mine = [name for name in found.files if name.startswith(f"__{rank}_")]
        timed(lambda: ckpt.verify(found, mine), "read_back")  # noqa: B023  as a save does, by way of the page cache
        forget(folder, f"{at}/plain")
        timed(lambda: ckpt.latest(folder), "verify")
        forget(folder)
        timed(lambda: ckpt.load(ckpt.latest(folder), model, optimizers), "restore")  # type: ignore[arg-type]
        timed(plain_load, "plain_load")
        dist.barrier()
        if rank == 0:
            shutil.rmtree(f"{at}/plain")
    size_mb = sum(f["bytes"] for f in found.files.values()) / 1e6
    kept = bytes(100_000_000)
    rate = len(kept) / 1e6 / timed(lambda: hashlib.sha256(kept).digest())
    saver.close()
    dist.destroy_process_group()
    if rank == 0:
        medians = {k: measure.median(v) for k, v in seen.items()}
        out = {**medians, "mb": size_mb, "sha256_mb_s": rate, "parameters": parameters}
        Path(at, "out.json").write_text(json.dumps(out))


def forget(*folders: str) -> None:
    """Drops a folder's files, which are on the disk already, from the page cache."""
    for path in (p for folder in folders for p in Path(folder).rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(size: Size) -> dict[str, float]:
    """Medians in seconds (of the slowest rank), and: mb of a checkpoint, sha256_mb_s of a core, parameters."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory(prefix="checkpoint-") as at:
        mp.start_processes(rank_of, (size, at), WORKERS, start_method="spawn")
        return dict(json.loads(Path(at, "out.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small model, few rounds; too small to judge the claims by")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    m = measured(QUICK if a.quick else FULL)
    sums = m["mb"] / WORKERS / m["sha256_mb_s"]
    rows = [
        ("save, until committed", "sync", f"sums, reading back and sums again: {(sums + m['read_back']) / m['sync']:.0%}"),
        ("dcp.save", "plain_save", "torch's own"),
        ("call of a save, the first", "first_stall", "allocates its copy's memory"),
        ("call of a save", "stall", f"{m['stall'] / m['sync']:.1%} of a save that is waited for"),
        ("save beside steps, until committed", "beside_commit", ""),
        ("what that takes from the training", "cost", f"steps of {m['step']:.3f} s take {m['beside']:.3f} s beside it"),
        ("verify, from the disk", "verify", "ckpt.latest"),
        ("verify and restore, from the disk", "restore", "ckpt.latest, ckpt.load"),
        ("dcp.load, from the disk", "plain_load", "torch's own: verifies nothing"),
    ]
    title = f"{m['parameters'] / 1e6:.0f}M parameters with AdamW's state, {m['mb']:,.0f} MB, {WORKERS} workers"
    cells = [(name, f"{m[key]:.3f}", f"{m['mb'] / m[key]:,.0f}", note) for name, key, note in rows]
    measure.show(title, ("what", "seconds", "MB/s of both workers", ""), cells)
    claims = [
        measure.claim("stall_vs_sync", m["stall"], m["sync"], GOAL, at_most=True),
        # also where the training leaves no core to it, as here, a save beside the steps must be the cheaper one
        measure.claim("cost_beside_vs_sync", m["cost"], m["sync"], 1.0, at_most=True),
        # more by two sums and one reading of each byte, and the removal of the one before
        measure.claim("save_vs_dcp", m["sync"], m["plain_save"], 2.0, at_most=True),
        # one reading and one sum more; the second reading is the page cache's
        measure.claim("restore_vs_dcp", m["restore"], m["plain_load"], 2.0, at_most=True),
        measure.claim("verify_mb_per_s", m["mb"] / m["verify"], None, 500),
        measure.claim("restore_mb_per_s", m["mb"] / m["restore"], None, 300),
    ]
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
