"""Norm tuning: only the norms train (Zhao et al. 2023, arXiv 2312.11420).

    y = g' * (x - mean) / std + b'   (LayerNorm),   y = g' * x / rms   (RMSNorm);   x, y (B, T, D), g', b' (D)

A norm's trained copy, weight and bias where it has one, answers in its place; the original stays frozen beside it. The
copy computes in fp32. peft's LN_TUNING names fewer norms for some architectures (for Qwen2 one of three, for BART not
the one behind the embeddings) and none for others: `peft_compat=True` takes peft's if no targets are given.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graft import vocabulary
from graft.errors import SiteError
from graft.method import Build, CopyDelta, Delta, Method
from graft.roles import Site
from graft.vocabulary import kind_of


@dataclass(frozen=True, kw_only=True)
class NormTuning(Method):
    """LayerNorms and RMSNorms train (Zhao et al. 2023, arXiv 2312.11420); (D), or 2 (D) with a bias, for each.

    Args:
        targets: roles ("norm" is every norm, "norm.final" one kind), module names, or a regex as one string.
        exclude: roles or module names to leave out.

    Raises:
        SiteError: a target is no norm, or peft's choice is asked where peft has none.
    """

    targets: tuple[str, ...] | str = ("norm",)
    exclude: tuple[str, ...] | str = ()

    name: ClassVar[str] = "norm_tuning"
    place: ClassVar[str] = "module"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LN_TUNING"
    paper: ClassVar[str] = "Zhao et al. 2023, arXiv 2312.11420"
    trains: ClassVar[str] = "D per norm, 2 D with a bias"

    def sites(self, build: Build) -> list[Site]:
        return Method.sites(self.meant(build), build)

    def delta(self, site: Site, build: Build) -> Delta:
        if kind_of(site.module) != "norm":
            what = f"{type(site.module).__name__} is none"
            raise SiteError(f"{site.path}: NormTuning trains norms, and {what}; exclude it, or give modules_to_save")
        return NormDelta(site.module)

    def meant(self, build: Build) -> NormTuning:
        """This method, with peft's targets if its form is asked and the targets are at their defaults."""
        if not build.peft_compat or self.targets != NormTuning.targets:
            return self
        names = vocabulary.peft_norms(getattr(build.model, "config", None))
        if names is None:
            raise SiteError(f"peft names no norms for {type(build.model).__name__}: give target_modules")
        return replace(self, targets=names)


class NormDelta(CopyDelta):
    """A trained copy of a norm, which answers in its place."""
