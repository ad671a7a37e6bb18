"""How a recipe may be laid over GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """gpus = replicate x shard x tensor; tensor-parallel ranks are neighbours, then those of a shard group.

    Attributes:
        activation_checkpointing: none, selective or full.
    """

    gpus: int
    replicate: int = 1
    tensor: int = 1
    micro_batch: int = 1
    activation_checkpointing: str = "none"

    @property
    def shard(self) -> int:
        """GPUs that a copy's parameters are dealt out over, tensor parallelism apart."""
        return self.gpus // self.replicate // self.tensor

    @property
    def readers(self) -> int:
        """Groups of GPUs that read rows of their own."""
        return self.gpus // self.tensor
