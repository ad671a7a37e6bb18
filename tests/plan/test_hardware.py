"""The table of GPUs, machines and prices, and the fleets that are built from it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from sevenfold.cluster.cluster_file import read_cluster_file
from sevenfold.cluster.hardware import gpus_without_bfloat16, machine_size, peak_flops
from sevenfold.errors import InputError
from sevenfold.plan import hardware
from sevenfold.recipe import parse

TABLE = hardware.load()
FILE = str(ROOT / "cluster.yaml")


def test_every_entry_names_its_source() -> None:
    for kind in ("gpus", "machines"):
        for name, entry in TABLE[kind].items():
            assert entry["source"] and re.fullmatch(r"20\d\d(-\d\d){0,2}", str(entry["date"])), name
            assert type(entry["checked"]) is bool, name
    assert all(
        machine.get("gpu") in TABLE["gpus"]
        for machine in TABLE["machines"].values()
        if machine["gpus"]
    )


def test_each_instance_type_is_listed_once() -> None:
    assert not TABLE["machines"].keys() & TABLE["other_machines"].keys()
    assert (
        machine_size("m6i.8xlarge") == (0, 32)
        and machine_size("c7g.large") == (0, 2)
        and machine_size("r6i.xlarge") == (0, 4)
    )
    assert machine_size("p4d.24xlarge") == (8, 96) and machine_size("g5.24xlarge") == (4, 96)
    assert machine_size("x2iedn.metal") is None


def test_peak_flops_are_known_by_device_name() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H200": 989,
        "NVIDIA H100 PCIe": 756,
    }
    names |= {"NVIDIA L4": 121, "NVIDIA L40S": 362, "NVIDIA A10G": 70, "Tesla V100-SXM2-16GB": 125}
    for name, tflops in names.items():
        assert peak_flops(name) == tflops * 1e12, name
    assert peak_flops("AMD Instinct MI300X") is None
    assert gpus_without_bfloat16() == {"V100", "P100", "P4", "K80", "T4"}


def test_a_number_of_gpus_is_mapped_to_machines() -> None:
    fleet = hardware.of_gpus(TABLE, "H100-80gb", 64)
    assert (fleet.gpus, fleet.gpus_per_node, fleet.nodes, fleet.hourly) == (64, 8, 8, 55.04)
    assert fleet.usd_per_hour == pytest.approx(8 * 55.04)
    assert fleet.network == pytest.approx(400e9) and fleet.gpu.flops["bfloat16"] == 989e12
    assert hardware.of_gpus(TABLE, "h100-80gb", 1).hourly == 6.88  # the machine with a single GPU
    # two machines, one of which is half empty
    assert hardware.of_gpus(TABLE, "h100-80gb", 12).usd_per_hour == pytest.approx(2 * 55.04)
    assert hardware.of_gpus(TABLE, "l4", 2).name == "g6.12xlarge"
    without_machine = hardware.of_gpus(TABLE, "h100-pcie", 4)
    assert without_machine.hourly is None and without_machine.usd_per_hour is None


def test_unknown_gpus_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"GPU h1000: expected one of a100-40gb, .*h100-80gb.*--hardware"
    ):
        hardware.of_gpus(TABLE, "h1000", 8)
    with pytest.raises(InputError, match="above 0, found 0"):
        hardware.of_gpus(TABLE, "h100-80gb", 0)


def test_the_pools_of_cluster_yaml() -> None:
    config = read_cluster_file(FILE)
    train, spot = hardware.of_cluster(TABLE, config, FILE)
    assert (train.name, train.gpus, train.spot, spot.name, spot.gpus, spot.spot) == (
        "train",
        32,
        False,
        "train_spot",
        64,
        True,
    )
    assert (
        train.gpu.name == "a100-40gb" and train.hourly == TABLE["machines"]["p4d.24xlarge"]["usd"]
    )
    assert (
        spot.hourly == pytest.approx(TABLE["spot_share"] * (train.hourly or 0))
        and "assumed" in spot.price_source
    )
    # the head node and the data node
    other_nodes = TABLE["machines"]["m6i.2xlarge"]["usd"] + TABLE["machines"]["m6i.8xlarge"]["usd"]
    assert train.usd_per_hour == pytest.approx(4 * (train.hourly or 0) + other_nodes)
    recipe = parse(
        str(ROOT / "jobs/recipes/llama-7b.yaml"), ["cluster.worker_labels={market: spot}"]
    )
    assert [fleet.name for fleet in hardware.of_cluster(TABLE, config, FILE, recipe)] == [
        "train_spot"
    ]


def with_gpu_pools(**pool: Any) -> dict[str, Any]:
    """The content of cluster.yaml with these changes to both GPU pools."""
    config = yaml.safe_load(Path(FILE).read_text())
    for name in ("train", "train_spot"):
        config["available_node_types"][name] |= pool
    return dict(config)


def test_a_cluster_without_suitable_gpus_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"expected a pool of workers with GPUs .*found head, data, train, train_spot",
    ):
        hardware.of_cluster(TABLE, with_gpu_pools(resources={"CPU": 96}), FILE)
    recipe = parse(str(ROOT / "jobs/recipes/llama-7b.yaml"), ["cluster.worker_labels={pool: none}"])
    with pytest.raises(InputError, match=r"with the labels {'pool': 'none'}"):
        hardware.of_cluster(TABLE, with_gpu_pools(), FILE, recipe)
    with pytest.raises(
        InputError,
        match=r"available_node_types.train: machine p99.48xlarge: not known: expected one of",
    ):
        hardware.of_cluster(
            TABLE, with_gpu_pools(node_config={"InstanceType": "p99.48xlarge"}), FILE
        )


def test_a_hardware_file_overrides_the_table(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "gpus: {mine: {memory_gib: 10, tflops: {bfloat16: 100}, bandwidth_gbs: 1000}}\n"
        "machines: {p4d.24xlarge: {spot_usd: 9.5}, box: {gpu: mine, gpus: 4, network_gbps: 10}}\n"
    )
    table = hardware.load(str(path))
    _, spot = hardware.of_cluster(table, with_gpu_pools(), FILE)
    assert spot.hourly == 9.5 and spot.gpu.name == "a100-40gb"  # the rest of the entry is kept
    fleet = hardware.of_gpus(table, "mine", 8)
    assert (fleet.gpu.memory, fleet.gpus_per_node, fleet.nodes, fleet.hourly) == (
        10 * 2**30,
        4,
        2,
        None,
    )
    assert "box" not in hardware.load()["machines"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu: {}", "expected the keys spot_share, gpus, machines"),
        ("[1]", "found list"),
        ("machines: {p4d.24xlarge: 3}", "expected fields"),
        ("machines: {p4d.24xlarge: {usdd: 3}}", "did you mean usd"),
        ("gpus: {x: {memory_gib: 3}}", "expected memory_gib, tflops by dtype and bandwidth_gbs"),
        ("a: [", "expected YAML"),
    ],
)
def test_an_invalid_hardware_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        hardware.gpu(hardware.load(str(tmp_path / "own.yaml")), "x")
    with pytest.raises(InputError, match="expected a hardware table"):
        hardware.load(str(tmp_path / "none.yaml"))
