"""Measures the speed of training: throughput, time spent waiting for data, and MFU."""

from __future__ import annotations

import resource
import time

import torch

from sevenfold.cluster.hardware import peak_flops
from sevenfold.engine.cpu import gemm_flops

TRIES = 3  # matmuls per measurement of a CPU's peak


class Meter:
    """Accumulates the steps between two log lines; goodput is counted from the start of the run.

    Args:
        flops_per_token: FLOPs of forward and backward per token, for MFU.
        peak: The FLOP/s of one worker that MFU is relative to. None: the data sheet's value for a
            known GPU; on a CPU the fastest float32 matmul seen so far. That is measured at each
            `read`, since other processes are busy on the machine at the start of a run.
        world_size: The number of workers.
        device: The device that this rank trains on.
    """

    def __init__(
        self, flops_per_token: float, peak: float | None, world_size: int, device: torch.device
    ):
        self._measures_peak = peak is None and device.type == "cpu"
        if peak is None and device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device))
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._world_size = world_size
        self._device = device
        self._run_start = time.perf_counter()
        self._productive_seconds = 0.0
        self.reset()

    def reset(self) -> None:
        """Starts a new interval; goodput is not reset."""
        self._start = time.perf_counter()
        self._tokens, self._steps, self._waited = 0, 0, 0.0

    def add(self, tokens: int, seconds: float, waited: float) -> None:
        """Adds a step to the interval.

        Args:
            tokens: The number of tokens of the step, of all ranks.
            seconds: The duration of the step, waiting for data included.
            waited: The seconds of it that this rank waited for data.
        """
        self._tokens += tokens
        self._steps += 1
        self._waited += waited
        self._productive_seconds += seconds - waited

    def read(self) -> dict[str, float]:
        """Returns the metrics of the interval and starts a new one.

        Returns:
            tokens_per_second: of all workers.
            tokens_per_second_per_worker: the same divided by the number of workers.
            step_seconds: the mean duration of a step.
            data_wait: the fraction of the time that this rank waited for data.
            memory_gb: this rank's peak memory: the GPU's, or on a CPU the process's.
            goodput: the fraction of the time since the start of the run that was spent in steps.
            mfu: model FLOPs utilization; only where a peak is known.
        """
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate = self._tokens / seconds
        metrics = {
            "tokens_per_second": rate,
            "tokens_per_second_per_worker": rate / self._world_size,
            "step_seconds": seconds / max(1, self._steps),
            "data_wait": self._waited / seconds,
            "memory_gb": self._peak_memory() / 1e9,
            "goodput": self._productive_seconds / max(now - self._run_start, 1e-9),
        }
        if self._measures_peak:
            self._peak = max(self._peak or 0.0, gemm_flops(TRIES))
        if self._peak:
            metrics["mfu"] = rate / self._world_size * self._flops_per_token / self._peak
        self.reset()
        return metrics

    def _peak_memory(self) -> float:
        """Returns this rank's peak memory in bytes."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        # ru_maxrss is in KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
