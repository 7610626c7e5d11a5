"""What kind of device a tensor is on; meta tensors may stand for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_cpus: tuple[str, ...] = ("cpu",)


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
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, products have this dtype; None: that of what they are given."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
