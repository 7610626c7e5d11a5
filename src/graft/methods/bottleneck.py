"""Bottleneck adapters: a small MLP per sub-layer (Houlsby et al. 2019, arXiv 1902.00751).

    houlsby    A(h) = h + s (W_up f(W_down h + b_down) + b_up), on the result h of the attention's output projection,
               of the cross-attention's (`cross`) and of the feed-forward
    pfeiffer   (Pfeiffer et al. 2021, arXiv 2005.00247) after the feed-forward u = FFN(...) only; h1 is what entered it
               pre-norm:  h2 = h1 + u + s Up f(Down(h1 + u))
               post-norm: h2 = LN2(u + s Up f(Down z) + h1),  z = LN2(u + h1),  LN2 frozen, used twice
    parallel   (He et al. 2022, arXiv 2110.04366) beside the feed-forward, on its own input n: FFN(n) + s Up f(Down n)

W_down (S, D), W_up (D, S); each adapter has 2 S D + D + S values. Houlsby and Pfeiffer start near the identity (both
matrices truncated normal, std 1e-3), parallel at it (W_up zero). Houlsby trains copies of all norms, as its code does.

We differ in this: adapters act before the dropout of their sub-layer, not behind it; and where a second norm stands
between a sub-layer and the residual sum (Gemma 2), h and u are what the sub-layer gives, so that norm sees the adapted
value. Mixtral's experts are routed, so its adapters act on the whole feed-forward's result.

Shape legend: B rows, T tokens, D width, S bottleneck size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import roles
from graft.errors import ConfigError, SiteError
from graft.method import ADD, SERIAL, Build, CopyDelta, Delta, Method, nearest, parameter
from graft.roles import Site
from graft.vocabulary import container_of

KINDS = ("houlsby", "pfeiffer", "parallel")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
STD = 1e-3
"""Houlsby's start; 2e-2, as in BERT, would move the base too far over all layers."""
PARALLEL_SCALE = 4.0


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A small MLP per sub-layer (Houlsby et al. 2019, arXiv 1902.00751); W_down (S, D), W_up (D, S).

    Args:
        size: S, at least 1 (0, a ratio rounded down on a tiny model, means 1).
        kind: "houlsby", "pfeiffer" (arXiv 2005.00247) or "parallel" (arXiv 2110.04366).
        activation: "gelu", "relu", "silu" (or "swish"), "tanh".
        train_norms: whether copies of the base's norms train along; None: with Houlsby only.
        scale: a fixed factor on what is added; None: 4 for parallel, else 1.
        cross: whether Houlsby also adapts cross-attention in encoder-decoders.

    Raises:
        ConfigError: an unknown kind or activation, or a negative size.
        SiteError: the model lacks a sub-layer that the kind needs.
    """

    size: int = 64
    kind: str = "houlsby"
    activation: str = "gelu"
    train_norms: bool | None = None
    scale: float | None = None
    cross: bool = True

    name: ClassVar[str] = "bottleneck"
    place: ClassVar[str] = "module"
    starts_equal: ClassVar[bool] = False
    peft_type: ClassVar[str] = "BOTTLENECK"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751"
    trains: ClassVar[str] = "2 S D + D + S per sub-layer; houlsby: the norms too"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 0:
            raise ConfigError(f"Bottleneck: size must not be negative, not {self.size}")
        for field, known in (("kind", KINDS), ("activation", ACTIVATIONS)):
            value = getattr(self, field)
            if value not in known:
                raise ConfigError(f"Bottleneck: {field}={value!r} is unknown; {nearest(value, known)}")
        # Only the parallel kind starts exactly at the base.
        object.__setattr__(self, "starts_equal", self.kind == "parallel")

    @property
    def factor(self) -> float:
        """What the added part is multiplied by."""
        return (PARALLEL_SCALE if self.kind == "parallel" else 1.0) if self.scale is None else self.scale

    def sites(self, build: Build) -> list[Site]:
        everything = roles.sites(build.model)
        paths = {role: {site.path for site in everything if site.role == role} for role in roles.ROLES}
        wholes, downs = paths["ffn"], paths["ffn.down"]
        if self.kind == "parallel":
            ends = wholes | {down for down in downs if not any(_inside(down, whole) for whole in wholes)}
        else:
            ends = downs | {whole for whole in wholes if not any(_inside(down, whole) for down in downs)}
        wanted = {"feed-forward": ends}
        if self.kind == "houlsby":
            wanted["attention.output"] = paths["attention.output"]
            if self.cross and paths["cross_attention"]:
                wanted["cross_attention.output"] = paths["cross_attention.output"]
        for what, found in wanted.items():
            if not found:
                raise SiteError(f"Bottleneck: {type(build.model).__name__} has no {what} that the vocabulary can name")
        chosen = set().union(*wanted.values())
        return roles.select(build.model, [site.path for site in everything if site.path in chosen], layers=self.layers)

    def delta(self, site: Site, build: Build) -> Delta:
        if self.kind == "houlsby":
            return HoulsbyDelta(site, self)
        beside = [other for other in roles.sites(build.model) if _block(other) == _block(site)]
        start = next((s.path for s in beside if s.role in ("ffn.up", "ffn.gate_up")), None)
        if self.kind == "parallel":
            return ParallelDelta(site, self, None if site.role == "ffn" else start)
        norm = next((other for other in beside if other.role == "norm.ffn"), None)
        if norm is None:
            raise SiteError(f"{site.path}: no norm of the feed-forward is known here, so Pfeiffer's form has no place")
        if roles.norm_order(build.model) == "pre":
            return StreamDelta(site, self, norm.path)
        return NormedDelta(site, self, None if site.role == "ffn" else start, norm.module)

    def extras(self, build: Build) -> list[tuple[Site, Delta]]:
        wanted = self.kind == "houlsby" if self.train_norms is None else self.train_norms
        if not wanted:
            return []
        return [(site, CopyDelta(site.module)) for site in roles.select(build.model, ("norm",), layers=self.layers)]


class BottleneckDelta(Delta):
    """The MLP: down (S, D) and its bias (S), up (D, S) and its bias (D)."""

    order = SERIAL

    def __init__(self, site: Site, method: Bottleneck) -> None:
        super().__init__()
        width, size = site.out_features, max(1, method.size)
        if not width:
            raise SiteError(f"{site.path}: the width of this module is not known")
        like = next(site.module.parameters())
        self.activation = ACTIVATIONS[method.activation]
        self.factor = method.factor
        self.down = parameter(size, width, like=like)
        self.down_bias = parameter(size, like=like)
        self.up = parameter(width, size, like=like)
        self.up_bias = parameter(width, like=like)
        if method.kind == "parallel":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        else:
            for weight in (self.down, self.up):
                nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD)

    def reads(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """What the MLP reads, from the site's (or the tapped module's) input and the sub-layer's result."""
        return y_BTO

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return y_BTO + self.added(self.reads(x_BTI, y_BTO))

    def added(self, x_BTD: Tensor) -> Tensor:
        """s (Up f(Down x)), in the dtype of x."""
        low = self.activation(F.linear(x_BTD, self.down.to(x_BTD.dtype), self.down_bias.to(x_BTD.dtype)))
        return self.factor * F.linear(low, self.up.to(x_BTD.dtype), self.up_bias.to(x_BTD.dtype))


