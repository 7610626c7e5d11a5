"""What the tests of adapter folders share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from examples import CANNOT, perturb
from graft.method import Method
from tiny import batch, tiny


def attached(name: str, method: Method, **options: Any) -> nn.Module:
    """A tiny model with the method under the name "a", with values as after training."""
    if name in CANNOT.get(method.name, {}):
        pytest.skip(CANNOT[method.name][name])
    model = tiny(name)
    perturb(graft.attach(model, method, "a", **options))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    out = model(**graft.prepare(model, batch(name, rows=2)))
    return out.logits


@torch.no_grad()
def logits_of_plain(model: nn.Module, name: str) -> Tensor:
    return model(**batch(name, rows=2)).logits
