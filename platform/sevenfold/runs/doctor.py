"""What is wrong with this machine, a running cluster, a cluster.yaml, a recipe: a line a look, then its mistakes."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable

import psutil
import ray

import sevenfold
from sevenfold import storage
from sevenfold.data.stream import TASK_CPUS
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

SHM = "/dev/shm"  # noqa: S108
FREE_GB, FILES, SHM_GB = 5, 4096, 0.5  # below it a run may not end
Looked = tuple[str, list[str]]  # what was looked at; what is wrong with it


def run(recipe: Recipe | None, cluster_file: str | None, address: str | None) -> None:
    """Prints what was found. Raises InputError where anything is wrong."""
    looks: list[Callable[[], Looked]] = [machine]
    if recipe is not None:
        looks.append(lambda: _recipe(recipe))
    if cluster_file is not None:
        looks.append(lambda: _cluster_file(cluster_file, recipe))
    if address is not None:
        looks.append(lambda: running(address, recipe))
    wrong = 0
    for look in looks:
        what, found = look()
        say(f"{'wrong' if found else 'well'}: {what}")
        for line in found:
            say(f"  {line}")
        wrong += len(found)
    if wrong:
        raise InputError(f"{wrong} mistakes found")


def machine() -> Looked:
    import torch

    memory, disk = psutil.virtual_memory().total / 1e9, shutil.disk_usage(storage.home()).free / 1e9
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{n} x {name}" for name, n in Counter(gpus).items()) or "no GPU"
    what = (
        f"this machine: {os.cpu_count()} cores, {memory:.0f} GB, {kinds}, {disk:.0f} GB free at {storage.home()}; Python "
        f"{sys.version.split()[0]}, sevenfold {sevenfold.__version__}, ray {ray.__version__}, torch {torch.__version__}"
    )
    wrong = []
    if disk < FREE_GB:
        wrong.append(
            f"{storage.home()}: expected {FREE_GB} GB free for checkpoints, found {disk:.1f}: make room, or `storage: ...`"
        )
    if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < FILES:
        wrong.append(f"open files: expected a limit of {FILES} or more, found {files}: ulimit -n 65536")
    if os.path.isdir(SHM) and (shm := shutil.disk_usage(SHM).total / 1e9) < SHM_GB:
        wrong.append(f"{SHM}: expected {SHM_GB} GB for Ray's object store, found {shm:.2f}: docker run --shm-size=10gb")
    if os.path.exists("/proc/driver/nvidia/version") and not gpus:
        wrong.append(f"an NVIDIA driver, and no GPU that torch {torch.__version__} can use: install a build with CUDA")
    return what, wrong


def _recipe(recipe: Recipe) -> Looked:
    from sevenfold.runs import prepare

    try:
        prepare.check(recipe)
        prepare.inputs(recipe)
    except (InputError, RunError) as e:
        return f"recipe {recipe.name}", [str(e)]
    return f"recipe {recipe.name}: {recipe.workers[0]} workers, its model and its data are there", []


def _cluster_file(path: str, recipe: Recipe | None) -> Looked:
    from sevenfold.doctor import cluster_file

    found = cluster_file.findings(cluster_file.read(path), recipe)
    what = path if recipe is None else f"{path}, for {recipe.name}"
    return what, [f"{path}: {where}: {said}" for where, said in found]


def running(address: str, recipe: Recipe | None) -> Looked:
    """A cluster whose head answers at host:port."""
    from sevenfold.runs import cluster

    os.environ["RAY_ADDRESS"] = address
    cluster.connect()
    try:
        nodes = [n for n in ray.nodes() if n["Alive"]]
        heads = [n for n in nodes if "node:__internal_head__" in n["Resources"]]
        total = ray.cluster_resources()
        what = f"cluster {address}: {len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        wrong = []
        if len(nodes) > 1 and any(n["Resources"].get("CPU") for n in heads):
            wrong.append("the head takes work: its end ends the cluster: ray start --head --num-cpus=0")
        if os.environ.get("RAY_AUTH_MODE") != "token":
            wrong.append("no token is asked for: who reaches a port may run what they like: RAY_AUTH_MODE=token")
        if recipe is not None:
            c, workers = recipe.cluster, recipe.workers[0]
            data = TASK_CPUS if recipe.data.executor == "ray" else 0
            have = cluster.room({"CPU": c.cpus_per_worker + data, "GPU": c.gpus_per_worker}, 1)
            if have < workers:
                wrong.append(f"{recipe.name} needs {workers} workers; this cluster holds, or can scale to, {have}")
        return what, wrong
    finally:
        ray.shutdown()
