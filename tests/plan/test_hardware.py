"""The table of GPUs, machines and prices, and the fleets that are made of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from sevenfold.doctor import cluster_file, machines
from sevenfold.engine.meter import PEAK_TFLOPS
from sevenfold.errors import InputError
from sevenfold.plan import hardware
from sevenfold.recipe import parse

TABLE = hardware.load()
FILE = str(ROOT / "cluster.yaml")


def test_every_entry_says_where_it_is_from() -> None:
    for kind in ("gpus", "machines"):
        for name, entry in TABLE[kind].items():
            assert entry["source"] and re.fullmatch(r"20\d\d(-\d\d){0,2}", str(entry["date"])), name
            assert type(entry["checked"]) is bool, name
    assert all(m.get("gpu") in TABLE["gpus"] for m in TABLE["machines"].values() if m["gpus"])


def test_machines_are_the_doctors() -> None:
    for name, entry in TABLE["machines"].items():
        assert machines.of(name) == (entry["gpus"], entry["vcpus"]), name


def test_peaks_are_the_meters() -> None:
    for ours, theirs in {"a100-80gb": "A100", "h100-80gb": "H100", "h200-141gb": "H200", "h100-pcie": "H100 PCIe", "l4": "L4",
                         "l40s": "L40S", "a10g": "A10G"}.items():  # fmt: skip
        assert TABLE["gpus"][ours]["tflops"]["bfloat16"] == PEAK_TFLOPS[theirs]


def test_gpus_lie_in_machines() -> None:
    fleet = hardware.of_gpus(TABLE, "H100-80gb", 64)
    assert (fleet.gpus, fleet.gpus_per_node, fleet.nodes, fleet.hourly) == (64, 8, 8, 55.04)
    assert fleet.usd_per_hour == pytest.approx(8 * 55.04)
    assert fleet.network == pytest.approx(400e9) and fleet.gpu.flops["bfloat16"] == 989e12
    assert hardware.of_gpus(TABLE, "h100-80gb", 1).hourly == 6.88  # the machine that has one
    assert hardware.of_gpus(TABLE, "h100-80gb", 12).usd_per_hour == pytest.approx(2 * 55.04)  # one is half empty
    assert hardware.of_gpus(TABLE, "l4", 2).name == "g6.12xlarge"
    nowhere = hardware.of_gpus(TABLE, "h100-pcie", 4)
    assert nowhere.hourly is None and nowhere.usd_per_hour is None


def test_unknown_gpus_are_told_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"GPU h1000: expected one of a100-40gb, .*h100-80gb.*--hardware"):
        hardware.of_gpus(TABLE, "h1000", 8)
    with pytest.raises(InputError, match="above 0, found 0"):
        hardware.of_gpus(TABLE, "h100-80gb", 0)


def test_the_pools_of_cluster_yaml() -> None:
    config = cluster_file.read(FILE)
    train, spot = hardware.of_cluster(TABLE, config, FILE)
    assert (train.name, train.gpus, train.spot, spot.name, spot.gpus, spot.spot) == ("train", 32, False, "train_spot", 64, True)
    assert train.gpu.name == "a100-40gb" and train.hourly == TABLE["machines"]["p4d.24xlarge"]["usd"]
    assert spot.hourly == pytest.approx(TABLE["spot_share"] * (train.hourly or 0)) and "assumed" in spot.priced
    beside = TABLE["machines"]["m6i.2xlarge"]["usd"] + TABLE["machines"]["m6i.8xlarge"]["usd"]  # the head, and data
    assert train.usd_per_hour == pytest.approx(4 * (train.hourly or 0) + beside)
    recipe = parse(str(ROOT / "jobs/recipes/llama-7b.yaml"), ["cluster.worker_labels={market: spot}"])
    assert [f.name for f in hardware.of_cluster(TABLE, config, FILE, recipe)] == ["train_spot"]


def changed(**pool: Any) -> dict[str, Any]:
    config = yaml.safe_load(Path(FILE).read_text())
    for name in ("train", "train_spot"):
        config["available_node_types"][name] |= pool
    return dict(config)


def test_a_cluster_without_gpus_is_told() -> None:
    with pytest.raises(InputError, match=r"expected a pool of workers with GPUs .*found head, data, train, train_spot"):
        hardware.of_cluster(TABLE, changed(resources={"CPU": 96}), FILE)
    recipe = parse(str(ROOT / "jobs/recipes/llama-7b.yaml"), ["cluster.worker_labels={pool: none}"])
    with pytest.raises(InputError, match=r"with the labels {'pool': 'none'}"):
        hardware.of_cluster(TABLE, changed(), FILE, recipe)
    with pytest.raises(InputError, match=r"available_node_types.train: machine p99.48xlarge: not known: expected one of"):
        hardware.of_cluster(TABLE, changed(node_config={"InstanceType": "p99.48xlarge"}), FILE)


def test_a_file_is_laid_over_the_table(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "gpus: {mine: {memory_gib: 10, tflops: {bfloat16: 100}, bandwidth_gbs: 1000}}\n"
        "machines: {p4d.24xlarge: {spot_usd: 9.5}, box: {gpu: mine, gpus: 4, network_gbps: 10}}\n"
    )
    table = hardware.load(str(own))
    _, spot = hardware.of_cluster(table, changed(), FILE)
    assert spot.hourly == 9.5 and spot.gpu.name == "a100-40gb"  # the rest stays
    fleet = hardware.of_gpus(table, "mine", 8)
    assert (fleet.gpu.memory, fleet.gpus_per_node, fleet.nodes, fleet.hourly) == (10 * 2**30, 4, 2, None)
    assert "box" not in hardware.load()["machines"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu: {}", "expected spot_share, gpus, machines"),
        ("[1]", "found list"),
        ("machines: {p4d.24xlarge: 3}", "expected fields"),
        ("machines: {p4d.24xlarge: {usdd: 3}}", "did you mean usd"),
        ("gpus: {x: {memory_gib: 3}}", "expected memory_gib, tflops by dtype and bandwidth_gbs"),
        ("a: [", "expected YAML"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        hardware.gpu(hardware.load(str(tmp_path / "own.yaml")), "x")
    with pytest.raises(InputError, match="expected a table of hardware"):
        hardware.load(str(tmp_path / "none.yaml"))
