"""A training step in shapes alone: which bytes are alive when, without a number of the model being computed.

The model stands on the meta device, so its tensors have sizes and no storage. Integers and booleans stay real: which
rows have a label, where texts end and what a mask says is read from them as in a real step. Kernels that meta tensors
would not take (attention) are stood in for by what they keep.

Shape legend: B rows, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from graft.fast import devices

META = torch.device("meta")
_aten = torch.ops.aten
PRODUCTS = {_aten.mm, _aten.addmm, _aten.addmm_, _aten.bmm, _aten.baddbmm, _aten.baddbmm_}

PAIRS = {_aten.add, _aten.add_, _aten.sub, _aten.sub_, _aten.mul, _aten.mul_, _aten.div, _aten.div_}

WRAPPERS = ("_fn", "inner")
"""Functions that PyTorch puts around a mode's dispatch."""


class Shapes(TorchDispatchMode):
    """Counts the bytes of meta storages while they live.

    Attributes:
        live: bytes now, by the phase in which they were made.
        peak: the most bytes at once.
        at_peak: `live` at that moment.
        phase: what is made from now on belongs to it.
        arithmetic: multiplications and additions of all matrix products but those inside of kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.peak = 0
        self.phase = "activations"
        self.arithmetic = 0
        self._known: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((*args, *kwargs.values())))
        if kwargs.get("device") is not None:
            kwargs["device"] = self._place(func, tensors, kwargs)
        if len({tensor.is_meta for tensor in tensors}) == 2:
            args, kwargs = tree_map(_on_meta, (args, kwargs))
        if func.overloadpacket in PRODUCTS and tensors[-1].is_meta:
            self.arithmetic += 2 * tensors[-2].numel() * tensors[-1].shape[-1]
        if func is _aten.add.Tensor and _sums_gradients(args):
            return args[0]
        out = func(*args, **kwargs)
        if func.overloadpacket in PAIRS and devices.is_cpu(META):
            self.reach(self.total + _casts(tensors))
        for tensor in _tensors((out,)):
            if tensor.is_meta:
                self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor from now until nobody has it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = self.phase, size
        self.live[self.phase] = self.live.get(self.phase, 0) + size
        weakref.finalize(storage, self._gone, key)
        self.reach(self.total)

    def reach(self, total: int) -> None:
        """So many bytes are alive now, of which some may be nobody's: they are gone when the operation is done."""
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.live)
            self.at_peak[self.phase] = self.at_peak.get(self.phase, 0) + total - self.total

    def know(self, tensors: Any) -> None:
        """Leave the storages of these tensors out: what stands beside a step, such as weights."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = "", 0

    @property
    def total(self) -> int:
        """Bytes that are alive now."""
        return sum(self.live.values())

    def _gone(self, key: int) -> None:
        phase, size = self._known.pop(key, ("", 0))
        if phase:
            self.live[phase] -= size

    @staticmethod
    def _place(func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> torch.device:
        """The device of a new tensor: what has no floating numbers stays real, all else is a shape."""
        dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
        if dtype is None:  # arange and full of integers have an integer type by default
            numbers = [value for value in func._schema.arguments if value.name in ("end", "fill_value")]
            dtype = torch.int64 if numbers and numbers[0].name == "end" else torch.float32
        real = not (dtype.is_floating_point or dtype.is_complex)
        return torch.device("cpu") if real and not any(t.is_meta for t in tensors) else META


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among an operation's arguments or results, which may be in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _sums_gradients(args: Any) -> bool:
    """Whether autograd itself adds a gradient to another, which it does in place where nobody else has the first."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in WRAPPERS:
        frame = frame.f_back
    own = frame is not None and frame.f_code.co_name == "_engine_run_backward"
    return own and args[0].is_meta and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype


def _casts(tensors: list[Tensor]) -> int:
    """Bytes of the copies that a CPU makes of operands whose type is not that of the result."""
    floats = [tensor for tensor in tensors if tensor.dim() and tensor.is_meta and tensor.is_floating_point()]
    wide = max((tensor.element_size() for tensor in floats), default=0)
    return sum(tensor.numel() * wide for tensor in floats if tensor.element_size() < wide)


def _on_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) and not value.is_meta else value


@contextlib.contextmanager
def kernels(on_cpu: bool, compute: torch.dtype | None = None) -> Iterator[dict[int, Tensor]]:
    """Inside, attention keeps what the fused kernels of a CPU, or of a GPU, keep.

    Args:
        compute: the dtype that autocast gives products; None without it.

    Yields:
        What autocast keeps until it ends: the casts of what trains. Whoever ends a forward empties it.
    """
    real, product = F.scaled_dot_product_attention, F.linear
    casts: dict[int, Tensor] = {}

    def cast(value: Any) -> Any:
        dtype = devices.autocast_of(META)
        if dtype is None or not isinstance(value, Tensor) or not (value.is_meta and value.is_floating_point()):
            return value
        forward = torch._C._current_graph_task_id() == -1  # blocks that run again in a backward autocast alone
        if value.is_leaf and value.requires_grad and value.dtype != dtype and forward:
            if id(value) not in casts:
                casts[id(value)] = value.to(dtype)
            return casts[id(value)]
        return value.to(dtype)

    def linear(*args: Any, **options: Any) -> Any:
        return product(*map(cast, args), **{name: cast(value) for name, value in options.items()})

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **options: Any) -> Any:
        dropout = args[0] if args else options.get("dropout_p", 0.0)
        query, key, value = cast(query), cast(key), cast(value)
        if not query.is_meta or (on_cpu and _composed(query, value, attn_mask, dropout)):
            return real(query, key, value, attn_mask, *args, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # the kernels add it, and so keep it as numbers
            attn_mask = query.new_empty(attn_mask.shape)
        return _Kernel.apply(query, key, value, attn_mask)

    # a TorchFunctionMode would not be there in a backward, where checkpointed blocks run again
    F.scaled_dot_product_attention, F.linear = attention, linear
    try:
        with devices.as_cpu() if on_cpu else contextlib.nullcontext(), devices.autocast(META, compute):
            yield casts
    finally:
        F.scaled_dot_product_attention, F.linear = real, product


def _composed(query: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether PyTorch takes products and a softmax in the place of a CPU's fused kernel."""
    trained = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    return trained or dropout > 0 or query.shape[-1] != value.shape[-1]


class _Kernel(torch.autograd.Function):
    """What a fused attention kernel allocates and keeps: the output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, mask: Tensor | None) -> Tensor:
        B, H, T, _ = query_BHTD.shape
        out = query_BHTD.new_empty(B, T, H, value_BKSD.shape[-1]).transpose(1, 2)
        norm_BHT = query_BHTD.new_empty(B, H, T, dtype=torch.float32)
        ctx.save_for_backward(query_BHTD, key_BKSD, value_BKSD, out, norm_BHT, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None
