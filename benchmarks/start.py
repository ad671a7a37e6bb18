"""From a command to the first optimizer step: a small decoder on two workers, on this machine.

    python benchmarks/start.py [--quick] [--json FILE]

Ours is `jobs/pretrain.py` as it is, up to the first line of the log: Ray Data, tokenizer, ledger. Ray Train alone and torchrun
train the same model with FSDP2 on tokens drawn at random: what nobody can be quicker than.
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
    """The first optimizer step of a rank whose process group is there."""
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
        address="local", num_cpus=8, runtime_env={"env_vars": {"SEVENFOLD_FIRST_STEP": os.environ["SEVENFOLD_FIRST_STEP"]}}
    )
    TorchTrainer(one_step, scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 1})).fit()


def torchrun() -> None:
    import torch

    torch.distributed.init_process_group("gloo")
    one_step()
    torch.distributed.destroy_process_group()


SIDES = {"ray_train": ray_train, "torchrun": torchrun}


def until(seen: Path, words: list[Any], **env: str) -> float:
    """Seconds from the start of a command until the file is there and not empty, or was touched; waits for its end."""
    begin = time.perf_counter()
    process = subprocess.Popen(words, env={**os.environ, **env}, stdout=sys.stderr)
    took = None
    while process.poll() is None:
        if took is None and seen.exists():
            took = time.perf_counter() - begin
        time.sleep(0.02)
    if process.returncode or took is None:
        raise RuntimeError(f"{words}: exit {process.returncode}, first step {took}")
    return took


def ours(folder: Path) -> float:
    with tempfile.TemporaryDirectory() as at:
        tree = step.recipe_of(step.QUICK, WORKERS, 1, False) | {"tokenizer": {"path": str(folder / "tokenizer")}}
        tree["train"]["steps"] = STEPS
        return until(Path(at) / "step/metrics.jsonl", step.job(folder, tree, Path(at)))


def peer(side: str) -> float:
    with tempfile.TemporaryDirectory() as at:
        words: list[Any] = [sys.executable]
        if side == "torchrun":
            words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
        seen = Path(at) / "first"
        return until(seen, [*words, HERE, "--side", side], SEVENFOLD_FIRST_STEP=str(seen), OMP_NUM_THREADS="1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help="how the script calls itself")
    a = parser.parse_args()
    if a.side:
        SIDES[a.side]()
        return 0
    os.environ.update(step.ENV)
    with tempfile.TemporaryDirectory(prefix="start-") as at:
        step.prepare(Path(at), step.QUICK)
        sides: dict[str, Callable[[], float]] = {
            "ours": partial(ours, Path(at)), "Ray Train": partial(peer, "ray_train"), "torchrun": partial(peer, "torchrun"),
        }  # fmt: skip
        found = measure.interleaved(sides, 1 if a.quick else 5)
    medians = {k: measure.median(v) for k, v in found.items()}
    rows = [(k, f"{v:.1f}", f"{min(found[k]):.1f}-{max(found[k]):.1f}") for k, v in medians.items()]
    measure.show("command to first optimizer step, two workers", ("", "seconds", "of"), rows)
    claims = [
        measure.claim("start_vs_ray_train", medians["ours"], medians["Ray Train"], 1.0, at_most=True),
        measure.claim("start_seconds", medians["ours"], None, GOAL, at_most=True),
    ]
    return 0 if measure.report(claims, a.json) or a.quick else 1


if __name__ == "__main__":
    sys.exit(main())
