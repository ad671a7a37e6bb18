"""Compares the resources that a run needs with those that a cluster has or can scale to."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ray
import yaml
from ray.autoscaler.v2.sdk import get_cluster_status

from sevenfold.cluster import ray_private
from sevenfold.cluster.hardware import gpus_without_bfloat16
from sevenfold.errors import InputError, RunError
from sevenfold.report.console import say

# The cluster.yaml that `ray up` used, as it lies on the head node.
BOOTSTRAP_CONFIG = "~/ray_bootstrap_config.yaml"

# Set in KubeRay's pods. There only the operator knows what its autoscaler may start, so that no
# request can be called impossible.
_HIDDEN_AUTOSCALER = {"RAY_USAGE_STATS_KUBERAY_IN_USE"}

_ROUNDING = 1e-6  # Ray's resource amounts are floats


class _Nodes(NamedTuple):
    """A number of nodes that have the same resources."""

    resources: dict[str, float]
    number: float


class _NodeType(NamedTuple):
    """A kind of node that the autoscaler may start."""

    resources: dict[str, float]
    labels: dict[str, str]
    max_count: float


def require_resources(need: dict[str, float], what: str, wait_seconds: float) -> None:
    """Returns when the cluster has the needed resources free, or can scale up to them.

    Args:
        need: Amounts by Ray's resource names, such as CPU and GPU.
        what: What needs them, for messages.
        wait_seconds: How long to wait for resources that other jobs hold.

    Raises:
        InputError: The cluster has fewer resources in total, and cannot scale up to them.
        RunError: Other jobs still hold the resources after `wait_seconds`.
    """
    need = {key: amount for key, amount in need.items() if amount}
    current, limit = _sum_resources(_current_nodes()), _sum_resources(_startable_nodes())
    total = {key: max(current.get(key, 0), limit.get(key, 0)) for key in need}
    missing = _missing(need, total)
    if missing and not _HIDDEN_AUTOSCALER & os.environ.keys():
        raise InputError(
            f"{what} needs {_format(need)}; this cluster has {_format(need, total)} in total: "
            f"{_advice(missing)}"
        )
    start, reported = time.monotonic(), False
    while missing := _missing(need, ray.available_resources()):
        addable = {key: limit.get(key, 0) - current.get(key, 0) for key in need}
        if _missing(need, current) or not _missing(need, addable):
            free = _format(need, ray.available_resources())
            say(f"{what} needs {_format(need)}, free: {free}; the autoscaler will add nodes")
            return
        if time.monotonic() - start > wait_seconds:
            free = _format(need, ray.available_resources())
            raise RunError(
                f"{what} needs {_format(need)}; after {wait_seconds:.0f} s only {free} are free: "
                "stop the jobs that use them (`ray job list`), or increase cluster.wait_seconds"
            )
        if not reported:
            free = _format(need, ray.available_resources())
            say(f"waiting for {', '.join(missing)}: {what} needs {_format(need)}, free: {free}")
            reported = True
        time.sleep(1)


def describe_wait(need: dict[str, float]) -> str:
    """Describes what a waiting run waits for.

    Args:
        need: Amounts by Ray's resource names.

    Returns:
        The needed and the free resources, the nodes that the autoscaler is starting, and the kinds
        of nodes that it failed to start, with the reason.
    """
    need = {key: amount for key, amount in need.items() if amount}
    text = f"{_format(need)} needed, {_format(need, ray.available_resources())} free"
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    failed = {launch.ray_node_type_name: launch.details for launch in status.failed_launches}
    text += "".join(f"; starting: {count} {node_type}" for node_type, count in starting.items())
    return text + "".join(
        f"; {node_type} did not start: {reason[:200]}" for node_type, reason in failed.items()
    )


def gang_capacity(worker: dict[str, float], count: int) -> int:
    """Returns how many gangs of workers the cluster can hold at the same time.

    It is the larger of what the current nodes hold and what the nodes that the autoscaler may
    start hold.

    Args:
        worker: The resources of one worker.
        count: The number of workers in a gang.
    """
    worker = {key: amount for key, amount in worker.items() if amount}

    def workers_on(nodes: Iterable[_Nodes]) -> float:
        total = 0.0
        for node in nodes:
            if node.number:
                per_node = min(
                    int((node.resources.get(key, 0) + _ROUNDING) // amount)
                    for key, amount in worker.items()
                )
                # none on each of an unlimited number of nodes would give nan
                total += node.number * per_node if per_node else 0.0
        return total

    workers = max(workers_on(_current_nodes()), workers_on(_startable_nodes()))
    return int(min(workers, sys.maxsize)) // count  # the number of nodes may be unlimited


def gpus_and_nodes() -> tuple[int, set[str], int]:
    """Returns what the cluster has or can start: GPUs, their kinds (known ones), and nodes."""
    current, startable = _current_nodes(), _startable_nodes()
    gpus = max(_sum_resources(nodes).get("GPU", 0.0) for nodes in (current, startable))
    return int(min(gpus, sys.maxsize)), _kinds_of_gpus(), len(current)


def _kinds_of_gpus() -> set[str]:
    """Returns the kinds of GPUs that Ray recognizes (`accelerator_type:...`)."""
    return {
        key.partition(":")[2]
        for key in ray.cluster_resources()
        if key.startswith("accelerator_type:")
    }


def _current_nodes() -> list[_Nodes]:
    """Returns the nodes that are alive, one entry per node."""
    return [_Nodes(node["Resources"], 1.0) for node in ray.nodes() if node["Alive"]]


def _startable_nodes() -> list[_Nodes]:
    """Returns the nodes that the autoscaler may run at most; empty without an autoscaler."""
    return [_Nodes(kind.resources, kind.max_count) for kind in _node_types()]


def _node_types() -> list[_NodeType]:
    """Returns the kinds of nodes that the autoscaler may start.

    An operator can report them to Ray's head. `ray up` (Ray 2.60) does not, but its file lies on
    the head node, where a job's driver runs.

    Returns:
        An empty list where there is no autoscaler or where its limits cannot be known (KubeRay).
    """
    reported = ray_private.autoscaler_config()
    if reported is not None and reported.node_group_configs:
        return [
            _NodeType(
                dict(group.resources),
                dict(group.labels),
                float("inf") if group.max_count < 0 else float(group.max_count),
            )
            for group in reported.node_group_configs
        ]
    try:
        text = Path(BOOTSTRAP_CONFIG).expanduser().read_text() if _on_head_node() else "{}"
    except FileNotFoundError:
        return []
    config = yaml.safe_load(text)
    max_workers = config.get("max_workers", 0)
    return [
        _NodeType(
            node_type.get("resources") or {},
            node_type.get("labels") or {},
            float(min(max_workers, node_type.get("max_workers", max_workers))),
        )
        for name, node_type in config.get("available_node_types", {}).items()
        if name != config["head_node_type"]
    ]


def _on_head_node() -> bool:
    node_id = ray.get_runtime_context().get_node_id()
    return any(
        node["NodeID"] == node_id and "node:__internal_head__" in node["Resources"]
        for node in ray.nodes()
    )


def _sum_resources(nodes: Iterable[_Nodes]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for node in nodes:
        for key, amount in node.resources.items():
            # 0 of a resource on an unlimited number of nodes would give nan
            total[key] += amount * node.number if amount and node.number else 0
    return total


def require_labels(what: str, labels: dict[str, str]) -> None:
    """Checks that a node with these labels exists or can be started.

    Args:
        what: The setting that names the labels, for the message.
        labels: The labels that a node must have, all of them.

    Raises:
        InputError: No node has these labels, and the autoscaler can start none that has.
    """
    node_labels = [node.get("Labels") or {} for node in ray.nodes() if node["Alive"]]
    node_labels += [kind.labels for kind in _node_types()]
    if _HIDDEN_AUTOSCALER & os.environ.keys():
        return
    if any(labels.items() <= known.items() for known in node_labels):
        return
    existing = sorted(
        {
            f"{key}={value}"
            for known in node_labels
            for key, value in known.items()
            if not key.startswith("ray.io/")
        }
    )
    raise InputError(
        f"{what} {labels}: no node of this cluster has them, found "
        f"{', '.join(existing) or 'none'}: start nodes with `ray start --labels`, or remove the "
        "setting"
    )


def require_bfloat16(what: str) -> None:
    """Checks that the cluster has GPUs that compute in bfloat16.

    Only GPUs whose kind Ray recognizes (`accelerator_type:...`) are checked.

    Args:
        what: The run's name, for the message.

    Raises:
        InputError: No GPU of the cluster computes in bfloat16.
    """
    gpus = _kinds_of_gpus()
    if gpus and gpus <= gpus_without_bfloat16():
        raise InputError(
            f"{what}: train.dtype=bfloat16 needs GPUs with bfloat16 (Ampere or newer), found "
            f"{', '.join(gpus)}: set train.dtype=float32"
        )


def _missing(need: dict[str, float], have: dict[str, float]) -> list[str]:
    """Returns the names of the resources of which there is less than needed."""
    return [key for key, amount in need.items() if have.get(key, 0) + _ROUNDING < amount]


def _format(need: dict[str, float], amounts: dict[str, float] | None = None) -> str:
    """Formats the needed resources, or other amounts of the same resources: "2 CPU, 1 GPU"."""
    amounts = need if amounts is None else amounts
    return ", ".join(f"{amounts.get(key, 0):g} {key}" for key in need)


def _advice(missing: list[str]) -> str:
    if "GPU" in missing:
        return "add GPU nodes, lower cluster.num_workers, or set cluster.gpus_per_worker=0"
    return "lower cluster.num_workers, or add nodes"
