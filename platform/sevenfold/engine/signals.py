"""The requests that a training run can receive from outside."""

from enum import IntEnum

import torch
from torch import distributed as dist


class Signal(IntEnum):
    """A request that rank 0 has received; every rank acts on it after the current step.

    The ranks' values are summed along with the step's number of targets (see `step.train_step`).
    Only rank 0 sends a value other than NONE, so that the sum is that value.
    """

    NONE = 0
    SAVE = 1  # a machine of this run will be lost: save now, and continue
    STOP = 2  # save now, and stop
    ABANDON = 3  # stop without saving: nobody resumes from this step


def agreed(signal: Signal, device: torch.device) -> Signal:
    """Returns the request that rank 0 has received, on every rank; all of them call it.

    Args:
        signal: The request that this rank has received, NONE on all but rank 0.
        device: The device of this rank.
    """
    received = torch.tensor(int(signal), device=device)
    dist.all_reduce(received)
    return Signal(int(received))
