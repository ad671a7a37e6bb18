"""A cluster of pools: who runs where, and what more may come."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import run_job
from ray.cluster_utils import Cluster
from ray.util.state import list_tasks


@pytest.mark.slow
def test_data_tasks_stay_on_their_pool(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        pool = cluster.add_node(num_cpus=2, labels={"pool": "data"})
        cluster.add_node(num_cpus=8, labels={"pool": "train"})
        tree |= {"cluster": {"num_workers": 2, "cpus_per_worker": 2.5, "data_labels": {"pool": "data"}}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
        run_job("pretrain", "r.yaml", home=tmp_path)
        ray.init(address=cluster.address, log_to_driver=False)
        tasks = list_tasks(address=cluster.address, detail=True, limit=1000)
        where = {t.node_id for t in tasks if "MapBatches" in t.name}
        assert where == {pool.node_id}
        workers = json.loads((tmp_path / f"runs/{tree['name']}/workers.json").read_text())
        assert pool.node_id not in {w["node"] for w in workers}
    finally:
        ray.shutdown()
        cluster.shutdown()
