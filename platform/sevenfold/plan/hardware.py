"""GPUs, machines and their prices: hardware.yaml, which a user's file can override."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sevenfold.cluster.hardware import hardware_table
from sevenfold.errors import InputError
from sevenfold.recipe import Recipe
from sevenfold.recipe.plain_yaml import read_yaml

GIB = 2**30
GBIT = 1e9 / 8  # bytes
GPUS_PER_NODE = 8  # if no machine of the table has the GPU
ETHERNET = 400 * GBIT  # bytes per second and node, if nothing is known of it: a 400 Gbit/s port
PCIE_GBS = 24  # GB/s between the GPUs of a machine, if nothing is known of it: PCIe 4 x16
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: Its name in the table.
        memory: Bytes of memory.
        flops: Peak FLOP/s by dtype (float32, bfloat16), without sparsity.
        bandwidth: Memory bandwidth, in bytes per second.
        gemm: The share of `flops` that large matrix multiplications reach.
        attention: The share of `flops` that fused attention reaches.
    """

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    gemm: float = 0.65
    attention: float = 0.39


@dataclass(frozen=True)
class Fleet:
    """GPUs of one kind in nodes of one kind.

    Attributes:
        gpu: The kind of GPU.
        gpus: The number of GPUs.
        gpus_per_node: GPUs of each node.
        link: Bandwidth between the GPUs of a node, in bytes per second and GPU, one way.
        network: Bandwidth between nodes, in bytes per second and node, one way.
        hourly: The price of a node in USD per hour; None if it is not known.
        spot: Whether nodes are spot instances, which can be taken away.
        name: The name of the cluster's pool or the machine.
        price_source: The price and its source, as text.
        other_nodes_usd: The price of the head node and the data node together, in USD per hour.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    link: float
    network: float
    hourly: float | None = None
    spot: bool = False
    name: str = ""
    price_source: str = ""
    other_nodes_usd: float = 0.0

    @property
    def nodes(self) -> int:
        """The number of nodes, the last of which may be partly used."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def usd_per_hour(self) -> float | None:
        """The price of all machines; a partly used node is paid for in full."""
        return None if self.hourly is None else self.hourly * self.nodes + self.other_nodes_usd

    def with_gpus(self, gpus: int) -> Fleet:
        """Returns the fleet with this number of GPUs."""
        return replace(self, gpus=gpus)


def load(path: str | None = None) -> Table:
    """Returns the hardware table, overridden field by field by a user's file.

    Args:
        path: The user's file; None for the table alone.

    Raises:
        InputError: The file is missing, or is not a valid table.
    """
    table: dict[str, Any] = copy.deepcopy(dict(hardware_table()))
    if path is None:
        return dict(table)
    overrides = _read(path, table)
    for kind in ("gpus", "machines"):
        for name, fields in (overrides.get(kind) or {}).items():
            if not isinstance(fields, dict):
                raise InputError(
                    f"{path}: {kind}.{name}: expected fields, such as {{usd: 21.96}}, "
                    f"found {fields!r}"
                )
            known = set().union(*table[kind].values())
            if unknown := sorted(fields.keys() - known):
                raise InputError(
                    f"{path}: {kind}.{name}: unknown field {unknown[0]!r}"
                    f"{_suggestion(unknown[0], known)}"
                )
            table[kind][name] = table[kind].get(name, {}) | fields
    table["spot_share"] = overrides.get("spot_share", table["spot_share"])
    return dict(table)


def _read(path: str, table: Table) -> dict[str, Any]:
    """Returns the contents of a user's file, whose sections must be those of the table."""
    content = read_yaml(path, "a hardware table (YAML)")
    if not isinstance(content, dict) or not content.keys() <= table.keys():
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: expected the keys {', '.join(table)}, as in sevenfold/cluster/hardware.yaml; "
            f"found {keys}"
        )
    return content


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def gpu(table: Table, name: str) -> Gpu:
    """Returns a GPU of the table.

    Raises:
        InputError: The table does not have it, or its entry lacks fields.
    """
    entry = table["gpus"].get(name.lower())
    if entry is None:
        known = ", ".join(table["gpus"])
        raise InputError(
            f"unknown GPU {name}: expected one of {known}; add others with --hardware FILE"
        )
    try:
        flops = {dtype: float(tflops) * 1e12 for dtype, tflops in entry["tflops"].items()}
        memory, bandwidth = int(entry["memory_gib"] * GIB), entry["bandwidth_gbs"] * 1e9
        efficiencies = {key: float(entry[key]) for key in ("gemm", "attention") if key in entry}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"hardware: gpus.{name}: expected memory_gib, tflops by dtype and bandwidth_gbs; "
            f"missing or not valid: {e}"
        ) from None
    return Gpu(name.lower(), memory, flops, bandwidth, **efficiencies)


