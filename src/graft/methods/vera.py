"""VeRA: one frozen random pair for all linears, two trained vectors for each (Kopiczko et al. 2023, arXiv 2310.11454).

    y = W x + b + lambda_b * (B (lambda_d * (A dropout(x))))

A (r, I) and B (O, r) are slices of one pair: A (r, largest I), B (largest O, r), both kaiming uniform over their
columns with gain sqrt(2), drawn from a seed. lambda_b (O) starts at zero, lambda_d (r) at `d_initial`. The pair is
stored with the adapter, because a seed need not give the same numbers everywhere. In a fused qkv of which some parts
are asked, lambda_b has their rows alone.

Shape legend: B rows, T tokens, I in, O out, R rank, S asked outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.errors import ConfigError
from graft.method import Build, Delta, Method, parameter
from graft.methods.low_rank import LowRankDelta, asked_rows, check_rank
from graft.roles import Site


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vector-based random matrix adaptation of linears (Kopiczko et al. 2023, arXiv 2310.11454); (r) and (O) per site.

    Args:
        rank: r; the count per site is r + out.
        d_initial: where lambda_d starts.
        seed: of the shared pair (peft's `projection_prng_key`).
        dropout: on the input of A only, while training.
        targets: roles, module names, "all-linear", or a regex as one string.
        exclude: roles or module names to leave out.

    Raises:
        ConfigError: a value out of range.
        SiteError: a target is no linear.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ("attention.query", "attention.value")
    exclude: tuple[str, ...] | str = ()

    name: ClassVar[str] = "vera"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "VERA"
    paper: ClassVar[str] = "Kopiczko et al. 2023, arXiv 2310.11454"
    trains: ClassVar[str] = "r + O per linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("VeRA", self.rank, self.dropout)
        if self.d_initial == 0:
            raise ConfigError("VeRA: d_initial=0 would never train: both vectors would start at zero")
        if not math.isfinite(self.d_initial):
            raise ConfigError(f"VeRA: d_initial must be a finite number, not {self.d_initial}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"VeRA: seed must be an integer from 0 to 2**63 - 1, not {self.seed!r}")

    def shared(self, sites: list[Site], build: Build) -> nn.Module:
        for site in sites:
            asked_rows(site, self.targets, build, "VeRA")  # refuses what is no linear before sizes are read
        widest = max(site.in_features for site in sites), max(site.out_features for site in sites)
        return Projection(self.rank, *widest, self.seed, like=_weight(sites[0]))

    def delta(self, site: Site, build: Build) -> Delta:
        return VeRADelta(site, self, asked_rows(site, self.targets, build, "VeRA"))


class Projection(nn.Module):
    """The frozen pair that all sites share: A (r, I) and B (O, r), I and O the largest of any site."""

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, in_features: int, out_features: int, seed: int, *, like: Tensor) -> None:
        super().__init__()
        shapes = {"A": (rank, in_features), "B": (out_features, rank)}
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = torch.empty(shape, device="meta" if like.is_meta else "cpu")
            bound = math.sqrt(6 / shape[1])
            if not like.is_meta:
                value.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, value.to(like.device))


class VeRADelta(LowRankDelta):
    """The vectors of one linear: lambda_b (S) and lambda_d (R); S is O unless parts of a fused linear are asked."""

    def __init__(self, site: Site, method: VeRA, rows: Tensor | None) -> None:
        super().__init__(site, rows, method.dropout)
        self.lambda_b = parameter(self.size, like=_weight(site))
        self.lambda_d = parameter(method.rank, like=_weight(site))
        nn.init.constant_(self.lambda_d, method.d_initial)

    def slices(self) -> tuple[Tensor, Tensor]:
        """This site's A (R, I) and B (S, R)."""
        shared = self.shared
        assert isinstance(shared, Projection)
        device = self.lambda_b.device
        B = shared.B[: self.site.out_features] if self.rows is None else shared.B[self.rows.to(shared.B.device)]
        return shared.A[:, : self.site.in_features].to(device), B.to(device)

    def pair(self) -> tuple[Tensor, Tensor]:
        A, B = self.slices()
        return A, self.lambda_b[:, None] * B * self.lambda_d


def _weight(site: Site) -> Tensor:
    return site.module.weight  # type: ignore[return-value]
