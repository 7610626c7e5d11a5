"""Products by the faster library: against plain multiplication in double precision."""

from __future__ import annotations

import pytest
import torch

from graft.fast import products


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_plain_product(rows: int, turned: bool, dtype: torch.dtype) -> None:
    """To rounding, for weights as they are stored and turned."""
    torch.manual_seed(0)
    x, weight = (
        torch.randn(rows, 24).to(dtype),
        torch.randn(24, 10).to(dtype).T if turned else torch.randn(10, 24).to(dtype),
    )
    with torch.no_grad():
        found = products.linear(x, weight)
    assert found.dtype == dtype
    within = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, atol=5 * within, rtol=within)


def test_a_graph_and_a_pytorch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a graph is wanted, and where PyTorch has no such operation, the plain product is taken."""
    x, weight = torch.randn(40, 24, requires_grad=True), torch.randn(10, 24)
    plain = x.detach() @ weight.T
    found = products.linear(x, weight)
    assert torch.equal(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], weight.sum(0).expand(40, -1))
    calls: list[str] = []
    monkeypatch.setattr(products, "_onednn", lambda: lambda *given: calls.append("taken"))
    with torch.no_grad():
        products.linear(x, weight)
        assert calls == ["taken"]
        monkeypatch.setattr(products, "_onednn", lambda: None)
        assert torch.equal(products.linear(x, weight), plain)
