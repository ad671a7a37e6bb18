"""The process group of Train's workers on one machine, listening on the loopback address only.

Ray's own TorchConfig (2.60) lets torch open the TCPStore, by which the ranks find each other, on
every network interface, and lets gloo listen on the address of the host's name. Anyone who can
connect to that store can send the ranks arbitrary data.
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
_store: Any = None  # rank 0's TCPStore, kept alive as long as the process


class Loopback(torch_config.TorchConfig):
    """A TorchConfig for workers that all run on this machine."""

    @property
    def backend_cls(self) -> Any:
        """The backend that sets up the process group, as Ray Train asks for it."""
        return _Backend


class _Backend(torch_config._TorchBackend):
    def on_start(self, worker_group: Any, backend_config: torch_config.TorchConfig) -> None:
        """Sets up the process group of all workers."""
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        port = worker_group.execute_single(0, _open_store)
        worker_group.execute(_set_environment, port)
        worker_group.execute(torch_config._set_torch_distributed_env_vars)
        world_size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    torch_config._setup_torch_process_group,
                    backend=backend,
                    world_rank=rank,
                    world_size=world_size,
                    init_method="env://",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(world_size)
            ]
        )


def _open_store() -> int:
    """Opens the store on the loopback address and returns its port."""
    global _store
    listener = socket.create_server((HOST, 0))
    port = int(listener.getsockname()[1])
    _store = dist.TCPStore(
        HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return port


def _set_environment(port: int) -> None:
    """Makes torch, gloo and NCCL of this process use the store and the loopback interface."""
    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == HOST for address in addresses)
    )
    os.environ |= {
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        # torch's setting for: the store exists already, no rank is to open one
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
