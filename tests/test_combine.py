"""A combined adapter is the weighted sum of the others: on one linear exactly, against dense algebra."""

from __future__ import annotations

import pytest
import torch

import graft
from examples import perturb
from tiny import batch, tiny


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_cat_equals_the_weighted_route(arch: str) -> None:
    model, data = tiny(arch), batch(arch)
    perturb(graft.attach(model, graft.LoRA(rank=2, targets=("attention.query",)), "a"), 1)
    perturb(graft.attach(model, graft.LoRA(rank=3, targets=("attention.query", "embedding"), rslora=True), "b"), 2)
    with graft.route(model, [{"a": 0.3, "b": -1.5}]):
        expected = model(**data).logits
    adapter = graft.combine(model, {"a": 0.3, "b": -1.5}, "sum")
    assert torch.allclose(adapter.at(next(iter(adapter.sites))).weight_delta(), _dense(model, adapter), atol=1e-6)
    with graft.route(model, ["sum"]):
        assert torch.allclose(model(**data).logits, expected, atol=1e-4)
    with graft.route(model, [None]):
        assert not torch.allclose(model(**data).logits, expected, atol=1e-4)


def _dense(model: torch.nn.Module, adapter: graft.Adapter) -> torch.Tensor:
    path = next(iter(adapter.sites))
    found = [(model.adapters[n], w) for n, w in (("a", 0.3), ("b", -1.5)) if path in model.adapters[n].sites]
    return sum(w * a.at(path).weight_delta() for a, w in found)


def test_what_is_not_low_rank_is_refused() -> None:
    model = tiny("bert")
    graft.attach(model, graft.LoRA(), "headed")
    graft.attach(model, graft.PrefixTuning(length=2), "prefix")
    for name in ("headed", "prefix"):
        with pytest.raises(graft.ConfigError, match=f"{name}.*cannot be summed"):
            graft.combine(model, {name: 1.0}, "sum")
    with pytest.raises(graft.ConfigError, match="how is one of cat"):
        graft.combine(model, {"headed": 1.0}, "sum", how="linear")
