"""Checks that faults do not change results, and that damaged checkpoints are detected.

    python benchmarks/faults.py [--quick] [--faults A,B] [--json FILE]

Runs on several Ray nodes of this machine are trained under each fault and compared with an
undisturbed run, as `sevenfold drill` does, with two more faults: a full disk (a tmpfs, which only
root can mount), and an S3 server (moto's) that does not respond for 30 s. Then a checkpoint is
damaged a thousand times. --quick: a worker and a driver are killed, a hundred damages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from sevenfold.engine.checkpoint import checkpoint_paths, latest_checkpoint
from sevenfold.faults import drill, inject
from sevenfold.faults.inject import Fault, Scene
from sevenfold.faults.nodes import LocalNodes
from sevenfold.recipe import Recipe

AWAY = 30  # seconds for which the storage does not respond
DISK_MB = 192


def recipe_of(root: Path) -> Recipe:
    """Returns the recipe of a decoder of 1M parameters, trained on Python's standard library."""
    with open(root / "text.jsonl", "w", encoding="utf-8") as f:
        for package in ("json", "email", "http", "logging", "asyncio", "unittest"):
            for path in sorted(Path(sysconfig.get_paths()["stdlib"], package).glob("*.py")):
                f.write(json.dumps({"text": path.read_text(encoding="utf-8")[:20_000]}) + "\n")
    model = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    tree: dict[str, Any] = {
        "name": "faults",
        "storage": str(root / "runs"),
        "seed": 7,
        "data": {
            "sources": [{"path": str(root / "text.jsonl")}],
            "sequence_length": 128,
            "lanes": 4,
        },
        "tokenizer": {"vocab_size": 1024, "train_mb": 0.3},
        "model": {"config": model},
        "train": {"global_batch": 32, "micro_batch": 8, "steps": drill.STEPS},
        "optimizer": {"learning_rate": 1e-3},
        "cluster": {"num_workers": 2},
    }
    return Recipe.model_validate(tree)


def disk_full(mount_point: Path) -> Fault:
    """Fills the disk of the run folder until the run reports it, or for a minute."""

    def inject_fault(scene: Scene) -> None:
        ballast = mount_point / "ballast"
        with open(ballast, "wb", buffering=0) as f, contextlib.suppress(OSError):
            while f.write(bytes(1 << 16)):
                pass
        begin = time.monotonic()
        while time.monotonic() - begin < 60 and not any(
            "could not be written" in line for line in scene.run.lines
        ):
            time.sleep(0.1)
        ballast.unlink()

    return Fault("the disk is full", inject_fault, bears=True, storage=str(mount_point))


@contextlib.contextmanager
def disk(root: Path) -> Iterator[Fault | None]:
    mount_point = root / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", mount_point],
        capture_output=True,
    )
    if mounted.returncode:
        print(f"skipped: the disk is full ({mounted.stderr.decode().strip()})")
        yield None
        return
    try:
        yield disk_full(mount_point)
    finally:
        subprocess.run(["umount", "-l", mount_point])


@contextlib.contextmanager
def s3() -> Iterator[Fault | None]:
    """Starts an S3 server with a bucket, and sets the environment variables that lead to it."""
    program = shutil.which("moto_server", path=os.path.dirname(sys.executable))
    if program is None:
        print("skipped: the storage does not respond (moto_server is not installed)")
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    while True:
        with contextlib.suppress(OSError):
            request = urllib.request.Request(f"{address}/bucket", method="PUT")  # noqa: S310 (our own)
            urllib.request.urlopen(request).close()  # noqa: S310
            break
        time.sleep(0.1)

    def inject_fault(scene: Scene) -> None:
        server.send_signal(signal.SIGSTOP)
        time.sleep(AWAY)
        server.send_signal(signal.SIGCONT)

    try:
        yield Fault(
            f"the storage (S3) does not respond for {AWAY} s",
            inject_fault,
            bears=True,
            storage="s3://bucket/runs",
        )
    finally:
        server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait(20)


def corruptions(folder: str, count: int) -> tuple[int, int]:
    """Damages the latest checkpoint of a run again and again, each time starting from a valid one.

    Returns:
        How many damages were detected (or left everything that the manifest lists unchanged), and
        after how many the previous checkpoint was used.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy = str(shutil.copytree(folder, Path(temporary, "checkpoints")))
        previous, latest = map(Path, list(checkpoint_paths(copy).values())[-2:])
        valid = {p.name: p.read_bytes() for p in latest.iterdir()}
        undamaged = latest_checkpoint(copy)
        detected = recovered = 0
        for seed in range(count):
            rng = random.Random(seed)  # noqa: S311
            inject.damage(str(latest), rng.choice(inject.DAMAGES), rng, str(previous))
            last = latest_checkpoint(copy, lambda _: None)
            skipped = last is not None and last.path == str(previous)
            detected += skipped or last == undamaged
            recovered += skipped
            for name, raw in valid.items():
                (latest / name).write_bytes(raw)
    return detected, recovered


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--faults", default="", help="only these faults, separated by commas")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    count = 100 if a.quick else 1000
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as temporary,
        disk(Path(temporary)) as full,
        s3() as outage,
    ):
        chosen = inject.FAULTS | {name: f for name, f in (("disk", full), ("storage", outage)) if f}
        names = ["worker", "driver"] if a.quick else list(chosen)
        names = a.faults.split(",") if a.faults else names
        recipe = recipe_of(Path(temporary))
        nodes = LocalNodes(recipe.cluster.cpus_per_worker)
        try:
            runs = drill.Drill(recipe, nodes)
            outcomes = runs.all({name: chosen[name] for name in names})
        finally:
            nodes.close()
        detected, recovered = corruptions(runs.folder("drill").checkpoints, count)
    drill.show(outcomes)
    print(
        f"{count} damages: {detected} detected, {recovered} recovered from; the others changed "
        "nothing that the manifest lists"
    )
    claims = [
        measure.claim("all_identical", sum(o.passed for o in outcomes), len(outcomes), 1.0),
        measure.claim("corruptions_detected", detected, count, 1.0),
    ]
    return 0 if measure.report(claims, a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