class HoulsbyDelta(BottleneckDelta):
    """y + s Up f(Down y), on a sub-layer's result y."""


class ParallelDelta(BottleneckDelta):
    """y + s Up f(Down x), x the feed-forward's input."""

    order = ADD

    def __init__(self, site: Site, method: Bottleneck, tap: str | None) -> None:
        super().__init__(site, method)
        self.tap = tap

    def reads(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return x_BTI


class StreamDelta(BottleneckDelta):
    """y + s Up f(Down(x + y)), x the residual stream, which enters the norm before the feed-forward."""

    def __init__(self, site: Site, method: Bottleneck, tap: str) -> None:
        super().__init__(site, method)
        self.tap = tap

    def reads(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return x_BTI + y_BTO


class NormedDelta(BottleneckDelta):
    """y + s Up f(Down LN(x + y)), x the feed-forward's input, which is the residual stream of a post-norm block."""

    def __init__(self, site: Site, method: Bottleneck, tap: str | None, norm: nn.Module) -> None:
        super().__init__(site, method)
        self.tap = tap
        self.norm = [norm]  # in a list: the base owns it

    def reads(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        norm = self.norm[0]
        # The class's own forward: the hooks are for the block's call of the norm, not for this one.
        return type(norm).forward(norm, x_BTI + y_BTO)


def _inside(path: str, parent: str) -> bool:
    return path.startswith(f"{parent}.")


def _block(site: Site) -> str | None:
    """The path of the block in which a site stands."""
    return None if site.layer is None else f"{container_of(site.path)}.{site.layer}"
