"""(IA)^3: learned vectors that scale keys, values and the feed-forward's inside (Liu et al. 2022, arXiv 2205.05638).

    k = l_k * (W_k x + b_k),   v = l_v * (W_v x + b_v),   y = W_2 (l_ff * gamma(W_1 x)) + b_2

The vectors start at ones: l_k, l_v have the length of the output y_BTO (O = K d for grouped heads), l_ff that of the
input x_BTI. On a fused qkv only the parts that are asked have a vector. We differ from peft where it departs from the
paper (it scales queries in fused models, and queries instead of keys in some others): `peft_compat=True` takes peft's
targets if none are given, and one vector for the whole of a fused linear.

Shape legend: B rows, T tokens, I in, O out, S scaled features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft import roles
from graft.errors import SiteError
from graft.method import SCALE, Build, Delta, Method
from graft.roles import Site
from graft.weights import is_embedding, is_linear


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Learned scales of activations (Liu et al. 2022, arXiv 2205.05638); one vector (O) or (I) per site.

    Args:
        targets: roles, module names, or a regex as one string.
        exclude: roles or module names to leave out.
        feedforward: those of the targets whose input (I) is scaled, not the output (O); the same forms.

    Raises:
        SiteError: a target has no weight, or is one half of a fused linear whose input would be scaled for both.
    """

    targets: tuple[str, ...] | str = ("attention.key", "attention.value", "ffn.down")
    exclude: tuple[str, ...] | str = ()
    feedforward: tuple[str, ...] | str = ("ffn.down",)

    name: ClassVar[str] = "ia3"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "IA3"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2205.05638"
    trains: ClassVar[str] = "2 K d + F per layer"

    def sites(self, build: Build) -> list[Site]:
        return Method.sites(self.meant(build), build)

    def delta(self, site: Site, build: Build) -> Delta:
        if not (is_linear(site.module) or is_embedding(site.module)):
            raise SiteError(f"{site.path}: IA3 scales linears, and {type(site.module).__name__} is none; exclude it")
        meant = self.meant(build)
        parts = () if build.peft_compat else roles.parts_asked(site, meant.targets)
        if roles.fits(site, meant.feedforward):
            if parts or is_embedding(site.module):
                raise SiteError(f"{site.path}: its input cannot be scaled for {', '.join(parts) or 'ids'} alone")
            return InputScaleDelta(site.in_features, like=_weight(site))
        rows = [roles.part_rows(site, part, build.model.config) for part in parts]
        return OutputScaleDelta(site.out_features, torch.cat(rows) if rows else None, like=_weight(site))

    def meant(self, build: Build) -> IA3:
        """This method, with peft's targets if its form is asked and the targets are at their defaults."""
        if not build.peft_compat or (self.targets, self.feedforward) != (IA3.targets, IA3.feedforward):
            return self
        targets, feedforward = roles.peft_scaled(build.model)
        return replace(self, targets=targets, feedforward=feedforward)


class InputScaleDelta(Delta):
    """One vector (I) over the site's input."""

    order = SCALE

    def __init__(self, size: int, *, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, device=like.device))

    def before(self, x_BTI: Tensor) -> Tensor:
        return x_BTI * self.scale.to(x_BTI.dtype)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight_OI * self.scale.float(), bias_O


class OutputScaleDelta(Delta):
    """One vector over the site's output, bias included: (O), or (S) over the rows of some parts of a fused linear."""

    order = SCALE

    def __init__(self, size: int, rows: Tensor | None, *, like: Tensor) -> None:
        super().__init__()
        self.size = size
        self.rows = rows
        self.scale = nn.Parameter(torch.ones(size if rows is None else len(rows), device=like.device))

    def full_scale(self) -> Tensor:
        """The vector over all outputs (O); 1 where no part is asked."""
        if self.rows is None:
            return self.scale
        return self.scale.new_ones(self.size).index_copy(0, self.rows.to(self.scale.device), self.scale)

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return y_BTO * self.full_scale().to(y_BTO.dtype)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale_O = self.full_scale().float()
        return weight_OI * scale_O[:, None], None if bias_O is None else bias_O * scale_O


def _weight(site: Site) -> Tensor:
    return site.module.weight  # type: ignore[return-value]
