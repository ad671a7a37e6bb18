"""What makes torch quick on a CPU without changing what it computes beyond rounding."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

_ONEDNN: Any = torch.backends.mkldnn  # its types lack matmul


def prepare(threads: int) -> None:
    """Sets this process up to compute with so many threads."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # fresh models are full of denormals, which some CPUs crawl through
    if not _of_intel() and onednn_is_exact():
        _ONEDNN.matmul.fp32_precision = "bf16"  # allows oneDNN, which here computes in float32 all the same


def onednn_is_exact() -> bool:
    """Whether oneDNN, allowed to round factors to bfloat16, does not: it only does so where the CPU has matrix units (AMX).

    torch 2.13 multiplies float32 matrices by MKL, which takes its slow path on CPUs that are not Intel's, and has no other
    way to ask for oneDNN's float32 kernels (2.2 times as fast on a Zen 5). By vendor and exactness alone: a run that goes on
    must not compute otherwise because a machine was busy when a clock was read.
    """
    if not _ONEDNN.is_available():
        return False
    before = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = "bf16"
    try:
        return all(_error(*shape) < 1e-5 for shape in ((64, 64, 64), (512, 192, 384), (256, 1024, 1024)))
    finally:
        _ONEDNN.matmul.fp32_precision = before


def _error(m: int, k: int, n: int) -> float:
    """Of a product, relative to its size. bfloat16 gives 1e-3, float32 1e-7."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    exact = a.double() @ b.double().T
    products = (a @ b.T, torch.nn.functional.linear(a, b), (b @ a.T).T)
    return max(float((p - exact).norm() / exact.norm()) for p in products)


def _of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


def gemm_flops(tries: int) -> float:
    """FLOP/s of the quickest of so many float32 products of 1024 x 1024 matrices by this process's threads."""
    n, best = 1024, math.inf
    a = torch.ones(n, n)
    for _ in range(tries):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best
