"""Products of a wide matrix with a weight, by the library that is the faster one where it is known.

In fp32 on a CPU PyTorch multiplies by MKL; by oneDNN only what it compiles. That takes 0.58 to 0.95 of MKL's time on an
AMD EPYC with two threads (384 rows, weights of 512 x 512 to 32,000 x 512), and the same within noise with one. Other
CPUs were not measured.

Shape legend: N rows, I in, O out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST_ROWS = 16
"""Fewer are a matter of reading the weight, and of the call itself."""


def linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T (N, O), outside of any graph."""
    run = _onednn()
    wide = x_NI.dtype == weight_OI.dtype == torch.float32 and len(x_NI) >= LEAST_ROWS
    if run is None or not wide or x_NI.device.type != "cpu" or torch.is_grad_enabled():
        return x_NI @ weight_OI.T
    return run(x_NI, weight_OI, None, "none", [], "")


@functools.cache
def _onednn() -> Callable[..., Any] | None:
    """The operation that compiled models use, where this PyTorch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
