"""Measures what a checkpoint costs the training, and how fast it is written, verified and restored.

    python benchmarks/checkpoint.py [--quick] [--json FILE]

Two processes of one thread train a decoder with AdamW by FSDP2 over gloo, and save it with
sevenfold.engine.checkpoint to a temporary folder on this machine's disk. The cases take turns: a
save that is waited for, the call of a save alone, a save during training steps, and torch's own
dcp.save and dcp.load. Files are dropped from the page cache before they are read. Times are those
of the slowest rank.
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
WORKERS, LENGTH, ROWS = 2, 128, 2  # ROWS: per worker and step
GOAL = 0.05  # the call of a save, as a fraction of a synchronous save
FREE = 2  # steps per round without a save


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
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": size.hidden,
                "intermediate_size": size.hidden * 8 // 3 // 32 * 32,
                "num_hidden_layers": size.layers,
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
                "tie_word_embeddings": True,
            }
        },
        "train": {"global_batch": ROWS * WORKERS, "micro_batch": ROWS, "steps": 1},
        "cluster": {"num_workers": WORKERS},
    }


def rank_of(rank: int, size: Size, at: str) -> None:
    """Runs the measurements on one rank; rank 0 writes the results to out.json."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from sevenfold.engine import cpu, optim
    from sevenfold.engine.batch import Batch
    from sevenfold.engine.checkpoint import (
        CheckpointManager,
        latest_checkpoint,
        load_checkpoint,
        verify_files,
    )
    from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
    from sevenfold.engine.step import train_step
    from sevenfold.model import build, parallel
    from sevenfold.recipe import Recipe

    dist.init_process_group("gloo", init_method=f"file://{at}/store", rank=rank, world_size=WORKERS)
    cpu.prepare(threads=1)
    recipe = Recipe.model_validate(recipe_of(size))
    model: Any = build.build(recipe, build.config_of(recipe, size.vocabulary), weights=rank == 0)
    attach_losses(
        model, Causal(SpecialTokens(size.vocabulary), 0, 0.15, 3), recipe.train.loss_chunk
    )
    parameters = sum(p.numel() for p in model.parameters())
    model = parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
    optimizers = optim.build(model, recipe.optimizer)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(size.vocabulary, (ROWS, LENGTH), generator=generator)
    edges = torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32)
    batch = Batch(ids, torch.arange(LENGTH).repeat(ROWS, 1), ids, edges)
    seconds_of = defaultdict[str, list[float]](list)

    def slowest(value: float) -> float:
        maximum = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        return float(maximum)

    def timed(work: Callable[[], Any], name: str | None = None) -> float:
        dist.barrier()
        begin = time.perf_counter()
        work()
        seconds = slowest(time.perf_counter() - begin)
        if name:
            seconds_of[name].append(seconds)
        return seconds

    def step() -> float:
        return timed(lambda: train_step(model, [batch], optimizers, 1e-4, 1.0))

    saves = 0

    def save() -> None:
        nonlocal saves
        saves += 1
        saver.save(saves, model, optimizers, {})

    def beside() -> None:
        """Trains while a save is written on any rank, and records what the save costs.

        The cost is the duration of the call and the time by which the steps take longer.
        """
        durations = [timed(save)]
        while slowest(saver.saving):
            durations.append(step())
        undisturbed = measure.median(seconds_of["step"])
        seconds_of["beside"].append(sum(durations[1:]) / max(1, len(durations) - 1))
        seconds_of["cost"].append(sum(durations) - undisturbed * (len(durations) - 1))
        seconds_of["beside_commit"].append(slowest(saver.save_seconds))

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
    saver = CheckpointManager(folder, keep=1)
    timed(save, "first_stall")
    saver.wait()
    for _ in range(size.rounds):
        seconds_of["step"] += [step() for _ in range(FREE)]
        timed(lambda: (save(), saver.wait()), "sync")
        step()
        timed(save, "stall")
        saver.wait()
        step()
        beside()
        saver.wait()
        timed(plain_save, "plain_save")

        checkpoint = saver.last
        assert checkpoint is not None
        own_files = [name for name in checkpoint.files if name.startswith(f"__{rank}_")]
        # from the page cache, as a save verifies what it has written
        timed(lambda: verify_files(checkpoint, own_files), "read_back")  # noqa: B023 (called at once)
        forget(folder, f"{at}/plain")
        timed(lambda: latest_checkpoint(folder), "verify")
        forget(folder)
        timed(lambda: load_checkpoint(latest_checkpoint(folder), model, optimizers), "restore")  # type: ignore[arg-type]
        timed(plain_load, "plain_load")
        dist.barrier()
        if rank == 0:
            shutil.rmtree(f"{at}/plain")
    size_mb = sum(f["bytes"] for f in checkpoint.files.values()) / 1e6
    data = bytes(100_000_000)
    rate = len(data) / 1e6 / timed(lambda: hashlib.sha256(data).digest())
    saver.close()
    dist.destroy_process_group()
    if rank == 0:
        medians = {k: measure.median(v) for k, v in seconds_of.items()}
        out = {**medians, "mb": size_mb, "sha256_mb_s": rate, "parameters": parameters}
        Path(at, "out.json").write_text(json.dumps(out))


