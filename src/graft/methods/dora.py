"""DoRA: a trained length for each row of the weight, and low-rank change of its direction (Liu et al. 2024).

    W' = m * V / n,   V = W + s * B A,   n = ||V|| by row,   m (O) starts at n   (arXiv 2402.09353)

n is a constant in the gradient (section 4.3 of the paper). V is never a second weight of the forward:

    y' = y + (g - 1) * (y - b) + g * s * B A x,   g = m / n

The bias is not scaled. With dropout, the base's part of the sum reads the dropped input too, as in peft: the base's
product is then computed twice in training. On an embedding, y is E[x], B A x is the pair's lookup, and n is taken over
the vocabulary. A fused qkv of which some parts are asked has m and n for their rows alone.

Shape legend: B batch rows, T tokens, I in, O out, S scaled rows of O, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.errors import ConfigError
from graft.fast.devices import autocast
from graft.method import Delta, parameter
from graft.methods.lora import EmbeddingLoRADelta, LoRA, LoRADelta, embed_scale
from graft.roles import Site
from graft.weights import weight_OI

STARTS = ("kaiming", "gaussian", "random")
PIECE = 2**22
"""Values of V that are held at once while its norms are taken."""


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation of linears and embeddings (Liu et al. 2024, arXiv 2402.09353).

    Its settings are LoRA's, without `lora_bias`; the count per site is r * (in + out) + out.

    Raises:
        ConfigError: a value out of range, `lora_bias`, or a start that is LoRA's alone.
    """

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2402.09353"
    trains: ClassVar[str] = "r (I + O) + O per linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ConfigError("DoRA: lora_bias has no place in its formula; leave it off")
        if self.init not in STARTS:
            raise ConfigError(f"DoRA: init is one of {', '.join(STARTS)}, not {self.init!r}")

    def on_linear(self, site: Site, rank: int, scale: float, rows: list[Tensor]) -> Delta:
        return DoRADelta(site, self, rank, scale, rows)

    def on_embedding(self, site: Site, rank: int, scale: float) -> Delta:
        return EmbeddingDoRADelta(site, rank, scale, self.init)


class Magnitude(Delta):
    """What DoRA adds to a low-rank pair: the parameter `magnitude` (S), and the norms that it is divided by."""

    from_base = True
    site: Site
    scale: float
    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter
    cached: tuple[list[tuple[Any, ...]], Tensor] | None = None

    def parts(self) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        """(rows of O or None for all, B, A) of each pair."""
        return [(None, self.B, self.A)]

    def start(self) -> None:
        """Let the magnitude be the norm."""
        weight: Any = self.site.module.weight
        self.magnitude = parameter(len(self.B), like=weight)
        if not weight.is_meta:
            self.magnitude.data.copy_(self.norm(weight_OI(self.site.module)))

    @torch.no_grad()
    def norm(self, weight_OI: Tensor) -> Tensor:
        """The lengths (S) of the rows of V over a weight (O, I), in the precision of the pair."""
        found = []
        for rows, B, A in self.parts():
            part = weight_OI if rows is None else weight_OI[rows.to(weight_OI.device)]
            found.append(row_norms(part, B, A, self.scale))
        return torch.cat(found)

    def base_norm(self) -> Tensor:
        """`norm` over the base's own weight; a frozen adapter keeps it until what it comes from has changed."""
        norm: Tensor = self.once(lambda: self.norm(weight_OI(self.site.module)), "norm")
        return norm

    def freezes(self) -> bool:
        """Whether nobody trains here, so that what was computed may be kept."""
        # Who trains may write where no version is counted: fused optimizers and averaged weights do.
        trains = self.training or torch.is_grad_enabled() or self.A.requires_grad
        return not (trains or torch.compiler.is_compiling() or any(each.is_inference() for each in self._sources()))

    def once(self, make: Callable[[], Any], *what: Any) -> Any:
        """What `make` gives; while nobody trains, made once for `what` and kept until a tensor has changed."""
        if not self.freezes():
            self.cached = None
            return make()
        state = [(what,), *((each, each._version, each.data_ptr(), each.dtype) for each in self._sources())]
        if self.cached is None or any(
            (new[0] is not old[0] if isinstance(new[0], Tensor) else new != old) or new[1:] != old[1:]
            for new, old in zip(state, self.cached[0], strict=True)
        ):
            self.cached = state, make()
        return self.cached[1]

    def _sources(self) -> tuple[Tensor, ...]:
        weight: Any = self.site.module.weight
        return weight, self.A, self.B, self.magnitude

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None}  # in a copy, versions start anew

    def gain(self, norm: Tensor) -> Tensor:
        """m / n (S); rows of length zero have no direction, and give zero whatever their gain."""
        return self.magnitude / torch.where(norm > 0, norm, 1.0)

    def weight_delta(self) -> Tensor:
        weight = weight_OI(self.site.module).to(self.A.dtype)
        merged = self.merged(weight, None)
        assert merged is not None
        return merged[0] - weight

    def factors(self) -> None:
        return None


