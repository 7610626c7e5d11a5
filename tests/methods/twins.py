"""What the tests of methods share: a peft model on the same tiny base, inputs, and one comparison."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import graft
from examples import perturb
from graft.method import Method
from tiny import MODELS, batch, tiny


def data_of(name: str, labels: bool = False, rows: int = 3) -> dict[str, Tensor]:
    """A right-padded batch for `tiny(name)`; encoder-decoders keep their labels, which are the decoder's input."""
    data = dict(batch(name, rows))
    if not labels and name not in ("t5", "mt5", "bart"):
        data.pop("labels", None)
    return data


def lively(name: str, **overrides: Any) -> Any:
    """The tiny model with larger weights, so that what sits deep inside moves the logits visibly."""
    config = getattr(transformers, MODELS[name][1])
    spread = next((key for key in ("initializer_range", "init_std") if hasattr(config(), key)), None)
    return tiny(name, **({spread: 0.2} if spread else {}), **overrides)


def adapted(name: str, method: Method, *, seed: int = 1, peft_compat: bool = False, **overrides: Any) -> Any:
    """A tiny model with one adapter "a", all of whose parameters have moved."""
    model = lively(name, **overrides)
    perturb(graft.attach(model, method, "a", peft_compat=peft_compat), seed, 0.3)
    return model


def peft_twin(name: str, config: Any, **overrides: Any) -> Any:
    """The same tiny model under peft."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own use of what transformers deprecates, and its notes on Conv1D
        return peft.get_peft_model(lively(name, **overrides), config).eval()


@torch.no_grad()
def copy_into(parameter: Any, value: Tensor) -> None:
    """Set a parameter of peft's model to a value of the same shape."""
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    parameter.copy_(value)


def inner(peft_model: Any, path: str) -> nn.Module:
    """The module of peft's model that stands at a path of the base."""
    return peft_model.base_model.model.get_submodule(path)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to 1e-5 of the scale of the values."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"off by {error}"


def far(actual: Tensor, expected: Tensor) -> None:
    """Different enough that an equality beside it means something."""
    assert (actual - expected).abs().max() > 1e-3
