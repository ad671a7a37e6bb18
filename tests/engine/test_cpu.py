"""Matmuls on the CPU stay exact, and the meter's MFU on the CPU."""

import torch

from sevenfold.engine import cpu
from sevenfold.engine.meter import Meter


def test_matmuls_stay_float32() -> None:
    threads = torch.get_num_threads()
    try:
        cpu.prepare(1)
        assert torch.get_num_threads() == 1
        a, b = torch.randn(700, 300, requires_grad=True), torch.randn(500, 300, requires_grad=True)
        product = torch.nn.functional.linear(a, b)
        exact = a.double() @ b.double().T
        assert (product - exact).norm() / exact.norm() < 1e-5
        product.sum().backward()
        for operand, other in ((a, b), (b, a)):
            expected = other.double().sum(0).expand_as(operand)
            assert (operand.grad - expected).norm() / expected.norm() < 1e-5
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_matmuls_are_detected(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert cpu._error(256, 1024, 1024) < 1e-5
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda a, b: linear(a.bfloat16(), b.bfloat16()).float()
    )
    assert cpu._error(256, 1024, 1024) > 1e-4
    if torch.backends.mkldnn.is_available():
        assert not cpu.onednn_is_exact()


def test_mfu_is_relative_to_the_fastest_matmul_or_the_known_peak() -> None:
    meter = Meter(1e6, None, 1, torch.device("cpu"))
    meter.add(1000, 1.0, 0.1)
    first = meter.read()
    assert first["mfu"] > 0 and meter._peak is not None
    peak = meter._peak
    meter.add(1000, 1.0, 0.1)
    meter.read()
    assert meter._peak >= peak
    known_peak = Meter(1e6, 1e12, 1, torch.device("cpu"))
    known_peak.add(1000, 1.0, 0.1)
    metrics = known_peak.read()
    assert metrics["mfu"] == metrics["tokens_per_second"] * 1e6 / 1e12
