"""A low-rank sum on a frozen linear as one autograd node, in place of the five that plain operations make.

    y = W x + b + s B A x

The sum is added into the base's own output, and its gradient into the base's own gradient:

    h = x A^T          y += h (s B)^T
    k = gy (s B)       gx = gy W + k A,   gA = k^T x,   gB = s gy^T h

x is kept once for all linears that read the same tensor, h has R numbers for a token, and no output is kept. A and B
are cast down to the dtype of x; x is never cast. The values are those of plain operations to rounding.

Plain operations instead, by rule (`takes`): the weight or bias trains; the module is a subclass of a linear (quantized
ones too) or its forward was replaced; another forward hook ran before ours and may hold the output; autocast, or x, y
and W of different dtypes; tensor subclasses; torch.compile, torch.jit, torch.func and forward-mode gradients.

Shape legend: N tokens, I in, O out, R rank (of all parts of a fused linear together).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from transformers.pytorch_utils import Conv1D

from graft.fast.devices import autocast_of
from graft.fast.products import linear

LINEARS = (nn.Linear, Conv1D)
_on = True


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Take plain operations everywhere inside; for tests and measurements, one thread at a time."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def takes(module: nn.Module, hook: Any, x: Tensor, y: Tensor) -> bool:
    """Whether y is the base's own fresh output, which nobody else holds, of a kind that the node computes.

    Args:
        module: the linear that has just run.
        hook: our own forward hook on it.
        x: its input (..., I).
        y: its output (..., O).
    """
    if not _on or type(module) not in LINEARS or torch.compiler.is_compiling() or "forward" in module.__dict__:
        return False
    if modules._global_forward_hooks or next(iter(module._forward_hooks.values()), None) != hook:
        return False
    weight, bias = module.weight, module.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if not (type(x) is type(y) is Tensor and type(weight) in (Tensor, nn.Parameter)):
        return False
    if not (x.dtype == y.dtype == weight.dtype and x.device == y.device == weight.device and y.is_contiguous()):
        return False
    special = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not (special or autocast_of(x.device) is not None)


def add(
    module: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, dropped: Tensor | None = None
) -> Tensor:
    """y + scale * B A x, written into y. Only where `takes` says so.

    Args:
        module: the frozen linear that gave y.
        x: its input (..., I).
        y: its output (..., O).
        A: (R, I), in fp32 or the dtype of x.
        B: (O, R), likewise.
        scale: the factor on the sum.
        dropped: what the pair reads instead of x (..., I), x after dropout.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    return _Sum.apply(x, dropped, A, B, [y.detach()], weight.T if type(module) is Conv1D else weight, scale)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        A: Tensor,
        B: Tensor,
        own: list[Tensor],
        weight_OI: Tensor,
        scale: float,
    ) -> Tensor:
        (y,) = own  # in a list: the graph that the base's own operation made for it is not this node's
        read = x if dropped is None else dropped
        # B lies turned, since its products with h and with gy are the faster ones so.
        a_RI, b_RO = A.to(y.dtype), (B * scale).to(y.dtype).T.contiguous()
        h_NR = _flat(read) @ a_RI.T
        _flat(y).addmm_(h_NR, b_RO)
        needs_x, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.scale, ctx.apart = scale, dropped is not None
        kept = (read if needs_A else None, h_NR if needs_B else None, weight_OI if needs_x else None)
        ctx.save_for_backward(*kept, A, B, a_RI, b_RO)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = gradients
        read, h_NR, weight_OI, A, B, a_RI, b_RO = ctx.saved_tensors
        needs_x, needs_dropped, needs_A, needs_B, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative goes through A and B themselves
            a_RI, b_RO = A.to(gy.dtype), (B * ctx.scale).to(gy.dtype).T
        gy_NO, shape = _flat(gy), (*gy.shape[:-1], A.shape[1])
        k_NR = gy_NO @ b_RO.T
        gx = gdropped = gA = gB = None
        if needs_x:
            gx = through_base(gy_NO, weight_OI)
            gx = (gx if ctx.apart else gx.addmm_(k_NR, a_RI)).view(shape)
        if needs_dropped:
            gdropped = (k_NR @ a_RI).view(shape)
        if needs_A:
            gA = (k_NR.T @ _flat(read)).to(A.dtype)
        if needs_B:
            if torch.is_grad_enabled():
                h_NR = _again(read, a_RI)
            gB = (h_NR.T @ gy_NO).T.to(B.dtype) * ctx.scale  # so the product reads gy in its own order
        return gx, gdropped, gA, gB, None, None, None


def through_base(gy_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """The frozen linear's own part of a gradient (N, I); by itself, so that a profile can tell it from the pair's."""
    return linear(gy_NO, weight_OI.T)


def _again(read: Tensor | None, a: Tensor) -> Tensor:
    """A x with its graph, which a second derivative goes through."""
    if read is None:
        raise RuntimeError(
            "no second derivative goes through a frozen A, whose input is not kept; run the forward in "
            "graft.fast.low_rank.plain()"
        )
    return _flat(read) @ a.T


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
