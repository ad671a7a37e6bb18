"""Checks this machine, a recipe, a cluster.yaml and a running cluster, and prints the problems."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import psutil
import ray

import sevenfold
from sevenfold import storage
from sevenfold.data.stream import TASK_CPUS
from sevenfold.errors import InputError, RunError
from sevenfold.recipe import Recipe
from sevenfold.report.console import say

SHARED_MEMORY = "/dev/shm"  # noqa: S108 (its size is checked, nothing is written there)

# With less than this a run may fail: free disk space, open files, shared memory.
MIN_DISK_GB, MIN_OPEN_FILES, MIN_SHARED_MEMORY_GB = 5, 4096, 0.5


class Check(NamedTuple):
    """The result of one check.

    Attributes:
        subject: What was checked.
        problems: What is wrong with it; empty if nothing is.
    """

    subject: str
    problems: list[str]


def run(recipe: Recipe | None, cluster_file: str | None, address: str | None) -> None:
    """Runs the checks and prints one line per subject, followed by its problems.

    Args:
        recipe: A recipe to check, on its own and against the cluster.
        cluster_file: Path of a cluster.yaml to check.
        address: HOST:PORT of the head of a running cluster to check.

    Raises:
        InputError: There is any problem.
    """
    checks: list[Callable[[], Check]] = [_check_machine]
    if recipe is not None:
        checks.append(lambda: _check_recipe(recipe))
    if cluster_file is not None:
        checks.append(lambda: _check_cluster_file(cluster_file, recipe))
    if address is not None:
        checks.append(lambda: _check_running_cluster(address, recipe))
    count = 0
    for check in checks:
        subject, problems = check()
        say(f"{'FAIL' if problems else 'OK'}: {subject}")
        for problem in problems:
            say(f"  {problem}")
        count += len(problems)
    if count:
        raise InputError("1 problem found" if count == 1 else f"{count} problems found")


def _check_machine() -> Check:
    import torch

    memory = psutil.virtual_memory().total / 1e9
    disk = shutil.disk_usage(storage.home()).free / 1e9
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpu_counts = ", ".join(f"{n} x {name}" for name, n in Counter(gpus).items()) or "no GPU"
    subject = (
        f"this machine: {os.cpu_count()} cores, {memory:.0f} GB, {gpu_counts}, {disk:.0f} GB free "
        f"at {storage.home()}; Python {sys.version.split()[0]}, sevenfold {sevenfold.__version__}, "
        f"ray {ray.__version__}, torch {torch.__version__}"
    )
    problems = []
    if disk < MIN_DISK_GB:
        problems.append(
            f"{storage.home()}: expected {MIN_DISK_GB} GB free for checkpoints, found {disk:.1f}: "
            "free some space, or set `storage: ...` in the recipe"
        )
    if (open_files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < MIN_OPEN_FILES:
        problems.append(
            f"open files: expected a limit of at least {MIN_OPEN_FILES}, found {open_files}: run "
            "`ulimit -n 65536`"
        )
    if os.path.isdir(SHARED_MEMORY):
        shared_memory = shutil.disk_usage(SHARED_MEMORY).total / 1e9
        if shared_memory < MIN_SHARED_MEMORY_GB:
            problems.append(
                f"{SHARED_MEMORY}: expected {MIN_SHARED_MEMORY_GB} GB for Ray's object store, "
                f"found {shared_memory:.2f}: use `docker run --shm-size=10gb`"
            )
    if os.path.exists("/proc/driver/nvidia/version") and not gpus:
        problems.append(
            f"found an NVIDIA driver, but no GPU that torch {torch.__version__} can use: install "
            "a build of torch with CUDA"
        )
    return Check(subject, problems)


def _check_recipe(recipe: Recipe) -> Check:
    from sevenfold.prepare.data import find_inputs
    from sevenfold.prepare.model import check_model

    try:
        check_model(recipe)
        find_inputs(recipe)
    except (InputError, RunError) as e:
        return Check(f"recipe {recipe.name}", [str(e)])
    workers = recipe.workers[0]
    plural = "" if workers == 1 else "s"
    return Check(f"recipe {recipe.name}: {workers} worker{plural}, model and data found", [])


def _check_cluster_file(path: str, recipe: Recipe | None) -> Check:
    from sevenfold.cluster.cluster_file import read_cluster_file
    from sevenfold.doctor.cluster_checks import find_problems

    findings = find_problems(read_cluster_file(path), recipe)
    subject = path if recipe is None else f"{path}, for recipe {recipe.name}"
    return Check(subject, [f"{path}: {setting}: {message}" for setting, message in findings])


def _check_running_cluster(address: str, recipe: Recipe | None) -> Check:
    from sevenfold.cluster import connect

    os.environ["RAY_ADDRESS"] = address
    connect.connect()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        heads = [node for node in nodes if "node:__internal_head__" in node["Resources"]]
        total = ray.cluster_resources()
        subject = (
            f"cluster {address}: {len(nodes)} node{'' if len(nodes) == 1 else 's'}, "
            f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        )
        problems = []
        if len(nodes) > 1 and any(node["Resources"].get("CPU") for node in heads):
            problems.append(
                "the head runs tasks, and one that crashes it ends the whole cluster: use "
                "`ray start --head --num-cpus=0`"
            )
        if os.environ.get("RAY_AUTH_MODE") != "token":
            problems.append(
                "no token is required: anyone who can connect to a port can run code; set "
                "RAY_AUTH_MODE=token"
            )
        if recipe is not None:
            problems += _check_capacity(recipe)
        return Check(subject, problems)
    finally:
        ray.shutdown()


def _check_capacity(recipe: Recipe) -> list[str]:
    """Returns whether the connected cluster holds a recipe's workers, as a list of problems."""
    from sevenfold.cluster import capacity

    cluster, workers = recipe.cluster, recipe.workers[0]
    data_cpus = TASK_CPUS if recipe.data.executor == "ray" else 0
    worker = {"CPU": cluster.cpus_per_worker + data_cpus, "GPU": cluster.gpus_per_worker}
    available = capacity.gang_capacity(worker, 1)
    if available >= workers:
        return []
    return [
        f"{recipe.name} needs {workers} workers, but this cluster holds or can scale to {available}"
    ]
