"""The ranks of a run connect to those that they talk to, not each to each."""

from pathlib import Path

import psutil
import pytest
from conftest import run_ranks

from sevenfold.cluster import connect

WORLD = 12


def _connections() -> int:
    """Returns the connections of this rank after what a save does with a group of its own."""
    import torch.distributed as dist

    group = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    gathered: list[int | None] = [None] * WORLD
    dist.gather_object(rank, gathered if rank == 0 else None, dst=0, group=group)
    box = [gathered]
    dist.broadcast_object_list(box, src=0, group=group)
    assert box[0] == list(range(WORLD))
    count = len(psutil.Process().net_connections())
    dist.barrier(group)
    return count


@pytest.mark.parametrize("lazy", [True, False])
def test_ranks_are_connected_when_they_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    name = "TORCH_GLOO_LAZY_INIT"
    monkeypatch.setenv(name, connect._WORKERS[name] if lazy else "0")
    counts = run_ranks(WORLD, tmp_path / "store", _connections)
    if lazy:  # trees, and the root that gathers
        assert sum(counts) < 8 * WORLD, counts
    else:
        assert min(counts) >= 2 * (WORLD - 1), counts
