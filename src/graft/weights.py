"""What a linear is, whatever its class: its sizes, and its weight as one (out, in) matrix.

The only place that knows a quantizer. Shapes: `O` output features, `I` input features.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graft.errors import MergeError, SiteError


def is_linear(module: nn.Module) -> bool:
    """Whether `module` maps its last axis by one weight matrix: `nn.Linear` and its family, `Conv1D`, 4-bit, int8."""
    return isinstance(module, nn.Linear | Conv1D) or _is_4bit(module) or _is_8bit(module)


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` is a lookup table (`nn.Embedding`)."""
    return isinstance(module, nn.Embedding)


def transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (in, out): `Conv1D`, and `nn.Embedding` seen as a linear on one-hot ids."""
    return isinstance(module, Conv1D | nn.Embedding)


def quantized(module: nn.Module) -> bool:
    """Whether the stored weight is a code to be dequantized, not the numbers themselves."""
    return _is_4bit(module) or _is_8bit(module) or getattr(module, "stands_for_codes", False)


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear, or (num_embeddings, embedding_dim) of an embedding; reads sizes, not weights.

    Raises:
        SiteError: if the module is neither.
    """
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if is_linear(module):
        # 4-bit and int8 weights are packed or flat, so the attributes are asked and never the weight's shape.
        linear: Any = module
        return int(linear.in_features), int(linear.out_features)
    raise _no_weight(module)


def weight_OI(module: nn.Module) -> Tensor:
    """Return the weight as (out, in): a view of the stored one, or a fresh dequantized matrix.

    Raises:
        SiteError: if the module is neither a linear nor an embedding.
    """
    if _is_4bit(module):
        return _dequantize_4bit(module)
    if _is_8bit(module):
        return _dequantize_8bit(module)
    if not (is_linear(module) or is_embedding(module)):
        raise _no_weight(module)
    # Not get_parameter: under functional_call the weight is a plain tensor.
    owner: Any = module
    return owner.weight.T if transposed(module) else owner.weight


@torch.no_grad()
def set_weight_OI(module: nn.Module, weight_OI: Tensor) -> None:
    """Write `weight_OI` (out, in) into the module's own storage, in its own layout, dtype and device.

    Raises:
        MergeError: if the module is quantized, or the shape is not the module's.
        SiteError: if the module is neither a linear nor an embedding.
    """
    if quantized(module):
        raise MergeError(f"cannot write into a quantized {type(module).__name__}: load the base in 16 or 32 bit")
    in_features, out_features = features(module)
    if tuple(weight_OI.shape) != (out_features, in_features):
        raise MergeError(
            f"a weight of shape {tuple(weight_OI.shape)} does not fit this {type(module).__name__}: "
            f"give (out, in) = ({out_features}, {in_features})"
        )
    stored = weight_OI.T if transposed(module) else weight_OI
    module.get_parameter("weight").copy_(stored)


@torch.no_grad()
def dense(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain linear of this dtype with the weight that a quantized one stands for, and its bias."""
    in_features, out_features = features(module)
    weight = weight_OI(module)
    plain = nn.Linear(in_features, out_features, bias=False, device=weight.device, dtype=dtype)
    plain.weight.copy_(weight).requires_grad_(False)
    bias = getattr(module, "bias", None)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain


def stored_bytes(module: nn.Module) -> int:
    """Bytes that the weight takes in memory: codes, their scales, and the tables of both."""
    weight: Any = module.weight
    parts = [weight.data]
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        parts += [state.absmax, state.code, *nested]
    elif _is_8bit(module) and weight.dtype == torch.int8:
        parts.append(weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB)  # type: ignore[union-attr]
    return sum(part.numel() * part.element_size() for part in parts)


def _no_weight(module: nn.Module) -> SiteError:
    return SiteError(f"{type(module).__name__} has no linear weight: choose a linear, a Conv1D or an embedding")


def _bitsandbytes() -> Any | None:
    """The quantizer's package if somebody imported it; no module can be of its classes otherwise."""
    return sys.modules.get("bitsandbytes")


def _is_4bit(module: nn.Module) -> bool:
    bnb = _bitsandbytes()
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit)


def _is_8bit(module: nn.Module) -> bool:
    bnb = _bitsandbytes()
    return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt)


def _dequantize_4bit(module: Any) -> Tensor:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:  # built but not yet moved to its device: bitsandbytes quantizes on the move
        return weight
    bnb = _bitsandbytes()
    assert bnb is not None
    state = copy.copy(state)
    state.dtype = torch.float32  # the codes stand for fp32 numbers; forwards round them to their own dtype
    return bnb.functional.dequantize_4bit(weight.data, state)


def _dequantize_8bit(module: Any) -> Tensor:
    """Row-wise absmax codes: w = code * scale / 127. The scale sits on the weight, or in `state` after a forward."""
    weight = module.weight
    if weight.dtype != torch.int8:
        return weight
    scale_O = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    code = weight.data if getattr(weight, "CB", None) is None else weight.CB
    return code.float() * (scale_O.float() / 127.0)[:, None]
