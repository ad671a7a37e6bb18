"""What GPUs and nodes are and cost: hardware.yaml, or a file of one's own that is laid over it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sevenfold.errors import InputError
from sevenfold.recipe import Recipe

GIB, GBIT = 2**30, 1e9 / 8
NODE = 8  # GPUs, where nobody says how many a node has
ETHERNET = 400 * GBIT  # bytes a second, where nothing is known of the nodes: a port of 400 Gbit/s
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: a second, dense, by dtype (float32, bfloat16). bandwidth: of its memory, bytes a second. gemm,
    attention: the part of `flops` that large matrix products and fused attention reach."""

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    gemm: float = 0.65
    attention: float = 0.39


@dataclass(frozen=True)
class Fleet:
    """Like GPUs in like nodes.

    Attributes:
        link: within a node, bytes a second a GPU, one way.
        network: between nodes, bytes a second a node, one way.
        hourly: of a node, USD; None where no price is known.
        spot: whether a node may be taken away.
        name: of its pool or machine.
        priced: where the price is from, as a sentence.
        beside: of the head and the machines that feed, USD an hour.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    link: float
    network: float
    hourly: float | None = None
    spot: bool = False
    name: str = ""
    priced: str = ""
    beside: float = 0.0

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def usd_per_hour(self) -> float | None:
        """Of all machines: one whose GPUs are not all used is paid for whole."""
        return None if self.hourly is None else self.hourly * self.nodes + self.beside

    def of(self, gpus: int) -> Fleet:
        """So many GPUs of it."""
        return replace(self, gpus=gpus)


def load(path: str | None = None) -> Table:
    """The table, and a file's laid over it, field by field.

    Raises:
        InputError: no such file, no YAML of this form.
    """
    table = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8"))
    if path is None:
        return dict(table)
    try:
        own = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"{path}: expected a table of hardware (YAML), found none: {getattr(e, 'strerror', None) or e}"
        ) from None
    except yaml.YAMLError as e:
        raise InputError(f"{path}: expected YAML: {' '.join(str(e).split())}") from None
    if not isinstance(own, dict) or not own.keys() <= table.keys():
        raise InputError(f"{path}: expected {', '.join(table)}, as in sevenfold/plan/hardware.yaml, found {_found(own)}")
    for kind in ("gpus", "machines"):
        for name, fields in (own.get(kind) or {}).items():
            if not isinstance(fields, dict):
                raise InputError(f"{path}: {kind}.{name}: expected fields, as {{usd: 21.96}}, found {fields!r}")
            known = set().union(*table[kind].values())
            if unknown := sorted(fields.keys() - known):
                raise InputError(f"{path}: {kind}.{name}: no field {unknown[0]!r}{_near(unknown[0], known)}")
            table[kind][name] = table[kind].get(name, {}) | fields
    table["spot_share"] = own.get("spot_share", table["spot_share"])
    return dict(table)


def _found(own: Any) -> str:
    return ", ".join(map(str, own)) if isinstance(own, dict) else type(own).__name__


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f": did you mean {close[0]}?" if close else ""


def gpu(table: Table, name: str) -> Gpu:
    """Raises InputError where it is not known, or its entry is not whole."""
    entry = table["gpus"].get(name.lower())
    if entry is None:
        known = ", ".join(table["gpus"])
        raise InputError(f"GPU {name}: expected one of {known}; another one goes into a file given by --hardware")
    try:
        flops = {k: float(v) * 1e12 for k, v in entry["tflops"].items()}
        memory, bandwidth = int(entry["memory_gib"] * GIB), entry["bandwidth_gbs"] * 1e9
        efficiencies = {k: float(entry[k]) for k in ("gemm", "attention") if k in entry}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"hardware: gpus.{name}: expected memory_gib, tflops by dtype and bandwidth_gbs, found no {e}"
        ) from None
    return Gpu(name.lower(), memory, flops, bandwidth, **efficiencies)


def of_gpus(table: Table, name: str, gpus: int) -> Fleet:
    """So many GPUs of a kind, in the smallest machines of the table that hold them, or eight.

    Raises InputError: an unknown GPU, no number above 0.
    """
    if gpus < 1:
        raise InputError(f"--gpus: expected a number above 0, found {gpus}")
    made = gpu(table, name)
    having = sorted((m["gpus"], n) for n, m in table["machines"].items() if m.get("gpu") == made.name)
    if not having:
        link = table["gpus"][made.name].get("link_gbs", 24) * 1e9
        return Fleet(made, gpus, min(NODE, gpus), link, ETHERNET, None, False, made.name, f"{made.name}: no price is known")
    kind = next((n for count, n in having if count >= min(gpus, NODE)), having[-1][1])
    return machine(table, kind, gpus, spot=False)


def machine(table: Table, kind: str, gpus: int, spot: bool, name: str | None = None) -> Fleet:
    """So many GPUs in machines of a kind. Raises InputError where it is not known or has no GPU."""
    entry = table["machines"].get(kind)
    if entry is None or not entry.get("gpus"):
        known = ", ".join(k for k, m in table["machines"].items() if m.get("gpus"))
        what = "not known" if entry is None else "without a GPU"
        raise InputError(f"machine {kind}: {what}: expected one of {known}; another one goes into a file given by --hardware")
    made, hourly, said = gpu(table, entry["gpu"]), entry.get("usd"), f"{entry.get('source')}, {entry.get('date')}"
    if spot and entry.get("spot_usd") is not None:
        hourly = entry["spot_usd"]
    elif spot and hourly is not None:
        hourly, said = hourly * table["spot_share"], f"assumed {table['spot_share']:g} of the price on demand ({said})"
    priced = f"{kind} {hourly:,.2f} USD an hour: {said}" if hourly is not None else f"{kind}: no price is known"
    if not entry.get("checked") and hourly is not None:
        priced += ", not checked"
    link = entry.get("link_gbs", table["gpus"][made.name].get("link_gbs", 24)) * 1e9
    return Fleet(made, gpus, entry["gpus"], link, entry["network_gbps"] * GBIT, hourly, spot, name or kind, priced)


def of_cluster(table: Table, config: Mapping[str, Any], where: str, recipe: Recipe | None = None) -> list[Fleet]:
    """A fleet for each pool of a cluster.yaml that has GPUs and, where a recipe names labels of its workers, has these; as
    many as may be started.

    Raises:
        InputError: no pool with GPUs, or none that is known here.
    """
    most, labels = config.get("max_workers", 2), recipe.cluster.worker_labels if recipe is not None else {}
    out, kinds = [], config["available_node_types"]
    for name, kind in kinds.items():
        count = min(kind.get("max_workers", most), most)
        gpus = int((kind.get("resources") or {}).get("GPU", 0))
        if name == config.get("head_node_type") or not gpus or not count:
            continue
        if not labels.items() <= (kind.get("labels") or {}).items():
            continue
        node = kind.get("node_config") or {}
        spot = (node.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
        try:
            made = machine(table, str(node.get("InstanceType")), count * gpus, spot, name)
        except InputError as e:
            raise InputError(f"{where}: available_node_types.{name}: {e}") from None
        out.append(replace(made, gpus_per_node=gpus, beside=_beside(table, config, recipe)))
    if not out:
        named = f" with the labels {labels}" if labels else ""
        raise InputError(
            f"{where}: expected a pool of workers{named} with GPUs (resources: {{GPU: 8}}), found {', '.join(kinds)}"
        )
    return out


def _beside(table: Table, config: Mapping[str, Any], recipe: Recipe | None) -> float:
    """USD an hour of the head, and of a machine of the pool that feeds, where there is one without GPUs."""
    kinds, labels = config["available_node_types"], recipe.cluster.data_labels if recipe is not None else {}
    feeds = [
        n for n, k in kinds.items()
        if n != config.get("head_node_type") and not (k.get("resources") or {}).get("GPU")
        and labels.items() <= (k.get("labels") or {}).items()
    ]  # fmt: skip
    types = [
        str((kinds[n].get("node_config") or {}).get("InstanceType"))
        for n in (config.get("head_node_type"), *feeds[:1])
        if n in kinds
    ]
    return float(sum(table["machines"].get(t, {}).get("usd") or 0.0 for t in types))
