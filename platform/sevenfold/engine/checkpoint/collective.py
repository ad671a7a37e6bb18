"""Work that every rank does, where a failure on one rank is raised on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from sevenfold.errors import RunError, first_line

T = TypeVar("T")


def on_each_rank(work: Callable[[], T], group: Any = None) -> list[T]:
    """Calls `work` on every rank of a process group and gathers the results.

    Without an initialized process group, it is called in this process alone.

    Args:
        work: What to call; it may do something different on each rank.
        group: The process group. Default: the default group.

    Returns:
        The results, ordered by rank.

    Raises:
        RunError: `work` raised an exception on some rank. It is raised on every rank, so that none
            waits for a rank that has given up.
    """
    try:
        result: Any = work()
    except RunError as e:
        result = e
    except (Exception, dcp.CheckpointException) as e:  # the latter derives from BaseException
        result = RunError(f"{type(e).__name__}: {first_line(e)}")
    results = [result]
    if dist.is_initialized():
        results *= dist.get_world_size()
        dist.all_gather_object(results, result, group=group)
    for result in results:
        if isinstance(result, RunError):
            raise result
    return results
