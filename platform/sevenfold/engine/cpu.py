"""Settings that make torch faster on a CPU and change its results by no more than rounding."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

_ONEDNN: Any = torch.backends.mkldnn  # Any: torch's type stubs do not declare `matmul`


def prepare(threads: int) -> None:
    """Sets this process up to compute with this number of threads."""
    torch.set_num_threads(threads)
    # newly initialized models are full of denormal numbers, which are very slow on some CPUs
    torch.set_flush_denormal(True)
    if not _is_intel() and onednn_is_exact():
        # lets torch use oneDNN, which still computes in float32 on this CPU (checked just above)
        _ONEDNN.matmul.fp32_precision = "bf16"


def onednn_is_exact() -> bool:
    """Returns whether oneDNN computes in float32 even where it is allowed to round to bfloat16.

    It rounds only on CPUs that have matrix units for bfloat16 (AMX).

    torch 2.13 multiplies float32 matrices with MKL, which takes a slow path on CPUs that are not
    Intel's. Allowing bfloat16 is the only way to make torch use oneDNN's float32 kernels, which are
    2.2 times as fast on a Zen 5. The choice depends on vendor and exactness only, never on a
    timing: a resumed run must compute the same even on a machine that is busy at its start.
    """
    if not _ONEDNN.is_available():
        return False
    before = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = "bf16"
    try:
        return all(
            _error(*shape) < 1e-5 for shape in ((64, 64, 64), (512, 192, 384), (256, 1024, 1024))
        )
    finally:
        _ONEDNN.matmul.fp32_precision = before


def _error(m: int, k: int, n: int) -> float:
    """Returns the relative error of a matmul [m, k] x [k, n]: 1e-3 in bfloat16, 1e-7 in float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    exact = a.double() @ b.double().T
    products = (a @ b.T, torch.nn.functional.linear(a, b), (b @ a.T).T)
    return max(float((p - exact).norm() / exact.norm()) for p in products)


def _is_intel() -> bool:
    """Returns whether the CPU is Intel's; True if that is unknown, so that nothing is changed."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


def gemm_flops(tries: int) -> float:
    """Measures the peak FLOP/s of this process: its fastest float32 matmul of 1024 x 1024 matrices.

    Args:
        tries: The number of matmuls to time.
    """
    n, best = 1024, math.inf
    a = torch.ones(n, n)
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
