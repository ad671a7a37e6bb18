"""How fast it goes: throughput, waiting for data, and MFU against a stated peak."""

from __future__ import annotations

import time

import torch

# dense bf16 TFLOP/s without sparsity, from the vendor's data sheets
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "V100": 125.0,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that MFU is stated against: the data sheet's for a known GPU, a measured float32 GEMM on a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((v * 1e12 for k, v in PEAK_TFLOPS.items() if k in name), None)
    n, best = 1024, float("inf")
    a = torch.ones(n, n)
    for _ in range(20):  # the quickest: others are at work on the machine
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


class Meter:
    """Counts between two log lines."""

    def __init__(self, flops_per_token: float, peak: float | None, world_size: int):
        self._flops, self._peak, self._world = flops_per_token, peak, world_size
        self.reset()

    def reset(self) -> None:
        self._begin, self._tokens, self._steps, self._waited = time.perf_counter(), 0, 0, 0.0

    def add(self, tokens: int, waited: float) -> None:
        """A step of all ranks' tokens for whose data this rank waited so many seconds."""
        self._tokens += tokens
        self._steps += 1
        self._waited += waited

    def read(self) -> dict[str, float]:
        """tokens_per_second of all workers, step_seconds, data_wait (part of the time), mfu (where a peak is known)."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rate = self._tokens / seconds
        out = {"tokens_per_second": rate, "step_seconds": seconds / max(1, self._steps), "data_wait": self._waited / seconds}
        if self._peak:
            out["mfu"] = rate / self._world * self._flops / self._peak
        self.reset()
        return out
