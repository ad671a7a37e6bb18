"""A cluster of pools: who runs where, and what more may come."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import ROOT, run_job, start_job
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_tasks

from sevenfold.data.ledger import Ledger
from sevenfold.runs.faults import Run
from sevenfold.runs.nodes import LocalNodes


@pytest.mark.slow
def test_data_tasks_stay_on_their_pool(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        pool = cluster.add_node(num_cpus=2, labels={"pool": "data"})
        cluster.add_node(num_cpus=8, labels={"pool": "train"})
        tree |= {"cluster": {"num_workers": 2, "cpus_per_worker": 2.5, "data_labels": {"pool": "data"}}}
        tree["cluster"]["worker_labels"] = {"pool": "train"}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
        said = run_job("pretrain", "r.yaml", "cluster.worker_labels={pool: trian}", home=tmp_path, code=2)
        assert "cluster.worker_labels {'pool': 'trian'}: no node of this cluster has them, found pool=data, pool=train" in said
        run_job("pretrain", "r.yaml", home=tmp_path)
        ray.init(address=cluster.address, log_to_driver=False)
        tasks = list_tasks(address=cluster.address, detail=True, limit=1000)
        where = {t.node_id for t in tasks if "MapBatches" in t.name}
        assert where == {pool.node_id}
        workers = json.loads((tmp_path / f"runs/{tree['name']}/workers.json").read_text())
        assert pool.node_id not in {w["node"] for w in workers}
        left = list_actors(address=cluster.address, detail=True, filters=[("state", "=", "ALIVE")])
        assert {a.node_id for a in left} <= {cluster.head_node.node_id}  # else a machine of a pool would never be idle
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.nightly
def test_a_sweep_widens_as_nodes_join(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"] |= {"executor": "inline"}
    tree["train"] |= {"steps": 100}
    space = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    tree |= {"validation": {"every": 20, "rows": 8}, "search": {"trials": 6, "scheduler": "none", "space": space}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    nodes = LocalNodes(1, dashboard=True)
    try:
        nodes.ready(1)
        process = start_job("sweep", "r.yaml", "name=wide", *(f"{k}={v}" for k, v in nodes.worker.items()), home=tmp_path)
        root, deadline = tmp_path / "runs/wide-sweep/trials", time.monotonic() + 200
        while not list(root.glob("*/reports.json")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        nodes.ready(2)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "6 trials of 100 steps, 1 at a time" in out
        where = {json.loads(p.read_text())[0]["node"] for p in root.glob("*/workers.json")}
        assert len(where) == 2
    finally:
        nodes.close()


@pytest.mark.slow
def test_a_run_waits_starts_small_and_grows(tree: dict[str, Any], tmp_path: Path) -> None:
    steps = 150  # enough for a node to join in the meantime
    tree["model"]["config"] |= {"hidden_size": 64, "intermediate_size": 128}
    tree["data"] |= {"sequence_length": 128, "validation": []}
    tree["train"] |= {"global_batch": 32, "micro_batch": 8, "steps": steps}
    tree |= {"optimizer": {"learning_rate": 1e-3}, "checkpoint": {"every": 10}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    nodes = LocalNodes(1)

    def start(name: str, workers: str) -> Run:
        words = [f"name={name}", f"cluster.num_workers={workers}", "cluster.resize_seconds=2"]
        words += [f"{k}={v}" for k, v in nodes.worker.items()]
        at = {"SEVENFOLD_HOME": str(tmp_path)}
        return Run([sys.executable, str(ROOT / "jobs/pretrain.py"), "r.yaml", *words], at, str(tmp_path))

    def said(run: Run, what: str) -> bool:
        return any(what in line for line in run.lines)

    def until(run: Run, what: str) -> None:
        deadline = time.monotonic() + 200
        while not said(run, what):
            assert time.monotonic() < deadline and run.process.poll() is None, run.lines
            time.sleep(0.1)

    runs: list[Run] = []
    try:
        nodes.ready(1)
        runs.append(first := start("first", "1"))
        first.reach(1)
        runs.append(grown := start("grown", "[1,2]"))
        until(grown, "waiting for CPU: grown (1 workers) needs ")
        assert not said(grown, "training on")
        first.kill()
        until(grown, "training on 1 workers, 1 machines")
        grown.reach(3)
        nodes.ready(2)
        until(grown, "training on 2 workers, 2 machines")
        assert grown.end() == 0, grown.lines
        runs.append(whole := start("whole", "1"))
        assert whole.end() == 0, whole.lines
    finally:
        for run in runs:
            run.kill()
        nodes.close()
    read, losses = [], []
    for name in ("whole", "grown"):
        read.append(Ledger(str(tmp_path / f"runs/{name}/ledger")).read(1, steps))
        rows = map(json.loads, (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines())
        losses.append([(r["step"], r["train/loss"]) for r in rows if "train/loss" in r])
    assert read[0] == read[1] and [s for s, _ in losses[1]] == list(range(1, steps + 1))
    assert [x for _, x in losses[1]] == pytest.approx([x for _, x in losses[0]], rel=1e-5)
