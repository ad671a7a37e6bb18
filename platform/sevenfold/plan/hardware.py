"""What GPUs and nodes are and cost: hardware.yaml, or a file of one's own that is laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: a second, dense, by dtype (float32, bfloat16). bandwidth: of its memory, bytes a second."""

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Fleet:
    """Like GPUs in like nodes.

    Attributes:
        link: within a node, bytes a second a GPU, one way.
        network: between nodes, bytes a second a node, one way.
        hourly: of a node, USD; None where no price is known.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    link: float
    network: float
    hourly: float | None = None
