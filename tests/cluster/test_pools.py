"""Clusters with several pools of nodes: task placement, and runs that grow as nodes join."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import ROOT, free_port, run_job, start_job
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_tasks

from sevenfold.data.ledger import Ledger
from sevenfold.faults.inject import Run
from sevenfold.faults.nodes import LocalNodes


@pytest.mark.nightly
@pytest.mark.usefixtures("no_ray_token")
def test_data_tasks_stay_on_their_pool(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(
        True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()},
    )
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        pool = cluster.add_node(num_cpus=2, labels={"pool": "data"})
        cluster.add_node(num_cpus=8, labels={"pool": "train"})
        tree |= {
            "cluster": {"num_workers": 2, "cpus_per_worker": 2.5, "data_labels": {"pool": "data"}}
        }
        tree["cluster"]["worker_labels"] = {"pool": "train"}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
        error = run_job(
            "pretrain", "r.yaml", "cluster.worker_labels={pool: trian}", home=tmp_path, code=2
        )
        expected = (
            "cluster.worker_labels {'pool': 'trian'}: no node of this cluster has them, "
            "found pool=data, pool=train"
        )
        assert expected in error
        run_job("pretrain", "r.yaml", home=tmp_path)
        ray.init(address=cluster.address, log_to_driver=False)
        tasks = list_tasks(address=cluster.address, detail=True, limit=1000)
        data_nodes = {t.node_id for t in tasks if "MapBatches" in t.name}
        assert data_nodes == {pool.node_id}
        workers = json.loads((tmp_path / f"runs/{tree['name']}/workers.json").read_text())
        assert pool.node_id not in {w["node"] for w in workers}
        # An actor that stays on a node of a pool would keep the autoscaler from ending the node.
        alive = list_actors(address=cluster.address, detail=True, filters=[("state", "=", "ALIVE")])
        assert {a.node_id for a in alive} <= {cluster.head_node.node_id}
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.nightly
@pytest.mark.usefixtures("no_ray_token")
def test_a_sweep_uses_nodes_that_join(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"] |= {"executor": "inline"}
    tree["train"] |= {"steps": 100}
    space = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    tree |= {
        "validation": {"every": 20, "rows": 8},
        "sweep": {"trials": 6, "scheduler": "none", "space": space},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    nodes = LocalNodes(1, dashboard=True)
    try:
        nodes.set_count(1)
        overrides = [f"{k}={v}" for k, v in nodes.recipe_overrides.items()]
        process = start_job("sweep", "r.yaml", "name=wide", *overrides, home=tmp_path)
        root, deadline = tmp_path / "runs/wide-sweep/trials", time.monotonic() + 200
        while (
            not list(root.glob("*/reports.json"))
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.2)
        nodes.set_count(2)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "6 trials of 100 steps, 1 at a time" in stdout
        trial_nodes = {json.loads(p.read_text())[0]["node"] for p in root.glob("*/workers.json")}
        assert len(trial_nodes) == 2
    finally:
        nodes.close()


@pytest.mark.nightly
@pytest.mark.usefixtures("no_ray_token")
def test_a_run_waits_starts_small_and_grows(tree: dict[str, Any], tmp_path: Path) -> None:
    # Enough steps for a node to join in the meantime.
    steps = 150
    tree["model"]["config"] |= {"hidden_size": 64, "intermediate_size": 128}
    tree["data"] |= {"sequence_length": 128, "validation": []}
    tree["train"] |= {"global_batch": 32, "micro_batch": 8, "steps": steps}
    tree |= {"optimizer": {"learning_rate": 1e-3}, "checkpoint": {"every": 10}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    nodes = LocalNodes(1)

    def start(name: str, workers: str) -> Run:
        overrides = [f"name={name}", f"cluster.num_workers={workers}", "cluster.resize_seconds=2"]
        overrides += [f"{k}={v}" for k, v in nodes.recipe_overrides.items()]
        command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "r.yaml", *overrides]
        return Run(command, {"SEVENFOLD_HOME": str(tmp_path)}, str(tmp_path))

    def has_logged(run: Run, text: str) -> bool:
        return any(text in line for line in run.lines)

    def wait_for(run: Run, text: str, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not has_logged(run, text):
            assert time.monotonic() < deadline and run.process.poll() is None, run.lines
            time.sleep(0.1)

    runs: list[Run] = []
    try:
        nodes.set_count(1)
        runs.append(first := start("first", "1"))
        first.wait_for_step(1)
        runs.append(grown := start("grown", "[1,2]"))
        wait_for(grown, "waiting for CPU: grown (1 workers) needs ")
        assert not has_logged(grown, "training with")
        first.kill()
        # The killed run's reservation ends after a minute, which Ray looks at every 20 seconds.
        wait_for(grown, "training with 1 worker on 1 machine", 120)
        grown.wait_for_step(3)
        nodes.set_count(2)
        wait_for(grown, "training with 2 workers on 2 machines")
        assert grown.wait() == 0, grown.lines
        runs.append(baseline := start("whole", "1"))
        assert baseline.wait() == 0, baseline.lines
    finally:
        for run in runs:
            run.kill()
        nodes.close()
    draws, losses = [], []
    for name in ("whole", "grown"):
        draws.append(Ledger(str(tmp_path / f"runs/{name}/ledger")).read(1, steps))
        rows = map(json.loads, (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines())
        losses.append([(r["step"], r["train/loss"]) for r in rows if "train/loss" in r])
    assert draws[0] == draws[1] and [s for s, _ in losses[1]] == list(range(1, steps + 1))
    assert [x for _, x in losses[1]] == pytest.approx([x for _, x in losses[0]], rel=1e-5)
