"""The way to Ray: a local one that is started here, or the cluster that RAY_ADDRESS (or a submitted job) names."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from ray._private import ray_constants, worker
from ray._private.state import state
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RayTaskError
from ray.train.v2._internal.execution import context

import sevenfold
from sevenfold.errors import InputError, RunError
from sevenfold.report.console import say

# what Ray would say about itself in each line of a run
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # each print would come twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own table beside ours
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray 2.60 warns about at each start
}
START = 30  # seconds until workers that find no room are asked for anew, fewer of them where their number is a range
_PACE = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # report() waits for the next check
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START),
}
_LOCAL = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes a laptop away with notice
    "RAY_worker_maximum_startup_concurrency": "8",  # by cores, it warns of every few actors of a sweep
    "RAY_prestart_worker_first_driver": "0",  # a process a logical CPU, none of which a training run takes
}
_LOCAL_STORE = 512 * 2**20  # bytes of a local Ray's object store: windows are a few MB


BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # the cluster.yaml of `ray up`, on the head
UNTOLD = {"RAY_USAGE_STATS_KUBERAY_IN_USE"}  # in KubeRay's pods: what its autoscaler may start is known to the operator alone
WITHOUT_BFLOAT16 = {"V100", "P100", "P4", "K80", "T4"}  # Ray's names of GPUs older than Ampere


def connect(verbose: bool = False, dashboard: bool = False) -> None:
    """Connects to Ray. A local one gets more logical CPUs than cores: workers, drivers and data tasks take turns.

    Args:
        dashboard: of a local Ray; where `ray.util.state` is asked. It takes a second of a run's start.
    """
    import ray.data  # before its loggers are quietened

    settings = _PACE if verbose else _PACE | _QUIET
    os.environ.update({k: os.environ.get(k, v) for k, v in settings.items()})
    if not verbose:
        quieten()
        worker.print_to_stdstream = _first_line
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        raise InputError(f"RAY_ADDRESS {address} is a dashboard: go in by `ray job submit`, or unset it for a local Ray")
    library = str(Path(sevenfold.__file__).parent)
    level = logging.INFO if verbose else logging.ERROR
    try:
        if address:
            # what this process imports is what the workers import, whatever is installed there
            env = {k: os.environ[k] for k in settings}
            ray.init(log_to_driver=verbose, logging_level=level, runtime_env={"py_modules": [library], "env_vars": env})
            _keep_books()
        else:
            paths = [str(Path(library).parent), os.environ.get("PYTHONPATH", "")]
            os.environ.update(_LOCAL)
            stay_here()
            os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
            ray.init(
                address="local", num_cpus=2 * (os.cpu_count() or 1) + 4, object_store_memory=_LOCAL_STORE,
                include_dashboard=dashboard or verbose, log_to_driver=verbose, logging_level=level,
            )  # fmt: skip
    except ConnectionError as e:
        raise RunError(f"no Ray cluster answers at {address}: {str(e).splitlines()[0]}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop`: as Ctrl-C, which a shell's `&` has ignored
    token = Path("~/.ray/auth_token").expanduser()
    if token.exists() and token.stat().st_mode & 0o077:
        token.chmod(0o600)  # Ray writes it for everyone to read


def _keep_books() -> None:
    """Ray Data's bookkeepers, one of each a cluster, outlive the run that first asks for them and hold the machine that it asks
    from, which is then never idle: that shall be the driver's, and not one of a pool that comes and goes."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()
    get_or_create_usage_collection_actor()


def stay_here() -> None:
    """What this process, and those that it starts, start of Ray from now on listens on the loopback address alone.

    Ray does so by itself on macOS and Windows, where clusters are not supported (2.60, services.get_node_ip_address). Else each
    of its processes listens on all interfaces, and ray.init puts the host's address in place of a loopback one.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"


def alone() -> bool:
    """Whether Ray is one of this machine alone: stay_here was called where it was started."""
    return all(n["NodeManagerAddress"] in ("127.0.0.1", "::1") for n in ray.nodes() if n["Alive"])


def _first_line(told: dict[str, Any], ignore_prefix: bool) -> None:
    """Of what Ray says of itself, which is a page of a raylet's state for each node that is lost."""
    say(f"ray: {' '.join(told['lines']).strip().partition(chr(10))[0][:200]}")


def quieten() -> None:
    """Keeps Ray's own log lines out of the run's; errors stay. In each process that speaks."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune", context.__file__):  # Train's context logs by its file's name
        logging.getLogger(name).setLevel(logging.ERROR)


def fetch(ref: Any) -> Any:
    """ray.get, where an error of ours comes back as itself and not wrapped in the task's traceback."""
    try:
        return ray.get(ref)
    except RayTaskError as e:
        if isinstance(e.cause, InputError | RunError):
            raise e.cause from None
        raise


def require(need: dict[str, float], what: str, wait_seconds: float) -> None:
    """Returns when the cluster can give `need`, or can scale to.

    Raises:
        InputError: the cluster has less than that in all, and cannot scale to it.
        RunError: others hold it, and still do after wait_seconds.
    """
    need = {k: v for k, v in need.items() if v}
    there, later = _together(_now()), _together(_later())
    total = {k: max(there.get(k, 0), later.get(k, 0)) for k in need}
    short = _short(need, total)
    if short and not UNTOLD & os.environ.keys():
        raise InputError(f"{what} needs {_list(need)}; this cluster has {_list(need, total)}: {_advice(short)}")
    begin, told = time.monotonic(), False
    while short := _short(need, ray.available_resources()):
        if _short(need, there) or not _short(need, {k: later.get(k, 0) - there.get(k, 0) for k in need}):
            free = _list(need, ray.available_resources())
            say(f"{what} needs {_list(need)}, free {free}: the cluster is asked for more nodes")
            return
        if time.monotonic() - begin > wait_seconds:
            raise RunError(
                f"{what} needs {_list(need)}; after {wait_seconds:.0f} s only {_list(need, ray.available_resources())} "
                "are free: end what holds them (`ray job list`), or wait longer (cluster.wait_seconds)"
            )
        if not told:
            say(f"waiting for {', '.join(short)}: {what} needs {_list(need)}, free {_list(need, ray.available_resources())}")
            told = True
        time.sleep(1)


