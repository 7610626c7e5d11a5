"""What kind of device a tensor is on; meta tensors may stand for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_cpus: tuple[str, ...] = ("cpu",)
_products: torch.dtype | None = None


def is_cpu(device: torch.device) -> bool:
    """Whether what a CPU is given runs on this device."""
    return device.type in _cpus


@contextlib.contextmanager
def as_cpu() -> Iterator[None]:
    """Inside, meta tensors take the paths of a CPU, for whoever wants to know what these allocate."""
    global _cpus
    before, _cpus = _cpus, ("cpu", "meta")
    try:
        yield
    finally:
        _cpus = before


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype that products have under autocast on this device; None without it."""
    if device.type == "meta":
        return _products
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, products have this dtype; None: that of what they are given. PyTorch has no autocast of meta tensors."""
    if device.type == "meta":
        return _of_shapes(dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextlib.contextmanager
def _of_shapes(dtype: torch.dtype | None) -> Iterator[None]:
    global _products
    before, _products = _products, dtype
    try:
        yield
    finally:
        _products = before
