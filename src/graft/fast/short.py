"""Attention of short texts in 16 bits on a CPU, where PyTorch's kernel is slow, above all in the backward.

With 3 x 8 heads, 128 tokens and bfloat16 that kernel takes three times as long for a forward and its backward as the
products do here (5.4 and 1.7 ms on two cores). Scores and softmax are in fp32, as there; the softmax is kept for the
backward in 16 bits, whose gradients are within 2 % of those in double precision. Only in training mode and where
gradients are wanted, so that inference is the base's own.

Shape legend: B rows, H query heads, K key/value heads, G = H / K, T tokens, S keys, D head size, N = B * K.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.fast.devices import autocast, autocast_of, is_cpu

if TYPE_CHECKING:
    from graft.attend import AttentionCall, Result

LOW = (torch.bfloat16, torch.float16)
LONGEST = 256
"""Tokens up to which the products are taken: the softmax that they keep grows with the square."""


def may(model: Any) -> bool:
    """Whether a forward of this model, now, may have calls for `takes`."""
    if not (model.training and torch.is_grad_enabled()) or not is_cpu(model.device):
        return False
    return model.dtype in LOW or autocast_of(model.device) in LOW


def takes(call: AttentionCall) -> bool:
    """Whether a call is of whole short texts in 16 bits on a CPU, in training, and each query sees some key."""
    query, key, value = call.query_BHTD, call.key_BKSD, call.value_BKSD
    if not is_cpu(query.device) or query.dtype not in LOW:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if not (
        call.module.training
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    ):
        return False
    asked = [call.options.get(name) for name in ("dropout", "position_bias", "cache", "softcap", "output_attentions")]
    tokens, keys = query.shape[2], key.shape[2]
    whole = 1 < tokens <= keys <= LONGEST and (tokens == keys if call.mask is None else _sees(call.mask, tokens, keys))
    alike = query.dtype == key.dtype == value.dtype and len(query) == len(key) == len(value)
    return whole and alike and not any(isinstance(one, Tensor) or one for one in asked)


def attention(call: AttentionCall) -> Result:
    """The output of a call that `takes` lets through, (B, T, H, D)."""
    query, value = call.query_BHTD, call.value_BKSD
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    scale = call.options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = _causal(query.shape[2]) if call.mask is None and causal else call.mask
    out_BHTD = _Attention.apply(query, call.key_BKSD, value, float(scale), mask)
    return out_BHTD.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        batch, heads, tokens, _ = query_BHTD.shape
        key_NSD, value_NSD = key_BKSD.flatten(0, 1), value_BKSD.flatten(0, 1)
        query_NGTD = query_BHTD.reshape(len(key_NSD), -1, key_NSD.shape[-1])
        with autocast(query_BHTD.device, None):
            scores = torch.bmm(query_NGTD.float(), key_NSD.float().mT).mul_(scale)
            if mask is not None:
                scores.view(batch, heads, tokens, -1).masked_fill_(~mask, float("-inf"))
            p = torch.softmax(scores, -1).to(query_BHTD.dtype)
            out = torch.bmm(p, value_NSD)
        ctx.save_for_backward(query_NGTD, key_NSD, value_NSD, p)
        ctx.scale, ctx.shapes = scale, (query_BHTD.shape, key_BKSD.shape, value_BKSD.shape)
        return out.view(batch, heads, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> Any:
        query_NGTD, key_NSD, value_NSD, p = ctx.saved_tensors
        of_query, of_key, of_value = ctx.shapes
        grad = grad_BHTD.reshape(len(value_NSD), -1, value_NSD.shape[-1])
        with autocast(grad.device, None):
            to_value = torch.bmm(p.mT, grad)
            to_scores = torch.bmm(grad, value_NSD.mT)
            to_scores = torch._softmax_backward_data(to_scores, p, -1, p.dtype).mul_(ctx.scale)
            to_query = torch.bmm(to_scores, key_NSD)
            to_key = torch.bmm(to_scores.mT, query_NGTD)
        return to_query.view(of_query), to_key.view(of_key), to_value.view(of_value), None, None


@functools.lru_cache(maxsize=16)
def _causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril_()


def _sees(mask: Any, tokens: int, keys: int) -> bool:
    """Whether a mask says which keys are visible, and to each query at least one."""
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 4
    return fits and mask.shape[2:] == (tokens, keys) and bool(mask.any(-1).all())
