"""What a cluster holds, and what its autoscaler may start."""

import sys

import pytest
import ray

from sevenfold.cluster import capacity

UNLIMITED = capacity._Nodes({"CPU": 8.0, "GPU": 0.0}, float("inf"))


def test_an_unlimited_node_type_holds_any_number_of_workers(
    on_shared_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.init(logging_level="ERROR")
    monkeypatch.setattr(capacity, "_startable_nodes", lambda: [UNLIMITED])
    assert capacity.gang_capacity({"CPU": 4.0}, 3) == sys.maxsize // 3
    assert capacity.gang_capacity({"CPU": 4.0, "GPU": 1.0}, 3) == 0


def test_an_unlimited_node_type_without_a_resource_adds_none_of_it() -> None:
    limited = capacity._Nodes({"GPU": 8.0}, 2.0)
    total = capacity._sum_resources([UNLIMITED, limited])
    assert total["CPU"] == float("inf") and total["GPU"] == 16.0


def test_a_cluster_with_nothing_free_is_described_as_such() -> None:
    assert capacity._format({"CPU": 2, "GPU": 1}, {}) == "0 CPU, 0 GPU"
    assert capacity._format({"CPU": 2, "GPU": 1}) == "2 CPU, 1 GPU"
