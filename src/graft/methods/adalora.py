"""AdaLoRA: a rank for each weight, given out by importance while training (Zhang et al. 2023, arXiv 2303.10512).

    y = W x + b + s * B (E * (A dropout(x))),   s = alpha / rank

A (R, I) and B (O, R) start at N(0, 0.02), E (R, 1) at zero. (A_i, E_i, B_i) is a triplet. The loss gains gamma times
the mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F. After each optimizer step, for each value w of A, E, B:

    I = |w * grad|,   Ibar = beta1 Ibar + (1 - beta1) I,   Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|
    score of triplet i = E_i's Ibar Ubar + mean of A_i's + mean of B_i's

and the E of all triplets of the adapter but the best `budget` are set to zero. The budget falls from rank to
target_rank (times the number of matrices) between `tinit` and `tfinal` steps before the end, by a cubic. A triplet can
come back until then; afterwards the choice stands. The file has what is left.

s stays alpha / rank (the start's) when ranks fall, and has peft's 1e-5 beside the rank. Both are peft's.

Shape legend: B rows, T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import roles
from graft.errors import ConfigError, SiteError
from graft.fast import low_rank
from graft.method import Build, Delta, Method, parameter
from graft.roles import Site
from graft.weights import is_linear

TRIPLET = ("A", "E", "B")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """LoRA whose ranks follow importance (Zhang et al. 2023, arXiv 2303.10512); A (R, I), E (R, 1), B (O, R).

    Args:
        rank: the rank of every matrix at the start.
        target_rank: their mean rank at the end.
        alpha: the factor on the sum is alpha / rank.
        dropout: on the input of A only, while training.
        targets: roles, module names, "all-linear", or a regex as one string; a fused linear is adapted whole.
        exclude: roles or module names to leave out.
        tinit: optimizer steps before the budget falls.
        tfinal: optimizer steps at the end, in which the choice stands.
        delta_t: steps between two choices.
        steps: optimizer steps that the schedule spans; None for those of the training.
        beta1, beta2: smoothing of importance and of its uncertainty.
        gamma: weight of the orthogonality term.
        rank_pattern: which triplets are there, by the site's path; a loaded folder has it.

    Raises:
        ConfigError: a value out of range, or a schedule that does not fit into the training.
        SiteError: a target that is no linear, or part of a fused one.
    """

    rank: int = 12
    target_rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    exclude: tuple[str, ...] | str = ()
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.5
    rank_pattern: dict[str, Sequence[bool]] = field(default_factory=dict)

    name: ClassVar[str] = "adalora"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "ADALORA"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2303.10512"
    trains: ClassVar[str] = "r (I + 1 + O) per linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target_rank <= self.rank:
            raise ConfigError(f"AdaLoRA: target_rank must be from 1 to rank ({self.rank}), not {self.target_rank}")
        if self.alpha == 0 or not math.isfinite(self.alpha):
            raise ConfigError(f"AdaLoRA: alpha must be a finite number and not 0, not {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"AdaLoRA: dropout must be in [0, 1), not {self.dropout}")
        for key, least in (("tinit", 0), ("tfinal", 0), ("delta_t", 1), ("gamma", 0)):
            if not least <= getattr(self, key) < math.inf:
                raise ConfigError(f"AdaLoRA: {key} must be at least {least}, not {getattr(self, key)}")
        for key in ("beta1", "beta2"):
            if not 0.0 < getattr(self, key) < 1.0:
                raise ConfigError(f"AdaLoRA: {key} must be in (0, 1), not {getattr(self, key)}")
        if self.steps is not None and self.tinit >= self.steps - self.tfinal:
            raise ConfigError(f"AdaLoRA: tinit {self.tinit} and tfinal {self.tfinal} leave none of {self.steps} steps")
        for path, mask in self.rank_pattern.items():
            if len(mask) != self.rank or not all(isinstance(each, bool) for each in mask):
                raise ConfigError(f"AdaLoRA: rank_pattern of {path!r} must be {self.rank} booleans, one a triplet")

    def sites(self, build: Build) -> list[Site]:
        found = super().sites(build)
        unknown = set(self.rank_pattern) - {site.path for site in found}
        if unknown:
            raise SiteError(f"rank_pattern: {min(unknown)!r} is none of the {len(found)} targets")
        return found

    def shared(self, sites: list[Site], build: Build) -> nn.Module:
        return Matrices(len(sites))

    def delta(self, site: Site, build: Build) -> Delta:
        if not is_linear(site.module):
            raise SiteError(f"{site.path}: AdaLoRA acts on linears, not {type(site.module).__name__}; exclude it")
        parts = () if build.peft_compat else roles.parts_asked(site, self.targets)
        if parts:
            raise SiteError(f"{site.path}: AdaLoRA adapts a fused linear whole; ask for {site.role}, not {parts[0]}")
        return AdaLoRADelta(site, self)

    # Training.

    def begin(self, adapter: Any, steps: int) -> None:
        total = self.steps or steps
        if total > steps:
            raise ConfigError(f"AdaLoRA: steps={total} do not fit into a training of {steps}; lower steps")
        if self.tinit >= total - self.tfinal:
            raise ConfigError(f"AdaLoRA: tinit {self.tinit} and tfinal {self.tfinal} leave none of {total} steps")

    def budget(self, step: int, total: int, count: int) -> int:
        """How many triplets of `count` matrices are left after a step of `total`."""
        first, last = self.rank * count, self.target_rank * count
        if step <= self.tinit:
            return first
        if step > total - self.tfinal:
            return last
        part = 1 - (step - self.tinit) / (total - self.tfinal - self.tinit)
        return int((first - last) * part**3 + last)

    @torch.no_grad()
    def after_step(self, adapter: Any, step: int, steps: int) -> None:
        deltas = matrices(adapter)
        total = self.steps or steps
        stands = total - self.tfinal
        if step < stands:
            for delta in deltas:
                delta.observe(self.beta1, self.beta2)
        if step == stands or step == steps - 1 < stands:  # without a tfinal, no step would come behind the schedule
            cut(deltas, self.target_rank * len(deltas))
        elif self.tinit < step < stands and step % self.delta_t == 0:
            cut(deltas, self.budget(step, total, len(deltas)))
        elif step > stands:
            for delta in deltas:
                delta.E.masked_fill_(~delta.mask[:, None], 0.0)

    def saved_as(self, adapter: Any) -> AdaLoRA:
        left = {site.path: delta.left() for site, delta in adapter.items() if isinstance(delta, AdaLoRADelta)}
        pattern: dict[str, Sequence[bool]] = {path: mask.tolist() for path, mask in left.items() if not mask.is_meta}
        whole = all(all(mask) for mask in pattern.values())
        return replace(self, rank_pattern={} if whole else pattern)


class Matrices(nn.Module):
    """How many adapted weights share one budget and one orthogonality term."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class AdaLoRADelta(Delta):
    """The triplets of one linear. `mask` (R) says which are there.

    Mask, importance and its uncertainty are buffers: checkpoints hold them, a saved folder does not.
    """

    mask: Tensor

    def __init__(self, site: Site, method: AdaLoRA) -> None:
        super().__init__()
        self.site = site
        self.scale = method.alpha / (method.rank + 1e-5)
        self.dropout = method.dropout
        self.gamma = method.gamma
        weight: Any = site.module.weight
        self.A = parameter(method.rank, site.in_features, like=weight)
        self.E = parameter(method.rank, 1, like=weight)
        self.B = parameter(site.out_features, method.rank, like=weight)
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        mask = torch.ones(method.rank, dtype=torch.bool, device=weight.device)
        if site.path in method.rank_pattern:
            mask = torch.tensor(list(method.rank_pattern[site.path]), device=weight.device)
            # What is not there must not come back: with neither A nor B, no gradient reaches E.
            self.A.data[~mask], self.B.data[:, ~mask] = 0.0, 0.0
        self.register_buffer("mask", mask)
        for name in TRIPLET:
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{name}_{kind}", torch.zeros_like(getattr(self, name), requires_grad=False))

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        x = F.dropout(x_BTI, self.dropout, self.training)
        down = F.linear(x, self.A.to(x.dtype)) * self.E.T.to(x.dtype)
        return y_BTO + (F.linear(down, self.B.to(x.dtype)) * self.scale).to(y_BTO.dtype)

    def into(self, x_BTI: Tensor, y_BTO: Tensor, weight: float) -> Tensor:
        dropped = F.dropout(x_BTI, self.dropout) if self.dropout > 0 and self.training else None
        return low_rank.add(self.site.module, x_BTI, y_BTO, self.E * self.A, self.B, weight * self.scale, dropped)

    def weight_delta(self) -> Tensor:
        return self.scale * (self.B.float() @ (self.E.float() * self.A.float()))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E * self.A, self.scale * self.B

    def penalty(self) -> Tensor:
        """This weight's part of the mean over the 2 n matrices A and B of the adapter."""
        assert isinstance(self.shared, Matrices)
        eye = torch.eye(len(self.E), device=self.E.device, dtype=self.E.dtype)
        distance = torch.linalg.matrix_norm(self.A @ self.A.T - eye) + torch.linalg.matrix_norm(self.B.T @ self.B - eye)
        return self.gamma / (2 * self.shared.count) * distance

    def kept(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TRIPLET}

    @property
    def saved_numel(self) -> int:
        return self.count * (self.site.in_features + 1 + self.site.out_features)

    @property
    def count(self) -> int:
        """How many triplets are left."""
        return len(self.mask) if self.mask.is_meta else int(self.left().sum())

    def left(self) -> Tensor:
        """Which triplets (R) a file must hold: those of the last choice, and what has come back since."""
        return self.mask | (self.E[:, 0] != 0)

    # Importance.

    def observe(self, beta1: float, beta2: float) -> None:
        """Take the values and gradients of this step into the averages."""
        for name in TRIPLET:
            value = getattr(self, name)
            now = torch.zeros_like(value) if value.grad is None else (value * value.grad).abs()
            importance, uncertainty = getattr(self, f"{name}_importance"), getattr(self, f"{name}_uncertainty")
            importance.mul_(beta1).add_(now, alpha=1 - beta1)
            uncertainty.mul_(beta2).add_((now - importance).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """The importance (R) of each triplet."""
        A, E, B = (getattr(self, f"{name}_importance") * getattr(self, f"{name}_uncertainty") for name in TRIPLET)
        return E[:, 0] + (A.mean(1) + B.mean(0))


def matrices(adapter: Any) -> list[AdaLoRADelta]:
    """The adapter's deltas that share its budget."""
    return [delta for _, delta in adapter.items() if isinstance(delta, AdaLoRADelta)]


def cut(deltas: list[AdaLoRADelta], budget: int) -> None:
    """Choose the triplets that stay, `budget` of them (fewer where scores are equal), and set the others' E to zero."""
    scores = [delta.scores() for delta in deltas]
    everything = torch.cat([score.to(scores[0].device) for score in scores])
    count = len(everything) - budget
    threshold = everything.kthvalue(count).values if count > 0 else everything.new_tensor(-1.0)
    for delta, score in zip(deltas, scores, strict=True):
        delta.mask.copy_(score > threshold.to(score.device))
        delta.E.masked_fill_(~delta.mask[:, None], 0.0)