def forget(*folders: str) -> None:
    """Drops the files of folders, which are on the disk already, from the page cache."""
    for path in (p for folder in folders for p in Path(folder).rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(size: Size) -> dict[str, float]:
    """Runs the measurements in WORKERS processes.

    Returns:
        The median seconds of each case, on the slowest rank; the size of a checkpoint ("mb"), the
        rate of SHA-256 on one core ("sha256_mb_s") and the number of "parameters".
    """
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory(prefix="checkpoint-") as at:
        mp.start_processes(rank_of, (size, at), WORKERS, start_method="spawn")
        return dict(json.loads(Path(at, "out.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small model, few rounds; too small to judge the claims by",
    )
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    m = measured(QUICK if a.quick else FULL)
    sums = m["mb"] / WORKERS / m["sha256_mb_s"]
    rows = [
        (
            "save, until committed",
            "sync",
            f"checksums, reading back, verifying: {(sums + m['read_back']) / m['sync']:.0%}",
        ),
        ("dcp.save", "plain_save", "torch's own"),
        ("call of the first save", "first_stall", "allocates the memory for the copy"),
        ("call of a save", "stall", f"{m['stall'] / m['sync']:.1%} of a synchronous save"),
        ("save during steps, until committed", "beside_commit", ""),
        (
            "training time that it costs",
            "cost",
            f"steps of {m['step']:.3f} s take {m['beside']:.3f} s meanwhile",
        ),
        ("verify, from the disk", "verify", "latest_checkpoint"),
        ("verify and restore, from the disk", "restore", "latest_checkpoint, load_checkpoint"),
        ("dcp.load, from the disk", "plain_load", "torch's own: verifies nothing"),
    ]
    title = (
        f"{m['parameters'] / 1e6:.0f}M parameters with AdamW's state, {m['mb']:,.0f} MB, "
        f"{WORKERS} workers"
    )
    cells = [(name, f"{m[key]:.3f}", f"{m['mb'] / m[key]:,.0f}", note) for name, key, note in rows]
    measure.show(title, ("what", "seconds", "MB/s of both workers", ""), cells)
    claims = [
        measure.claim("stall_vs_sync", m["stall"], m["sync"], GOAL, at_most=True),
        # a save during steps must be cheaper, even if training leaves it no free core, as here
        measure.claim("cost_beside_vs_sync", m["cost"], m["sync"], 1.0, at_most=True),
        # compared with dcp: two more checksums, one more read, and the removal of the previous one
        measure.claim("save_vs_dcp", m["sync"], m["plain_save"], 2.0, at_most=True),
        # compared with dcp: one more read and one more checksum; the second read is cached
        measure.claim("restore_vs_dcp", m["restore"], m["plain_load"], 2.0, at_most=True),
        measure.claim("verify_mb_per_s", m["mb"] / m["verify"], None, 500),
        measure.claim("restore_mb_per_s", m["mb"] / m["restore"], None, 300),
    ]
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
