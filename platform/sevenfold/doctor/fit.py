"""Whether a cluster.yaml's pools hold a recipe's workers, and feed them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sevenfold.data.stream import TASK_CPUS
from sevenfold.recipe import Recipe

Pool = Mapping[str, Any]
TYPES = "available_node_types"


def fit(config: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(where in the file, what does not fit)."""
    everywhere = {n: t for n, t in config[TYPES].items() if n != config.get("head_node_type")}
    most = config.get("max_workers", 2)
    yield from _holds(_with(everywhere, recipe.cluster.worker_labels), most, recipe)
    if recipe.data.executor == "ray":
        yield from _feeds(everywhere, most, recipe)


def _with(pools: Mapping[str, Pool], labels: Mapping[str, str]) -> dict[str, Pool]:
    return {n: t for n, t in pools.items() if labels.items() <= (t.get("labels") or {}).items()}


def _resource(pool: Pool, name: str) -> int:
    return int((pool.get("resources") or {}).get(name, 0))


def _workers(pool: Pool, recipe: Recipe) -> int:
    """On one machine."""
    c = recipe.cluster
    by_cpu = int(_resource(pool, "CPU") // c.cpus_per_worker)
    return min(by_cpu, _resource(pool, "GPU") // c.gpus_per_worker) if c.gpus_per_worker else by_cpu


def _holds(pools: Mapping[str, Pool], most: int, recipe: Recipe) -> Iterator[tuple[str, str]]:
    c, fewest = recipe.cluster, recipe.workers[0]
    total = sum(_workers(t, recipe) * min(t.get("max_workers", most), most) for t in pools.values())
    total = min(total, most * max((_workers(t, recipe) for t in pools.values()), default=0))
    if total < fewest:
        labels = f" with {c.worker_labels}" if c.worker_labels else ""
        yield TYPES, f"{recipe.name} needs {fewest} workers, and all pools{labels} together hold {total} at most"
    for name, pool in pools.items():
        at, gpus = f"{TYPES}.{name}", _resource(pool, "GPU")
        if gpus and not c.gpus_per_worker:
            yield at, f"{recipe.name} uses no GPU (cluster.gpus_per_worker=0): its workers waste this pool, or never fill it"
        elif fewest < gpus:
            yield at, f"a machine has {gpus} GPUs, and {recipe.name} fills {fewest}: take a smaller one"
        elif (alone := gpus - _workers(pool, recipe)) and gpus:
            why = f"{c.cpus_per_worker:g} CPUs a worker leave {alone} of {gpus} GPUs without one"
            yield f"{at}.resources.CPU", f"{why}: lower cluster.cpus_per_worker"


def _feeds(everywhere: Mapping[str, Pool], most: int, recipe: Recipe) -> Iterator[tuple[str, str]]:
    c, fewest = recipe.cluster, recipe.workers[0]
    pools = _with(everywhere, c.data_labels)
    if not pools:
        yield TYPES, f"no pool has the labels {c.data_labels} of {recipe.name}'s cluster.data_labels"
        return
    cpus = sum(_resource(t, "CPU") * min(t.get("max_workers", most), most) for t in pools.values())
    if any(_workers(t, recipe) for t in _with(pools, c.worker_labels).values()):
        cpus = max(0, cpus - int(fewest * c.cpus_per_worker))  # the workers' own
    need = fewest * TASK_CPUS
    if cpus < need:
        yield (
            TYPES,
            f"{fewest} workers' data tasks need {need:g} CPUs, and {', '.join(pools)} has {cpus}: raise max_workers there",
        )
    if not c.data_labels and c.gpus_per_worker and not all(_resource(t, "GPU") for t in pools.values()):
        yield TYPES, f"{recipe.name}: data tasks land on GPUs' machines too: set cluster.data_labels"
