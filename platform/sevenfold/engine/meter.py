"""How fast it goes: throughput, waiting for data, and MFU against a stated peak."""

from __future__ import annotations

import resource
import time

import torch

from sevenfold.engine.cpu import gemm_flops

TRIES = 3  # products, to measure a CPU by
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


class Meter:
    """Counts between two log lines; goodput counts from the start."""

    def __init__(self, flops_per_token: float, peak: float | None, world_size: int, device: torch.device):
        """peak: FLOP/s of a worker that MFU is stated against; None: the data sheet's for a known GPU, on a CPU the quickest
        float32 GEMM seen so far (some at each `read`: at the start of a run others are at work on the machine)."""
        self._measured = peak is None and device.type == "cpu"
        if peak is None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            peak = next((v * 1e12 for k, v in PEAK_TFLOPS.items() if k in name), None)
        self._flops, self._peak, self._world, self._device = flops_per_token, peak, world_size, device
        self._start, self._productive = time.perf_counter(), 0.0
        self.reset()

    def reset(self) -> None:
        self._begin, self._tokens, self._steps, self._waited = time.perf_counter(), 0, 0, 0.0

    def add(self, tokens: int, seconds: float, waited: float) -> None:
        """A step of all ranks' tokens that took so long, a part of it waiting for data on this rank."""
        self._tokens += tokens
        self._steps += 1
        self._waited += waited
        self._productive += seconds - waited

    def read(self) -> dict[str, float]:
        """tokens_per_second of all workers and of one, step_seconds, data_wait (part of the time), memory_gb (this rank's
        peak: of the device, or of the process on a CPU), goodput (part of the time since the start that was spent in steps),
        mfu (where a peak is known)."""
        now = time.perf_counter()
        seconds = max(now - self._begin, 1e-9)
        rate = self._tokens / seconds
        out = {
            "tokens_per_second": rate, "tokens_per_second_per_worker": rate / self._world,
            "step_seconds": seconds / max(1, self._steps), "data_wait": self._waited / seconds,
            "memory_gb": self._memory() / 1e9, "goodput": self._productive / max(now - self._start, 1e-9),
        }  # fmt: skip
        if self._measured:
            self._peak = max(self._peak or 0.0, gemm_flops(TRIES))
        if self._peak:
            out["mfu"] = rate / self._world * self._flops / self._peak
        self.reset()
        return out

    def _memory(self) -> float:
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
