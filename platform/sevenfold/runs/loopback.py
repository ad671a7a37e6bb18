"""Train's workers on a Ray of this machine alone: their process group listens on the loopback address.

Ray's own TorchConfig (2.60) has torch open the store by which ranks find each other on every interface, and gloo listen on the
address of the host's name. Who reaches that store can say anything to the ranks.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import config as torch_config

HOST = "127.0.0.1"
_store: Any = None  # of rank 0: lives as long as its process


class Loopback(torch_config.TorchConfig):
    """As TorchConfig, for workers that are all on this machine."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(torch_config._TorchBackend):
    def on_start(self, worker_group: Any, backend_config: torch_config.TorchConfig) -> None:
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        worker_group.execute(_prepare, worker_group.execute_single(0, _serve))
        worker_group.execute(torch_config._set_torch_distributed_env_vars)
        world = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, torch_config._setup_torch_process_group, backend=backend, world_rank=rank, world_size=world,
                    init_method="env://", timeout_s=backend_config.timeout_s,
                )
                for rank in range(world)
            ]
        )  # fmt: skip


def _serve() -> int:
    """Opens the store on the loopback address. Returns its port."""
    global _store
    door = socket.create_server((HOST, 0))
    port = int(door.getsockname()[1])
    _store = dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach())
    return port


def _prepare(port: int) -> None:
    loopback = next(name for name, all_ in psutil.net_if_addrs().items() if any(a.address == HOST for a in all_))
    os.environ |= {
        "MASTER_ADDR": HOST, "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for: the store is there, no rank opens one
        "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback,
    }  # fmt: skip
