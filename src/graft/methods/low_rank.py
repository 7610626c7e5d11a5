"""What methods share that add one product of low rank to a linear: dropout, asked rows of a fused linear, merging.

Where only some parts of a fused linear are asked, the pair writes to their rows (S of O) alone.

Shape legend: B rows, T tokens, I in, O out, R rank, S asked outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graft import roles
from graft.errors import ConfigError, SiteError
from graft.fast import low_rank
from graft.method import Build, Delta
from graft.roles import Site
from graft.weights import is_linear


class LowRankDelta(Delta):
    """Base of the deltas whose change is B A on some rows: a subclass gives `pair`.

    Vectors that scale stand in B's factor, so that autograd keeps A x (R numbers for a token) and no output; where A is
    frozen it keeps no input either.

    Args:
        site: a linear.
        rows: the asked rows (S) of a fused linear, None for all.
        dropout: on the input, in training.
    """

    def __init__(self, site: Site, rows: Tensor | None, dropout: float) -> None:
        super().__init__()
        self.site = site
        self.rows = rows
        self.dropout = dropout

    @property
    def size(self) -> int:
        """S, how many outputs it acts on."""
        return self.site.out_features if self.rows is None else len(self.rows)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (S, R) whose product is the whole change of the asked rows, in fp32."""
        raise NotImplementedError(type(self).__name__)

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        x = F.dropout(x_BTI, self.dropout, self.training)
        A, B = (factor.to(x.dtype) for factor in self.pair())
        change_BTS = F.linear(F.linear(x, A), B).to(y_BTO.dtype)
        if self.rows is None:
            return y_BTO + change_BTS
        return y_BTO.index_add(-1, self.rows.to(y_BTO.device), change_BTS)

    def into(self, x_BTI: Tensor, y_BTO: Tensor, weight: float) -> Tensor | None:
        if type(self).after is not LowRankDelta.after:
            return None
        dropped = F.dropout(x_BTI, self.dropout) if self.dropout > 0 and self.training else None
        A, B = self.factors()
        return low_rank.add(self.site.module, x_BTI, y_BTO, A, B, weight, dropped)

    def spread(self, values_S: Tensor) -> Tensor:
        """Values of the asked rows over all rows (O, ...), zero in the others."""
        if self.rows is None:
            return values_S
        full_O = values_S.new_zeros(self.site.out_features, *values_S.shape[1:])
        return full_O.index_copy(0, self.rows.to(values_S.device), values_S)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.pair()
        return A, self.spread(B)

    def weight_delta(self) -> Tensor:
        A, B = self.factors()
        return B.float() @ A.float()


def asked_rows(site: Site, targets: roles.Targets, build: Build, name: str) -> Tensor | None:
    """The rows of the parts that `targets` mean at a fused site; None for the whole, as peft always has it.

    Raises:
        SiteError: the site is no linear.
    """
    if not is_linear(site.module):
        raise SiteError(f"{site.path}: {name} acts on linears, and {type(site.module).__name__} is none; exclude it")
    parts = () if build.peft_compat else roles.parts_asked(site, targets)
    rows = [roles.part_rows(site, part, build.model.config) for part in parts]
    return torch.cat(rows) if rows else None


def check_rank(name: str, rank: int, dropout: float) -> None:
    """Refuse a rank or a dropout that is out of range.

    Raises:
        ConfigError: one of them is.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{name}: rank must be an integer of at least 1, not {rank!r}")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"{name}: dropout must be in [0, 1), not {dropout}")
