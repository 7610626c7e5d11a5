"""One (out, in) view of every linear, and writing back in its own layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from graft import weights
from graft.errors import MergeError, SiteError


def plain_modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"linear": nn.Linear(3, 5), "conv1d": Conv1D(5, 3), "embedding": nn.Embedding(3, 5)}


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding"])
def test_view_and_write(name: str) -> None:
    module = plain_modules()[name]
    assert weights.features(module) == (3, 5)
    assert weights.transposed(module) == (name != "linear")
    assert weights.is_linear(module) == (name != "embedding")
    assert weights.is_embedding(module) == (name == "embedding")
    assert not weights.quantized(module)
    weight_OI = weights.weight_OI(module)
    assert weight_OI.shape == (5, 3)
    assert weight_OI.data_ptr() == module.weight.data_ptr()
    stored = module.weight
    weights.set_weight_OI(module, torch.arange(15.0).view(5, 3))
    assert module.weight is stored and module.weight.requires_grad
    assert torch.equal(weights.weight_OI(module), torch.arange(15.0).view(5, 3))


def test_the_weight_is_what_the_module_computes_with() -> None:
    modules = plain_modules()
    x_BI = torch.randn(2, 3)
    for name in ("linear", "conv1d"):
        y_BO = F.linear(x_BI, weights.weight_OI(modules[name]), modules[name].bias)
        torch.testing.assert_close(y_BO, modules[name](x_BI))
    ids = torch.tensor([2, 0])
    one_hot_BI = F.one_hot(ids, 3).float()
    torch.testing.assert_close(F.linear(one_hot_BI, weights.weight_OI(modules["embedding"])), modules["embedding"](ids))


def test_write_keeps_the_dtype() -> None:
    module = nn.Linear(3, 5).to(torch.bfloat16)
    weights.set_weight_OI(module, torch.ones(5, 3))
    assert module.weight.dtype == torch.bfloat16


def test_errors() -> None:
    with pytest.raises(SiteError, match="LayerNorm has no linear weight"):
        weights.weight_OI(nn.LayerNorm(3))
    with pytest.raises(SiteError, match="ReLU has no linear weight"):
        weights.features(nn.ReLU())
    with pytest.raises(MergeError, match=r"shape \(3, 5\) does not fit this Linear: give \(out, in\) = \(5, 3\)"):
        weights.set_weight_OI(nn.Linear(3, 5), torch.zeros(3, 5))
    assert not weights.is_linear(nn.LayerNorm(3)) and not weights.is_linear(nn.Bilinear(2, 2, 2))


def test_meta_device() -> None:
    module = nn.Linear(3, 5, device="meta")
    assert weights.features(module) == (3, 5)
    assert weights.weight_OI(module).is_meta


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    source = nn.Linear(64, 32, bias=False)
    if kind == "nf4":
        module = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    else:
        module = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    module.load_state_dict(source.state_dict())
    module = module.to("cpu")
    assert weights.is_linear(module) and weights.quantized(module)
    assert weights.features(module) == (64, 32) and not weights.transposed(module)
    x_BI = torch.randn(4, 64)
    with torch.no_grad():
        y_BO = module(x_BI)
    weight_OI = weights.weight_OI(module)
    assert weight_OI.shape == (32, 64)
    assert (weight_OI - source.weight).abs().max() < (0.02 if kind == "nf4" else 0.002)
    torch.testing.assert_close(F.linear(x_BI, weight_OI.float()), y_BO.float(), atol=0.02, rtol=0.05)
    with pytest.raises(MergeError, match="quantized"):
        weights.set_weight_OI(module, weight_OI)
