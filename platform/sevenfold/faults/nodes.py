"""The Ray nodes under a run, and what faults do to them: signals, lost nodes, added nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sevenfold.cluster import connect, ray_private
from sevenfold.cluster.temp_folder import default_ray_folder
from sevenfold.data.stream import TASK_CPUS
from sevenfold.errors import RunError
from sevenfold.recipe import Recipe

FROZEN_SECONDS = 60  # until the processes of a frozen node are killed

# Ray's health checks in a local cluster: a silent node is declared dead after about 8 s.
# On a busy machine a node that is well may be silent for 4 s.
HEALTH = {
    "period_ms": 1000,
    "timeout_ms": 1000,
    "failure_threshold": 8,
}


@ray.remote(num_cpus=0)
class NodeAgent:
    """An actor on a node that carries out what a fault does there."""

    def ready(self) -> None:
        """Returns as soon as the actor runs."""

    def wait_for_end(self, pid: int) -> None:
        """Waits until a process of this node has ended, 30 s at most."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(30)

    def signal(self, pid: int, number: int) -> None:
        """Sends a signal to a process of this node."""
        os.kill(pid, number)

    def pause(self, pid: int, seconds: float) -> None:
        """Stops a process of this node for some seconds."""
        self.signal(pid, signal.SIGSTOP)
        time.sleep(seconds)
        self.signal(pid, signal.SIGCONT)

    def kill_raylet(self) -> None:
        """Kills the node's raylet, and with it all of Ray's processes there, this actor too."""
        self._raylet().kill()

    def freeze(self) -> None:
        """Stops all of Ray's processes on this node, as if the machine had lost power.

        Connections stay open, but nothing answers. After FROZEN_SECONDS the processes are killed.
        """
        raylet = self._raylet()
        pids = " ".join(str(p.pid) for p in [raylet, *raylet.children(recursive=True)])
        # only processes that are still stopped: another process may have got a pid in the meantime
        kill = "grep -qs '^State:.T' /proc/$p/status && kill -KILL $p"
        script = f"kill -STOP {pids}; sleep {FROZEN_SECONDS}; for p in {pids}; do {kill}; done"
        subprocess.Popen(["sh", "-c", script], start_new_session=True)

    def _raylet(self) -> psutil.Process:
        parent = psutil.Process(os.getppid())
        if parent.name() != "raylet":
            raise RunError(
                f"expected a raylet as the parent process of a Ray worker, found {parent.name()}: "
                "no process was killed"
            )
        return parent


class Nodes:
    """The nodes of the cluster that this process is connected to, with an agent on each.

    Attributes:
        protected: Ids of the nodes that no fault may end: the head and the node of this process.
    """

    def __init__(self) -> None:
        self._agents: dict[str, Any] = {}
        heads = {
            node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]
        }
        self.protected = heads | {ray.get_runtime_context().get_node_id()}

    def agent(self, node_id: str) -> Any:
        """Returns the agent on a node; starts it at the first call."""
        # The agents are kept: Ray ends an actor, and what it has started, with its last reference.
        if node_id not in self._agents:
            strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
            agent = NodeAgent.options(scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]
            self._agents[node_id] = agent
            ray.get(agent.ready.remote())
        return self._agents[node_id]

    def kill_node(self, node_id: str) -> None:
        """Kills a node's raylet, and with it all of Ray's processes there."""
        self.agent(node_id).kill_raylet.remote()

    def freeze(self, node_id: str) -> None:
        """Makes a node stop responding."""
        self.agent(node_id).freeze.remote()

    def drain(self, node_id: str, seconds: int) -> None:
        """Tells Ray that a node will be preempted in some seconds, as a cloud's notice does.

        Raises:
            RunError: Ray refuses to drain the node.
        """
        arguments = [
            "--address",
            ray.get_runtime_context().gcs_address,
            "--node-id",
            node_id,
            "--reason-message",
            "drill",
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--deadline-remaining-seconds",
            str(seconds),
        ]
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        result = subprocess.run(
            ["ray", "drain-node", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )
        if result.returncode:
            output = result.stderr.strip() or result.stdout.strip()
            raise RunError(f"ray drain-node failed: {output[-300:]}")

    def workers_without_a_node(self, recipe: Recipe) -> int:
        """Returns how many workers have room on the free resources after the loss of a node.

        The node that is assumed to be lost is the one with the most room among those that a fault
        may end.
        """
        cluster = recipe.cluster
        need = {"CPU": cluster.cpus_per_worker + TASK_CPUS, "GPU": cluster.gpus_per_worker}
        counts = {
            node_id: min(int(free.get(key, 0) // amount) for key, amount in need.items() if amount)
            for node_id, free in ray_private.available_resources_per_node().items()
        }
        total = sum(counts.values())
        lost = max(
            (count for node_id, count in counts.items() if node_id not in self.protected),
            default=total,
        )
        return total - lost

    def close(self) -> None:
        """Disconnects from the cluster."""
        ray.shutdown()


class LocalNodes(Nodes):
    """The nodes of a new cluster on this machine, which this process starts and connects to.

    The head holds no worker. Each other node holds one worker of a recipe that was changed by
    `worker`, and its data tasks.
    """

    def __init__(self, cpus_per_worker: float, dashboard: bool = False):
        """Starts the head and connects to it.

        Args:
            cpus_per_worker: The recipe's; a node gets one CPU more, for data tasks.
            dashboard: Start the dashboard, which `ray.util.state` needs.
        """
        self._cpus = max(1, int(cpus_per_worker)) + 1  # Ray accepts integers only
        self._dashboard = dashboard
        self._start()
        super().__init__()

    @property
    def recipe_overrides(self) -> dict[str, Any]:
        """Changes to a recipe with which a node has room for exactly one worker."""
        return {"cluster.cpus_per_worker": self._cpus - 0.5, "cluster.gpus_per_worker": 0}

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        connect.quieten()
        ray_private.listen_on_loopback()
        ray_private.enable_token_auth()
        health_checks = {f"health_check_{key}": value for key, value in HEALTH.items()}
        head: dict[str, Any] = {
            "num_cpus": 0,
            "include_dashboard": self._dashboard,
            "_system_config": health_checks,
        }
        if self._dashboard:
            # The default port is taken where another Ray runs on this machine.
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                head["dashboard_port"] = probe.getsockname()[1]
        with default_ray_folder():  # Cluster has no setting for its own file there
            self._cluster = Cluster(True, head_node_args=head)
        os.environ["RAY_ADDRESS"] = self._cluster.address
        connect.connect()
        self._others: list[Any] = []

    def set_count(self, count: int) -> None:
        """Adds or removes nodes until there are `count` besides the head, with an agent on each."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in list(self._others):
            if node.node_id not in alive or len(self._others) > count:
                self._others.remove(node)
                self._agents.pop(node.node_id, None)
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._others) < count:
            self._others.append(self._cluster.add_node(num_cpus=self._cpus))
            self.agent(self._others[-1].node_id)

    def kill_head(self) -> None:
        """Disconnects from the cluster and kills its head."""
        ray.shutdown()  # otherwise Ray would end this process too
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def restart(self) -> None:
        """Replaces a cluster whose head was killed by a new one with as many nodes."""
        count = len(self._others)
        self.close()
        self._start()
        super().__init__()
        self.set_count(count)

    def close(self) -> None:
        """Disconnects from the cluster and ends it."""
        super().close()
        self._cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
