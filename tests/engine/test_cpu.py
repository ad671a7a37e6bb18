import torch

from sevenfold.engine import cpu
from sevenfold.engine.meter import Meter


def test_products_stay_float32() -> None:
    threads = torch.get_num_threads()
    try:
        cpu.prepare(1)
        assert torch.get_num_threads() == 1
        a, b = torch.randn(700, 300, requires_grad=True), torch.randn(500, 300, requires_grad=True)
        product = torch.nn.functional.linear(a, b)
        exact = a.double() @ b.double().T
        assert (product - exact).norm() / exact.norm() < 1e-5
        product.sum().backward()
        for p, q in ((a, b), (b, a)):
            expected = q.double().sum(0).expand_as(p)
            assert (p.grad - expected).norm() / expected.norm() < 1e-5
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_would_be_noticed(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert cpu._error(256, 1024, 1024) < 1e-5
    rounded = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda a, b: rounded(a.bfloat16(), b.bfloat16()).float())
    assert cpu._error(256, 1024, 1024) > 1e-4
    if torch.backends.mkldnn.is_available():
        assert not cpu.onednn_is_exact()


def test_mfu_is_stated_against_the_quickest_product() -> None:
    meter = Meter(1e6, None, 1, torch.device("cpu"))
    meter.add(1000, 1.0, 0.1)
    first = meter.read()
    assert first["mfu"] > 0 and meter._peak is not None
    peak = meter._peak
    meter.add(1000, 1.0, 0.1)
    meter.read()
    assert meter._peak >= peak
    given = Meter(1e6, 1e12, 1, torch.device("cpu"))
    given.add(1000, 1.0, 0.1)
    read = given.read()
    assert read["mfu"] == read["tokens_per_second"] * 1e6 / 1e12
