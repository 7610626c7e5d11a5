"""BitFit: only the bias vectors train (Ben Zaken et al. 2021, arXiv 2106.10199).

    y = W x + b',   and for a norm   y = g * normed(x) + b';   x (B, T, I), b' (O) starts at the base's b

Every bias of a linear or a norm has a trained copy beside the frozen original, so that adapters with other biases share
one base and mix in a batch; the paper trains them in place. The paper's smaller variant ("b_q, b_m2") has the query's
bias and that of the feed-forward's first linear; in a fused linear only the rows that are asked have a copy. What is
called a bias and is no vector behind a linear or a norm (T5's `relative_attention_bias`, a convolution's) stays.

Shape legend: B rows, T tokens, I in, O out, Q asked outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft import roles, vocabulary
from graft.errors import ConfigError, SiteError
from graft.method import Build, Delta, Method, inside
from graft.roles import Site
from graft.vocabulary import kind_of

BIASES = {"all": (), "query_ffn": ("attention.query", "ffn.up")}
"""What may train, and the roles of the linears that have it; none: every linear and norm."""


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Bias vectors train (Ben Zaken et al. 2021, arXiv 2106.10199); one (O) for each linear and norm that has one.

    Args:
        biases: "all", or "query_ffn" for those of the query and of the feed-forward's first linear.

    Raises:
        ConfigError: an unknown choice.
        SiteError: the model has no such biases.
    """

    biases: str = "all"

    name: ClassVar[str] = "bitfit"
    place: ClassVar[str] = "module"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "SUBSET"
    paper: ClassVar[str] = "Ben Zaken et al. 2021, arXiv 2106.10199"
    trains: ClassVar[str] = "O per linear or norm with a bias"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.biases not in BIASES:
            raise ConfigError(f"BitFit: biases is one of {', '.join(BIASES)}, not {self.biases!r}")

    def sites(self, build: Build) -> list[Site]:
        where = type(build.model).__name__
        wanted = BIASES[self.biases]
        every = roles.sites(build.model, unnamed=True)
        asked = [site for site in every if roles.fits(site, wanted)] if wanted else every
        heads = tuple(site.path for site in roles.task_heads(build.model))
        found = [site for site in asked if _has_bias(site.module) and not inside(site.path, heads)]
        for role in wanted:
            if not any(roles.fits(site, (role,)) for site in found):
                raise SiteError(f"BitFit: {where} has no bias at {role}, so there is nothing to train there")
        if not found:
            raise SiteError(f"BitFit: {where} has no biases at all; take another method, for example norm_tuning")
        routed = next((site.path for site in found if vocabulary.EXPERTS.search(site.path)), None)
        if routed is not None:
            raise SiteError(f"BitFit: {routed} is an expert that sees some tokens only, so no row's bias can act there")
        chosen = set(roles.select(build.model, tuple(site.path for site in found), layers=self.layers))
        kept = [site for site in found if site in chosen and not inside(site.path, self.modules_to_save)]
        if not kept:
            raise SiteError("BitFit: layers or modules_to_save leave no bias to train")
        return kept

    def delta(self, site: Site, build: Build) -> Delta:
        parts = roles.parts_asked(site, BIASES[self.biases]) if BIASES[self.biases] else ()
        rows = [roles.part_rows(site, part, build.model.config) for part in parts]
        return BitFitDelta(site.module, torch.cat(rows) if rows else None)


class BitFitDelta(Delta):
    """A trained bias (O), or (Q) for the rows of some parts of a fused linear, beside the frozen one: y + (b' - b)."""

    def __init__(self, module: nn.Module, rows: Tensor | None) -> None:
        super().__init__()
        self.module = [module]  # in a list: the base owns it
        self.rows = rows
        self.bias = nn.Parameter(self._own().clone())

    def _own(self) -> Tensor:
        """The base's values of what trains here, in fp32."""
        bias_O: Tensor = self.module[0].bias.detach().float()  # type: ignore[operator]
        return bias_O if self.rows is None else bias_O[self.rows.to(bias_O.device)]

    def change(self) -> Tensor:
        """b' - b over all outputs (O), in fp32; 0 in the rows of other parts."""
        change = self.bias - self._own()
        if self.rows is None:
            return change
        full_O = change.new_zeros(self.module[0].bias.shape)  # type: ignore[arg-type]
        return full_O.index_copy(0, self.rows.to(change.device), change)

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return y_BTO + self.change().to(y_BTO.dtype)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight_OI, None if bias_O is None else bias_O + self.change()


def _has_bias(module: nn.Module) -> bool:
    return kind_of(module) in ("linear", "norm") and isinstance(getattr(module, "bias", None), nn.Parameter)