def of_gpus(table: Table, name: str, gpus: int) -> Fleet:
    """Returns GPUs of a kind, in the smallest machines of the table that hold them.

    More than eight GPUs are put into machines that have eight, or the most that there are.

    Args:
        table: The hardware table.
        name: The kind of GPU.
        gpus: The number of GPUs.

    Raises:
        InputError: The GPU is unknown, or the number is not above 0.
    """
    if gpus < 1:
        raise InputError(f"--gpus: expected a number above 0, found {gpus}")
    kind = gpu(table, name)
    machines = sorted(
        (entry["gpus"], machine_name)
        for machine_name, entry in table["machines"].items()
        if entry.get("gpu") == kind.name
    )
    if not machines:
        return Fleet(
            gpu=kind,
            gpus=gpus,
            gpus_per_node=min(GPUS_PER_NODE, gpus),
            link=table["gpus"][kind.name].get("link_gbs", PCIE_GBS) * 1e9,
            network=ETHERNET,
            name=kind.name,
            price_source=f"{kind.name}: no price is known",
        )
    needed = min(gpus, GPUS_PER_NODE)
    smallest = next(
        (machine_name for count, machine_name in machines if count >= needed), machines[-1][1]
    )
    return machine(table, smallest, gpus, spot=False)


def machine(table: Table, kind: str, gpus: int, spot: bool, name: str | None = None) -> Fleet:
    """Returns GPUs in machines of one kind.

    Args:
        table: The hardware table.
        kind: The machine's type, such as p4d.24xlarge.
        gpus: The number of GPUs.
        spot: Whether the machines are spot instances.
        name: The name of the fleet; None for the machine's type.

    Raises:
        InputError: The machine is not known or has no GPU.
    """
    entry = table["machines"].get(kind)
    if entry is None or not entry.get("gpus"):
        known = ", ".join(k for k, m in table["machines"].items() if m.get("gpus"))
        problem = "not known" if entry is None else "has no GPU"
        raise InputError(
            f"machine {kind}: {problem}: expected one of {known}; add others with --hardware FILE"
        )
    gpu_kind = gpu(table, entry["gpu"])
    hourly, source = _price(table, entry, spot)
    if hourly is None:
        priced = f"{kind}: no price is known"
    else:
        checked = "" if entry.get("checked") else ", not checked"
        priced = f"{kind} {hourly:,.2f} USD per hour: {source}{checked}"
    gpu_link = table["gpus"][gpu_kind.name].get("link_gbs", PCIE_GBS)
    return Fleet(
        gpu=gpu_kind,
        gpus=gpus,
        gpus_per_node=entry["gpus"],
        link=entry.get("link_gbs", gpu_link) * 1e9,
        network=entry["network_gbps"] * GBIT,
        hourly=hourly,
        spot=spot,
        name=name or kind,
        price_source=priced,
    )


def _price(table: Table, entry: Mapping[str, Any], spot: bool) -> tuple[float | None, str]:
    """Returns a machine's price in USD per hour, None if it is not known, and where it is from."""
    hourly, source = entry.get("usd"), f"{entry.get('source')}, {entry.get('date')}"
    if not spot:
        return hourly, source
    if entry.get("spot_usd") is not None:
        return entry["spot_usd"], source
    if hourly is None:
        return None, source
    share = table["spot_share"]
    return hourly * share, f"assumed {share:g} of the on-demand price ({source})"


def of_cluster(
    table: Table, config: Mapping[str, Any], where: str, recipe: Recipe | None = None
) -> list[Fleet]:
    """Returns a fleet for each pool of a cluster.yaml that has GPUs, at its maximum size.

    Args:
        table: The hardware table.
        config: The contents of the cluster.yaml.
        where: Its path, for errors.
        recipe: If it has cluster.worker_labels, only pools with these labels count.

    Raises:
        InputError: No pool has GPUs, or its machines are not in the table.
    """
    max_workers = config.get("max_workers", 2)  # Ray's default
    labels = recipe.cluster.worker_labels if recipe is not None else {}
    pools = config["available_node_types"]
    fleets = []
    for name, pool in pools.items():
        nodes = min(pool.get("max_workers", max_workers), max_workers)
        gpus = int((pool.get("resources") or {}).get("GPU", 0))
        if name == config.get("head_node_type") or not gpus or not nodes:
            continue
        if not labels.items() <= (pool.get("labels") or {}).items():
            continue
        node = pool.get("node_config") or {}
        spot = (node.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
        try:
            fleet = machine(table, str(node.get("InstanceType")), nodes * gpus, spot, name)
        except InputError as e:
            raise InputError(f"{where}: available_node_types.{name}: {e}") from None
        beside = _price_of_other_machines(table, config, recipe)
        fleets.append(replace(fleet, gpus_per_node=gpus, other_nodes_usd=beside))
    if not fleets:
        with_labels = f" with the labels {labels}" if labels else ""
        raise InputError(
            f"{where}: expected a pool of workers with GPUs (resources: {{GPU: 8}}){with_labels}, "
            f"found {', '.join(pools)}"
        )
    return fleets


def _price_of_other_machines(
    table: Table, config: Mapping[str, Any], recipe: Recipe | None
) -> float:
    """Returns the price of the head node and one data node, in USD per hour.

    The data node is of the first pool without GPUs that has the recipe's cluster.data_labels.
    """
    pools = config["available_node_types"]
    labels = recipe.cluster.data_labels if recipe is not None else {}
    head = config.get("head_node_type")
    data_pools = [
        name
        for name, pool in pools.items()
        if name != head
        and not (pool.get("resources") or {}).get("GPU")
        and labels.items() <= (pool.get("labels") or {}).items()
    ]
    instance_types = [
        str((pools[name].get("node_config") or {}).get("InstanceType"))
        for name in (head, *data_pools[:1])
        if name in pools
    ]
    return float(sum(table["machines"].get(t, {}).get("usd") or 0.0 for t in instance_types))