def awaited(need: dict[str, float]) -> str:
    """What is free of `need`, and what the autoscaler is about: nodes that start, and why some did not."""
    need = {k: v for k, v in need.items() if v}
    said = f"{_list(need)} needed, {_list(need, ray.available_resources())} free"
    found = get_cluster_status(ray.get_runtime_context().gcs_address)
    starting = Counter(n.ray_node_type_name for n in found.pending_nodes)
    for launch in found.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    failed = {f.ray_node_type_name: f.details for f in found.failed_launches}
    said += "".join(f"; starting: {n} {kind}" for kind, n in starting.items())
    return said + "".join(f"; {kind} did not start: {why[:200]}" for kind, why in failed.items())


def room(worker: dict[str, float], count: int) -> int:
    """How many gangs of so many workers the cluster's nodes hold, or those that it can scale to."""
    asked = {k: v for k, v in worker.items() if v}

    def held(nodes: Iterable[tuple[dict[str, float], float]]) -> float:
        return sum(n * min(int((has.get(k, 0) + 1e-6) // v) for k, v in asked.items()) for has, n in nodes if n)

    return int(min(max(held(_now()), held(_later())) // count, sys.maxsize))


def _now() -> list[tuple[dict[str, float], float]]:
    """Resources of each node that is there, and 1."""
    return [(n["Resources"], 1.0) for n in ray.nodes() if n["Alive"]]


class Group(NamedTuple):
    """Nodes of one kind that the autoscaler may start."""

    resources: dict[str, float]
    labels: dict[str, str]
    most: float


def _groups() -> list[Group]:
    """What the autoscaler may start; nothing where there is none, or where that cannot be told (KubeRay). Whoever runs it may
    tell Ray's head. `ray up` (Ray 2.60) does not: its file lies on the head, where a job's driver runs."""
    found = state.get_cluster_config()
    if found is not None and found.node_group_configs:
        many = float("inf")
        return [
            Group(dict(g.resources), dict(g.labels), many if g.max_count < 0 else float(g.max_count))
            for g in found.node_group_configs
        ]
    try:
        told = yaml.safe_load(Path(BOOTSTRAP).expanduser().read_text()) if _at_head() else {}
    except FileNotFoundError:
        return []
    kinds = {n: t for n, t in told.get("available_node_types", {}).items() if n != told["head_node_type"]}
    most = told.get("max_workers", 0)
    return [
        Group(t.get("resources") or {}, t.get("labels") or {}, float(min(most, t.get("max_workers", most))))
        for t in kinds.values()
    ]


def _at_head() -> bool:
    here = ray.get_runtime_context().get_node_id()
    return any(n["NodeID"] == here and "node:__internal_head__" in n["Resources"] for n in ray.nodes())


def _later() -> list[tuple[dict[str, float], float]]:
    """Resources of a node of each kind that the autoscaler may start, and how many; nothing where there is none."""
    return [(g.resources, g.most) for g in _groups()]


def _together(nodes: Iterable[tuple[dict[str, float], float]]) -> dict[str, float]:
    out: dict[str, float] = defaultdict(float)
    for has, count in nodes:
        for k, v in has.items():
            out[k] += v * count if count else 0
    return out


def require_labels(what: str, labels: dict[str, str]) -> None:
    """Raises InputError where no node has these labels, and none with them can be added."""
    known = [n.get("Labels") or {} for n in ray.nodes() if n["Alive"]] + [g.labels for g in _groups()]
    if not UNTOLD & os.environ.keys() and not any(labels.items() <= each.items() for each in known):
        seen = sorted({f"{k}={v}" for each in known for k, v in each.items() if not k.startswith("ray.io/")})
        raise InputError(
            f"{what} {labels}: no node of this cluster has them, found {', '.join(seen) or 'none'}: start nodes with "
            "`ray start --labels`, or leave the setting out"
        )


def require_bfloat16(what: str) -> None:
    """Raises InputError where no GPU of the cluster computes in bfloat16. Ray names the kinds that it knows."""
    kinds = {k.partition(":")[2] for k in ray.cluster_resources() if k.startswith("accelerator_type:")}
    if kinds and kinds <= WITHOUT_BFLOAT16:
        raise InputError(
            f"{what}: train.dtype bfloat16 needs GPUs that have it (Ampere or newer), found {', '.join(kinds)}: "
            "set train.dtype=float32"
        )


def _short(need: dict[str, float], have: dict[str, float]) -> list[str]:
    return [k for k, v in need.items() if have.get(k, 0) + 1e-6 < v]


def _list(need: dict[str, float], amounts: dict[str, float] | None = None) -> str:
    return ", ".join(f"{(amounts or need).get(k, 0) if amounts is not None else v:g} {k}" for k, v in need.items())


def _advice(short: list[str]) -> str:
    if "GPU" in short:
        return "add GPU nodes, lower cluster.num_workers, or set cluster.gpus_per_worker=0"
    return "lower cluster.num_workers, or add nodes"
