"""Which worker reads what. Apart from its like, since Ray's own actors unpickle it: they need no torch."""

from __future__ import annotations

from typing import Any

import ray.train


class Lanes(ray.train.DataConfig):
    """Hands each rank its slice of the plan's lanes (a data.stream.Shard) instead of a split of a dataset."""

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """datasets: name -> data.stream.Stream. Returns for each rank name -> Shard."""
        return [{name: s.shard(rank, world_size) for name, s in datasets.items()} for rank in range(world_size)]
