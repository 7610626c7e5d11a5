"""Tied-LoRA: one low-rank pair for all layers, two vectors for each (Renduchintala et al. 2023, arXiv 2311.09578).

    y = W x + b + v * (B (u * (A dropout(x))))

A (r, I) and B (O, r) are shared by the same module of all layers; u (r) and v (O) belong to one layer. The paper
adapts a fused qkv, so its A and u serve queries, keys and values: where these are linears of their own, `share_A` gives
them one A, and one u in each layer, for the paper's count 4 d r + L (r + 3 d). Alpha is r, so there is no scale.

Each of A, B and (u, v) may be frozen. The paper does not say how they start; here u is one, and if B trains, B is zero
and v one. If B is frozen, it is random and v is zero; if then u, v do not train either, they are one and A is zero.
Each start is the base, and none is one that no gradient could leave. What is not zero is Xavier normal.

In a fused qkv of which some parts are asked, B and v have their rows alone.

Shape legend: B rows, T tokens, I in, O out, R rank, S asked outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.errors import ConfigError, SiteError
from graft.method import Build, Delta, Method, parameter
from graft.methods.low_rank import LowRankDelta, asked_rows, check_rank
from graft.roles import Site

SHARING = ("attention.query", "attention.key", "attention.value")
"""Roles that read one input, so that one A can serve them."""


@dataclass(frozen=True, kw_only=True)
class TiedLoRA(Method):
    """One low-rank pair for all layers (Renduchintala et al. 2023, arXiv 2311.09578); A (r, I), B (O, r), u (r), v (O).

    Args:
        rank: r.
        train_A, train_B: whether the shared matrices train, or stay as they start.
        train_uv: whether each layer has its vectors u and v; else they are one.
        share_A: one A for the query, key and value of a self-attention, and one u in each layer; else one for each.
        dropout: on the input of A only, while training.
        targets: roles, module names, "all-linear", or a regex as one string.
        exclude: roles or module names to leave out.

    Raises:
        ConfigError: a value out of range, or nothing is left to train.
        SiteError: a target is no linear, or modules that would share a matrix have other shapes.
    """

    rank: int = 8
    train_A: bool = True
    train_B: bool = True
    train_uv: bool = True
    share_A: bool = True
    dropout: float = 0.0
    targets: tuple[str, ...] | str = SHARING
    exclude: tuple[str, ...] | str = ()

    name: ClassVar[str] = "tied_lora"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    paper: ClassVar[str] = "Renduchintala et al. 2023, arXiv 2311.09578"
    trains: ClassVar[str] = "r (I + O) + L (r + O), O of query, key and value together"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("TiedLoRA", self.rank, self.dropout)
        if not (self.train_A or self.train_B or self.train_uv):
            raise ConfigError("TiedLoRA: nothing would train; set one of train_A, train_B and train_uv")

    def shared(self, sites: list[Site], build: Build) -> nn.Module:
        shapes_A: dict[str, Tied] = {}
        shapes_B: dict[str, Tied] = {}
        vectors: dict[str, Tensor] = {}
        for site in sites:
            rows = asked_rows(site, self.targets, build, "TiedLoRA")
            size = site.out_features if rows is None else len(rows)
            _tie(shapes_A, self.group_A(site), (self.rank, site.in_features), site)
            _tie(shapes_B, group(site), (size, self.rank), site)
            if self.train_uv:
                vectors.setdefault(self.group_u(site), _weight(site))
        return TiedMatrices(self, shapes_A, shapes_B, vectors)

    def delta(self, site: Site, build: Build) -> Delta:
        return TiedLoRADelta(site, self, asked_rows(site, self.targets, build, "TiedLoRA"))

    def group_A(self, site: Site) -> str:
        """What a site shares its A with."""
        return _attention(group(site)) if self.shares(site) else group(site)

    def group_u(self, site: Site) -> str:
        """What a site shares its u with."""
        path = site.path.replace(".", "/")
        return _attention(path) if self.shares(site) else path

    def shares(self, site: Site) -> bool:
        """Whether it shares A and u with the other projections of its self-attention."""
        return self.share_A and site.role in SHARING


Tied = tuple[tuple[int, int], Site]
"""A matrix's shape, and the first site that asked for it."""


def group(site: Site) -> str:
    """The path without the layer's number, "/" for "."; the same for one module of all layers."""
    parts = site.path.split(".")
    if site.layer is not None:
        parts.remove(str(site.layer))  # the first number is the layer's
    return "/".join(parts)


class TiedMatrices(nn.Module):
    """A and B of each group, and the u of each layer; parameters if they train, else buffers."""

    def __init__(
        self, method: TiedLoRA, shapes_A: dict[str, Tied], shapes_B: dict[str, Tied], vectors: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.A, self.B, self.u = Named(), Named(), Named()
        zero_A = not (method.train_B or method.train_uv)
        for matrices, shapes, trains, zero in (
            (self.A, shapes_A, method.train_A, zero_A),
            (self.B, shapes_B, method.train_B, method.train_B),
        ):
            for name, (shape, site) in shapes.items():
                matrix = parameter(*shape, like=_weight(site))
                if not zero:
                    nn.init.xavier_normal_(matrix)
                matrices.keep(name, matrix, trains)
        for name, like in vectors.items():
            self.u.keep(name, nn.Parameter(torch.ones(method.rank, device=like.device)), True)


class Named(nn.Module):
    """Tensors by name."""

    def keep(self, name: str, value: nn.Parameter, trains: bool) -> None:
        """Own one more: a parameter if it trains, else a buffer."""
        if trains:
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value.detach())

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None."""
        return self._parameters.get(name, self._buffers.get(name))


class TiedLoRADelta(LowRankDelta):
    """One linear's view of the shared matrices, and its own v (S), `tied_v`; S is O unless parts are asked."""

    def __init__(self, site: Site, method: TiedLoRA, rows: Tensor | None) -> None:
        super().__init__(site, rows, method.dropout)
        self.names = method.group_A(site), group(site), method.group_u(site)
        self.tied_v = parameter(self.size, like=_weight(site)) if method.train_uv else None
        if self.tied_v is not None and method.train_B:
            nn.init.ones_(self.tied_v)

    def pair(self) -> tuple[Tensor, Tensor]:
        shared = self.shared
        assert isinstance(shared, TiedMatrices)
        A, B, u = shared.A.get(self.names[0]), shared.B.get(self.names[1]), shared.u.get(self.names[2])
        assert A is not None and B is not None
        device = self.site.module.weight.device
        A, B = A.to(device), B.to(device)  # type: ignore[arg-type]
        if u is not None and self.tied_v is not None:
            B = self.tied_v[:, None] * B * u.to(device)  # type: ignore[arg-type]
        return A, B


def _tie(shapes: dict[str, Tied], name: str, shape: tuple[int, int], site: Site) -> None:
    known, first = shapes.setdefault(name, (shape, site))
    if known != shape:
        raise SiteError(
            f"TiedLoRA: {site.path} cannot share a matrix with {first.path}: they need {_by(shape)} and {_by(known)}; "
            "exclude one of them, or name its layers"
        )


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _attention(path: str) -> str:
    """What stands around a projection."""
    return path.rpartition("/")[0]


def _weight(site: Site) -> Tensor:
    return site.module.weight  # type: ignore[return-value]
