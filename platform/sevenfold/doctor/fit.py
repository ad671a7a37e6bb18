"""Checks whether the pools of a cluster.yaml hold a recipe's workers and the tasks that feed them.

A pool is a node type other than the head's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sevenfold.data.stream import TASK_CPUS
from sevenfold.doctor.finding import Finding
from sevenfold.recipe import Recipe

Pool = Mapping[str, Any]
TYPES = "available_node_types"


def fit(config: Mapping[str, Any], recipe: Recipe) -> Iterator[Finding]:
    """Yields why the cluster does not fit the recipe.

    Args:
        config: The parsed cluster.yaml.
        recipe: The recipe to train. The smallest number of workers that it allows must fit.
    """
    pools = {
        name: node_type
        for name, node_type in config[TYPES].items()
        if name != config.get("head_node_type")
    }
    max_nodes = config.get("max_workers", 2)
    worker_pools = _with_labels(pools, recipe.cluster.worker_labels)
    yield from _check_workers(worker_pools, max_nodes, recipe)
    if recipe.data.executor == "ray":
        yield from _check_data_tasks(pools, max_nodes, recipe)


def _with_labels(pools: Mapping[str, Pool], labels: Mapping[str, str]) -> dict[str, Pool]:
    return {
        name: pool
        for name, pool in pools.items()
        if labels.items() <= (pool.get("labels") or {}).items()
    }


def _resource(pool: Pool, name: str) -> int:
    """Returns the amount of a resource of one node."""
    return int((pool.get("resources") or {}).get(name, 0))


def _workers_per_node(pool: Pool, recipe: Recipe) -> int:
    cluster = recipe.cluster
    by_cpu = int(_resource(pool, "CPU") // cluster.cpus_per_worker)
    if not cluster.gpus_per_worker:
        return by_cpu
    return min(by_cpu, _resource(pool, "GPU") // cluster.gpus_per_worker)


def _check_workers(pools: Mapping[str, Pool], max_nodes: int, recipe: Recipe) -> Iterator[Finding]:
    cluster, workers = recipe.cluster, recipe.workers[0]
    per_node = {name: _workers_per_node(pool, recipe) for name, pool in pools.items()}
    capacity = sum(
        per_node[name] * min(pool.get("max_workers", max_nodes), max_nodes)
        for name, pool in pools.items()
    )
    # max_workers of the whole cluster limits the number of nodes too
    capacity = min(capacity, max_nodes * max(per_node.values(), default=0))
    if capacity < workers:
        labels = f" with {cluster.worker_labels}" if cluster.worker_labels else ""
        yield Finding(
            TYPES,
            f"{recipe.name} needs {workers} workers, but all pools{labels} together hold at most "
            f"{capacity}",
        )
    for name, pool in pools.items():
        setting, gpus = f"{TYPES}.{name}", _resource(pool, "GPU")
        if not gpus:
            continue
        unused = gpus - per_node[name]
        if not cluster.gpus_per_worker:
            yield Finding(
                setting,
                f"{recipe.name} uses no GPUs (cluster.gpus_per_worker=0): its workers would leave "
                "this pool's GPUs idle",
            )
        elif workers < gpus:
            yield Finding(
                setting,
                f"a machine has {gpus} GPUs, but {recipe.name} uses only {workers}: choose a "
                "smaller machine",
            )
        elif unused:
            yield Finding(
                f"{setting}.resources.CPU",
                f"{cluster.cpus_per_worker:g} CPUs per worker leave {unused} of {gpus} GPUs "
                "without a worker: lower cluster.cpus_per_worker",
            )


def _check_data_tasks(
    all_pools: Mapping[str, Pool], max_nodes: int, recipe: Recipe
) -> Iterator[Finding]:
    cluster, workers = recipe.cluster, recipe.workers[0]
    pools = _with_labels(all_pools, cluster.data_labels)
    if not pools:
        yield Finding(
            TYPES,
            f"no pool has the labels {cluster.data_labels} of {recipe.name}'s cluster.data_labels",
        )
        return
    cpus = sum(
        _resource(pool, "CPU") * min(pool.get("max_workers", max_nodes), max_nodes)
        for pool in pools.values()
    )
    shared_pools = _with_labels(pools, cluster.worker_labels)
    if any(_workers_per_node(pool, recipe) for pool in shared_pools.values()):
        # the workers take their CPUs from the same pools
        cpus = max(0, cpus - int(workers * cluster.cpus_per_worker))
    need = workers * TASK_CPUS
    if cpus < need:
        yield Finding(
            TYPES,
            f"the data tasks of {workers} workers need {need:g} CPUs, but {', '.join(pools)} has "
            f"{cpus}: raise max_workers there",
        )
    if (
        not cluster.data_labels
        and cluster.gpus_per_worker
        and not all(_resource(pool, "GPU") for pool in pools.values())
    ):
        yield Finding(
            TYPES,
            f"{recipe.name}: data tasks may run on GPU machines too: set cluster.data_labels",
        )
