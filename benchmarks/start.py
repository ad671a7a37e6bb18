"""Measures the time from a command to the first optimizer step: a small decoder on two workers.

    python benchmarks/start.py [--quick] [--json FILE]

Ours is `jobs/pretrain.py` with Ray Data, tokenizer and ledger, until the first line of the log. Ray
Train alone and torchrun train the same model with FSDP2 on random tokens: the lower bounds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import step

HERE = Path(__file__).resolve()
WORKERS, STEPS = 2, 2
GOAL = 12.0  # seconds


def one_step(*_: Any) -> None:
    """Runs the first optimizer step of a rank that has a process group."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    tree = dict(step.recipe_of(step.QUICK, WORKERS, 1, False)["model"]["config"])
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(tree.pop("model_type"), vocab_size=step.QUICK.vocabulary, **tree)
    )
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, step.QUICK.vocabulary, (step.QUICK.rows // WORKERS, step.LENGTH))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if torch.distributed.get_rank() == 0:
        Path(os.environ["SEVENFOLD_FIRST_STEP"]).touch()


def ray_train() -> None:
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(
        address="local",
        num_cpus=8,
        runtime_env={"env_vars": {"SEVENFOLD_FIRST_STEP": os.environ["SEVENFOLD_FIRST_STEP"]}},
    )
    TorchTrainer(
        one_step, scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 1})
    ).fit()


def torchrun() -> None:
    import torch

    torch.distributed.init_process_group("gloo")
    one_step()
    torch.distributed.destroy_process_group()


SIDES = {"ray_train": ray_train, "torchrun": torchrun}


def until(path: Path, command: list[Any], **env: str) -> float:
    """Runs a command, and returns the seconds from its start until a file exists."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=sys.stderr)
    seconds = None
    while process.poll() is None:
        if seconds is None and path.exists():
            seconds = time.perf_counter() - begin
        time.sleep(0.02)
    if process.returncode or seconds is None:
        raise RuntimeError(f"{command}: exit {process.returncode}, first step {seconds}")
    return seconds


def ours(folder: Path) -> float:
    with tempfile.TemporaryDirectory() as temporary:
        tree = step.recipe_of(step.QUICK, WORKERS, 1, False) | {
            "tokenizer": {"path": str(folder / "tokenizer")}
        }
        tree["train"]["steps"] = STEPS
        return until(
            Path(temporary) / "step/metrics.jsonl", step.job(folder, tree, Path(temporary))
        )


def peer(side: str) -> float:
    with tempfile.TemporaryDirectory() as temporary:
        command: list[Any] = [sys.executable]
        if side == "torchrun":
            command += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={WORKERS}",
            ]
        marker = Path(temporary) / "first"
        return until(
            marker,
            [*command, HERE, "--side", side],
            SEVENFOLD_FIRST_STEP=str(marker),
            OMP_NUM_THREADS="1",
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help="used by the script itself")
    a = parser.parse_args()
    if a.side:
        SIDES[a.side]()
        return 0
    os.environ.update(step.ENV)
    with tempfile.TemporaryDirectory(prefix="start-") as temporary:
        step.prepare(Path(temporary), step.QUICK)
        sides: dict[str, Callable[[], float]] = {
            "ours": partial(ours, Path(temporary)),
            "Ray Train": partial(peer, "ray_train"),
            "torchrun": partial(peer, "torchrun"),
        }
        results = measure.interleaved(sides, 1 if a.quick else 5)
    medians = {k: measure.median(v) for k, v in results.items()}
    rows = [
        (k, f"{v:.1f}", f"{min(results[k]):.1f}-{max(results[k]):.1f}") for k, v in medians.items()
    ]
    measure.show("command to first optimizer step, two workers", ("", "seconds", "of"), rows)
    claims = [
        measure.claim(
            "start_vs_ray_train", medians["ours"], medians["Ray Train"], 1.0, at_most=True
        ),
        measure.claim("start_seconds", medians["ours"], None, GOAL, at_most=True),
    ]
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