class DoRADelta(Magnitude, LoRADelta):
    """DoRA on a linear: A (n r, I), B (S, r), magnitude (S); n the number of parts (1 for a whole linear, S = O)."""

    into = Delta.into  # the base's own output is read after the sum

    def __init__(self, site: Site, method: LoRA, rank: int, scale: float, rows: list[Tensor]) -> None:
        super().__init__(site, method, rank, scale, rows)
        self.start()

    def parts(self) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        if not self.rows:
            return super().parts()
        blocks = self.B.split([len(rows) for rows in self.rows])
        return list(zip(self.rows, blocks, self.A.split(self.rank), strict=True))

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        base: Any = self.site.module
        own_BTO = y_BTO
        if not self.rows and self.bias is None and self.freezes():
            # On CPU a product of one row takes fp32 a quarter of the time of bf16.
            one = x_BTI.device.type == "cpu" and x_BTI.numel() == x_BTI.shape[-1]
            x_BTI = x_BTI.float() if one and x_BTI.dtype.itemsize < 4 else x_BTI
            A, B, change_O = self.once(lambda: self._ready(x_BTI.dtype, y_BTO.dtype), x_BTI.dtype, y_BTO.dtype)
            own_BTO = own_BTO if base.bias is None else own_BTO - base.bias.to(own_BTO.dtype)
            up_BTO = F.linear(F.linear(x_BTI, A), B)
            return torch.addcmul(y_BTO, own_BTO, change_O) + up_BTO.to(y_BTO.dtype)
        if self.dropout > 0 and self.training:
            x_BTI = F.dropout(x_BTI, self.dropout)
            own_BTO = base.forward(x_BTI)  # not base(...): its hooks are what runs now
        if base.bias is not None:
            own_BTO = own_BTO - base.bias.to(own_BTO.dtype)
        gain_S = self.gain(self.base_norm())
        up_BTS = self._up(F.linear(x_BTI, self.A.to(x_BTI.dtype))).to(y_BTO.dtype)
        rows = self.all_rows(y_BTO)
        own_BTS = own_BTO if rows is None else own_BTO.index_select(-1, rows)
        change_BTS = (gain_S - 1).to(y_BTO.dtype) * own_BTS + (gain_S * self.scale).to(y_BTO.dtype) * up_BTS
        y_BTO = y_BTO + change_BTS if rows is None else y_BTO.index_add(-1, rows, change_BTS)
        return y_BTO if self.bias is None else y_BTO + (self.bias - base.bias).to(y_BTO.dtype)

    def _ready(self, dtype: torch.dtype, output: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A, g s B and g - 1 in the dtypes of the activations."""
        gain_O = self.gain(self.norm(weight_OI(self.site.module)))
        B = (gain_O * self.scale)[:, None] * self.B
        return self.A.to(dtype), B.to(dtype), (gain_O - 1).to(output)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain_O = gain_S = self.gain(self.norm(weight_OI)).to(weight_OI.dtype)
        rows = self.all_rows(weight_OI)
        if rows is not None:
            gain_O = gain_S.new_ones(len(weight_OI)).index_copy(0, rows, gain_S)
        if self.bias is not None and bias_O is not None:
            bias_O = bias_O + (self.bias - self.site.module.bias.float())  # type: ignore[operator]
        return gain_O[:, None] * (weight_OI + self.scale * (self.full_B() @ self.A)), bias_O

    def all_rows(self, like: Tensor) -> Tensor | None:
        """The rows that are scaled, in the order of the magnitudes; None for all."""
        return torch.cat(self.rows).to(like.device) if self.rows else None


class EmbeddingDoRADelta(Magnitude, EmbeddingLoRADelta):
    """DoRA on an embedding: A (r, V), B (D, r), magnitude (D)."""

    def __init__(self, site: Site, rank: int, scale: float, init: str) -> None:
        super().__init__(site, rank, scale, init)
        self.start()

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        gain_D = self.gain(self.base_norm())
        up_BTD = F.linear(F.embedding(x_BTI, self.A.T), self.B)
        change_BTD = gain_D * (self.scale * embed_scale(self.site.module)) * up_BTD
        return y_BTO + (gain_D - 1).to(y_BTO.dtype) * y_BTO + change_BTD.to(y_BTO.dtype)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain_D = self.gain(self.norm(weight_OI)).to(weight_OI.dtype)
        return gain_D[:, None] * (weight_OI + self.scale * (self.B @ self.A)), bias_O


@torch.no_grad()
def row_norms(weight_OI: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """||W + s B A|| of each row (O), in the dtype of A, without a second (O, I) matrix.

    The sum is taken before the square: ||W||^2 + 2 s <W, BA> + s^2 ||BA||^2 has as many products, and loses the digits
    of rows that nearly cancel.
    """
    with autocast(weight_OI.device, None):
        if weight_OI.stride(0) >= weight_OI.stride(1):
            count = max(1, PIECE // weight_OI.shape[1])
            pieces = zip(weight_OI.split(count), B.split(count), strict=True)
            return torch.cat([_length(torch.addmm(W.to(A.dtype), b, A, alpha=scale)) for W, b in pieces])
        count = max(1, PIECE // weight_OI.shape[0])
        pieces = zip(weight_OI.split(count, 1), A.split(count, 1), strict=True)
        parts = [_length(torch.addmm(W.to(A.dtype), B, a, alpha=scale)) for W, a in pieces]
        return _length(torch.stack(parts, 1))


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)
