"""Whether a cluster.yaml's pools hold a recipe's workers, and feed them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sevenfold.data.stream import TASK_CPUS
from sevenfold.recipe import Recipe


def fit(config: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Whether the pools can hold the recipe's workers, and feed them."""
    pools = {n: t for n, t in config["available_node_types"].items() if n != config.get("head_node_type")}
    c, (fewest, _) = recipe.cluster, recipe.workers

    def most(pool: Mapping[str, Any]) -> int:
        return int(min(pool.get("max_workers", config.get("max_workers", 2)), config.get("max_workers", 2)))

    def held(pool: Mapping[str, Any]) -> int:
        """Workers on one machine."""
        has = pool.get("resources") or {}
        by_gpu = has.get("GPU", 0) // c.gpus_per_worker if c.gpus_per_worker else 10**9
        return int(min(by_gpu, has.get("CPU", 0) // c.cpus_per_worker))

    room = {n: held(t) * most(t) for n, t in pools.items()}
    total = min(sum(room.values()), max(map(held, pools.values()), default=0) * config.get("max_workers", 2))
    if total < fewest:
        yield "available_node_types", f"{recipe.name} needs {fewest} workers, and all pools together hold {total} at most"
    for name, pool in pools.items():
        at, gpus = f"available_node_types.{name}", (pool.get("resources") or {}).get("GPU", 0)
        if gpus and not c.gpus_per_worker:
            yield (
                f"available_node_types.{name}",
                f"{recipe.name} uses no GPU (cluster.gpus_per_worker=0): this pool is never filled",
            )
        elif gpus and fewest % gpus and fewest < gpus:
            yield (
                f"available_node_types.{name}",
                f"a machine has {gpus} GPUs, and {recipe.name} fills {fewest}: take a smaller one",
            )
        elif gpus and held(pool) < gpus:
            yield (
                f"{at}.resources.CPU",
                f"{c.cpus_per_worker:g} CPUs a worker leave {gpus - held(pool)} of {gpus} GPUs without one: lower "
                "cluster.cpus_per_worker",
            )
    if recipe.data.executor != "ray":
        return
    chosen = {n: t for n, t in pools.items() if c.data_labels.items() <= (t.get("labels") or {}).items()}
    if not chosen:
        yield "available_node_types", f"no pool has the labels {c.data_labels} of {recipe.name}'s cluster.data_labels"
        return
    cpus = sum((t.get("resources") or {}).get("CPU", 0) * most(t) for t in chosen.values())
    taken = fewest * c.cpus_per_worker if set(chosen) & {n for n, r in room.items() if r} else 0
    if cpus - taken < fewest * TASK_CPUS:
        yield (
            "available_node_types",
            f"{fewest} workers' data tasks need {fewest * TASK_CPUS:g} CPUs, and {', '.join(chosen)} has "
            f"{max(0, cpus - taken):g}: raise max_workers there",
        )
    if not c.data_labels and c.gpus_per_worker and any(not (t.get("resources") or {}).get("GPU") for t in pools.values()):
        yield (
            "available_node_types",
            f"{recipe.name}: data tasks land on GPUs' machines too: set cluster.data_labels",
        )
