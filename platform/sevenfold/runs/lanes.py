"""Which worker reads what. Apart from its like, since Ray's own actors unpickle it: they need no torch."""

from __future__ import annotations

from typing import Any

import ray.train


class Lanes(ray.train.DataConfig):
    """Hands each rank its slice of the plan's lanes (a data.stream.Shard) instead of a split of a dataset."""

    def __init__(self, tensor: int = 1):
        """tensor: so many neighbouring ranks read the same rows (parallel.tensor)."""
        super().__init__()
        self.tensor = tensor

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """datasets: name -> data.stream.Stream. Returns for each rank name -> Shard."""
        readers = world_size // self.tensor
        return [{name: s.shard(rank // self.tensor, readers) for name, s in datasets.items()} for rank in range(world_size)]
