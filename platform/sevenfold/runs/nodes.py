"""The nodes under a run, and what can be done to them: signals to their processes, nodes that end, nodes that are added."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import ray
from ray._private.authentication import authentication_token_setup as authentication
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sevenfold.data.stream import TASK_CPUS
from sevenfold.errors import RunError
from sevenfold.recipe import Recipe
from sevenfold.runs import cluster

FROZEN = 60  # seconds until a frozen node is ended
HEALTH = {"period_ms": 1000, "timeout_ms": 1000, "failure_threshold": 4}  # a silent node is known in seconds


@ray.remote(num_cpus=0)
class Hand:
    """On a node: what a fault does there."""

    def ready(self) -> None:
        """Returns when it is there."""

    def ended(self, pid: int) -> None:
        """Returns when a process is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(30)

    def signal(self, pid: int, number: int) -> None:
        os.kill(pid, number)

    def pause(self, pid: int, seconds: float) -> None:
        self.signal(pid, signal.SIGSTOP)
        time.sleep(seconds)
        self.signal(pid, signal.SIGCONT)

    def lose(self) -> None:
        """The node's raylet, and with it all that runs there, this too."""
        self._raylet().kill()

    def freeze(self) -> None:
        """As a machine that loses its power: connections stay open, and nobody answers."""
        raylet = self._raylet()
        pids = " ".join(str(p.pid) for p in [raylet, *raylet.children(recursive=True)])
        still = "grep -qs '^State:.T' /proc/$p/status && kill -KILL $p"  # and no process that has got its number since
        script = f"kill -STOP {pids}; sleep {FROZEN}; for p in {pids}; do {still}; done"
        subprocess.Popen(["sh", "-c", script], start_new_session=True)

    def _raylet(self) -> psutil.Process:
        parent = psutil.Process(os.getppid())
        if parent.name() != "raylet":
            raise RunError(f"expected a raylet as the parent of Ray's worker, found {parent.name()}: nothing is ended")
        return parent


class Nodes:
    """The nodes of the cluster that this process is connected to, a Hand on each. `kept`: ids of those that no fault may take:
    the head, and the one that this process runs on."""

    def __init__(self) -> None:
        self._hands: dict[str, Any] = {}
        heads = {n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]}
        self.kept = heads | {ray.get_runtime_context().get_node_id()}

    def hand(self, node: str) -> Any:
        if node not in self._hands:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            self._hands[node] = Hand.options(scheduling_strategy=where).remote()  # type: ignore[attr-defined]
            ray.get(self._hands[node].ready.remote())
        return self._hands[node]

    def end(self, node: str, how: str = "lose") -> None:
        """Loses a node: `lose` or `freeze`."""
        # the hand is kept: Ray would end it, and what it started, with its last reference
        getattr(self.hand(node), how).remote()

    def drain(self, node: str, seconds: int) -> None:
        """What a cloud's notice becomes: the node is to be gone in so many seconds. Raises RunError where Ray refuses."""
        words = ["--address", ray.get_runtime_context().gcs_address, "--node-id", node, "--reason-message", "drill"]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(seconds)]
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        done = subprocess.run(["ray", "drain-node", *words], capture_output=True, text=True, env={**os.environ, "PATH": path})
        if done.returncode:
            raise RunError(f"ray drain-node: {(done.stderr.strip() or done.stdout.strip())[-300:]}")

    def room(self, recipe: Recipe) -> int:
        """Workers that are free to start on these nodes without the roomiest of those that can be lost."""
        c = recipe.cluster
        need = {"CPU": c.cpus_per_worker + TASK_CPUS, "GPU": c.gpus_per_worker}
        free = available_resources_per_node()
        counts = {i: min(int(has.get(k, 0) // v) for k, v in need.items() if v) for i, has in free.items()}
        lost = max((n for i, n in counts.items() if i not in self.kept), default=sum(counts.values()))
        return sum(counts.values()) - lost

    def close(self) -> None:
        ray.shutdown()


class LocalNodes(Nodes):
    """Nodes of a cluster on this machine, which is started here and connected to. The head holds no worker; each other node one
    of a recipe that was changed by `worker`, and its data tasks."""

    def __init__(self, cpus_per_worker: float, dashboard: bool = False):
        """dashboard: as of cluster.connect."""
        self._cpus = max(1, int(cpus_per_worker)) + 1  # whole, as Ray wants them
        self._dashboard = dashboard
        self._start()
        super().__init__()

    @property
    def worker(self) -> dict[str, Any]:
        """Changes to a recipe by which a node has room for one worker and no more."""
        return {"cluster.cpus_per_worker": self._cpus - 0.5, "cluster.gpus_per_worker": 0}

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        cluster.quieten()
        cluster.stay_here()
        authentication.enable_token_auth_by_default()  # as ray.init does
        authentication.ensure_token_if_auth_enabled(create_token_if_missing=True)
        system = {f"health_check_{k}": v for k, v in HEALTH.items()}
        head = {"num_cpus": 0, "include_dashboard": self._dashboard, "_system_config": system}
        self._cluster = Cluster(True, head_node_args=head)
        os.environ["RAY_ADDRESS"] = self._cluster.address
        cluster.connect()
        self._others: list[Any] = []

    def ready(self, count: int) -> None:
        """Has just so many nodes beside the head, a hand on each."""
        alive = {n["NodeID"] for n in ray.nodes() if n["Alive"]}
        for node in list(self._others):
            if node.node_id not in alive or len(self._others) > count:
                self._others.remove(node)
                self._hands.pop(node.node_id, None)
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._others) < count:
            self._others.append(self._cluster.add_node(num_cpus=self._cpus))
            self.hand(self._others[-1].node_id)

    def lose_head(self) -> None:
        ray.shutdown()  # or Ray would end this process too
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def again(self) -> None:
        """A new cluster, as large, in the place of one whose head was lost."""
        count = len(self._others)
        self.close()
        self._start()
        super().__init__()
        self.ready(count)

    def close(self) -> None:
        super().close()
        self._cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
