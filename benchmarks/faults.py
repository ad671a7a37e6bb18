"""Whether a fault shows: runs on several Ray nodes of this machine under each fault, against one that was left alone; and a
thousand damaged checkpoints.

    python benchmarks/faults.py [--quick] [--faults A,B] [--json FILE]

As `sevenfold drill`, and two faults more: a disk that is full (a tmpfs, for root alone), an S3 (moto's) that answers nothing
for 30 s. --quick: a worker and a driver killed, a hundred corruptions.
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

from sevenfold.engine import checkpoint as ckpt
from sevenfold.recipe import Recipe
from sevenfold.runs import drill, faults
from sevenfold.runs.faults import Fault, Scene
from sevenfold.runs.nodes import LocalNodes

AWAY = 30  # seconds that the storage answers nothing
DISK_MB = 192


def recipe_of(root: Path) -> Recipe:
    """A decoder of 1M parameters, on the source of Python's library."""
    with open(root / "text.jsonl", "w", encoding="utf-8") as f:
        for package in ("json", "email", "http", "logging", "asyncio", "unittest"):
            for path in sorted(Path(sysconfig.get_paths()["stdlib"], package).glob("*.py")):
                f.write(json.dumps({"text": path.read_text(encoding="utf-8")[:20_000]}) + "\n")
    model = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}  # fmt: skip
    tree: dict[str, Any] = {
        "name": "faults", "storage": str(root / "runs"), "seed": 7,
        "data": {"sources": [{"path": str(root / "text.jsonl")}], "sequence_length": 128, "lanes": 4},
        "tokenizer": {"vocab_size": 1024, "train_mb": 0.3}, "model": {"config": model},
        "train": {"global_batch": 32, "micro_batch": 8, "steps": drill.STEPS}, "optimizer": {"learning_rate": 1e-3},
        "cluster": {"num_workers": 2},
    }  # fmt: skip
    return Recipe.model_validate(tree)


def disk_full(place: Path) -> Fault:
    """The disk that the run is kept on takes nothing until it has said so, or for a minute."""

    def do(scene: Scene) -> None:
        ballast = place / "ballast"
        with open(ballast, "wb", buffering=0) as f, contextlib.suppress(OSError):
            while f.write(bytes(1 << 16)):
                pass
        begin = time.monotonic()
        while time.monotonic() - begin < 60 and not any("could not be written" in line for line in scene.run.lines):
            time.sleep(0.1)
        ballast.unlink()

    return Fault("the disk is full", do, bears=True, storage=str(place))


@contextlib.contextmanager
def disk(root: Path) -> Iterator[Fault | None]:
    place = root / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        print(f"left out: the disk is full ({mounted.stderr.decode().strip()})")
        yield None
        return
    try:
        yield disk_full(place)
    finally:
        subprocess.run(["umount", "-l", place])


@contextlib.contextmanager
def s3() -> Iterator[Fault | None]:
    """A bucket of a server in a process of its own, and the environment that leads to it."""
    program = shutil.which("moto_server", path=os.path.dirname(sys.executable))
    if program is None:
        print("left out: the storage is away (moto_server is not installed)")
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    while True:
        with contextlib.suppress(OSError):
            request = urllib.request.Request(f"{address}/bucket", method="PUT")  # noqa: S310 (our own)
            urllib.request.urlopen(request).close()  # noqa: S310
            break
        time.sleep(0.1)

    def do(scene: Scene) -> None:
        server.send_signal(signal.SIGSTOP)
        time.sleep(AWAY)
        server.send_signal(signal.SIGCONT)

    try:
        yield Fault(f"the storage (S3) answers nothing for {AWAY} s", do, bears=True, storage="s3://bucket/runs")
    finally:
        server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait(20)


def corruptions(folder: str, count: int) -> tuple[int, int]:
    """Seeded damage to the newest of a run's checkpoints, each from the sound one again. Returns how many were found (or
    changed nothing that the manifest says), and after how many the one before was used."""
    with tempfile.TemporaryDirectory() as at:
        copy = str(shutil.copytree(folder, Path(at, "checkpoints")))
        before, newest = map(Path, list(ckpt.steps(copy).values())[-2:])
        sound, whole = {p.name: p.read_bytes() for p in newest.iterdir()}, ckpt.latest(copy)
        found = recovered = 0
        for seed in range(count):
            rng = random.Random(seed)  # noqa: S311
            faults.damage(str(newest), rng.choice(faults.DAMAGES), rng, str(before))
            last = ckpt.latest(copy, lambda _: None)
            passed_over = last is not None and last.path == str(before)
            found += passed_over or last == whole
            recovered += passed_over
            for name, raw in sound.items():
                (newest / name).write_bytes(raw)
    return found, recovered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--faults", default="", help="some of them")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    count = 100 if a.quick else 1000
    with tempfile.TemporaryDirectory(prefix="faults-") as at, disk(Path(at)) as full, s3() as away:
        chosen = faults.FAULTS | {name: f for name, f in (("disk", full), ("storage", away)) if f}
        names = ["worker", "driver"] if a.quick else list(chosen)
        names = a.faults.split(",") if a.faults else names
        recipe = recipe_of(Path(at))
        nodes = LocalNodes(recipe.cluster.cpus_per_worker)
        try:
            drilled = drill.Drill(recipe, nodes)
            outcomes = drilled.all({name: chosen[name] for name in names})
        finally:
            nodes.close()
        found, recovered = corruptions(drilled.folder("drill").checkpoints, count)
    drill.show(outcomes)
    print(f"{count} corruptions: {found} found, {recovered} recovered from; the others changed no word of the manifest")
    claims = [
        measure.claim("all_identical", sum(o.passed for o in outcomes), len(outcomes), 1.0),
        measure.claim("corruptions_detected", found, count, 1.0),
    ]
    return 0 if measure.report(claims, a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
