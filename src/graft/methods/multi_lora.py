"""MultiLoRA: n parallel low-rank sums, each with a learned scale (Wang et al. 2023, arXiv 2311.11501).

    y = W x + b + (alpha / r) * sum_i s_i * (B_i A_i dropout(x)),   i = 1 ... n

A (n, r, I) and B (n, O, r) are both kaiming uniform, over I and over r; the scales s (n, O) start at zero, so the model
starts as the base. In the first step only s moves. `per_output=False` takes one s_i (n) for a whole module. In a fused
qkv of which some parts are asked, B and s have their rows alone, and the parts share A.

Shape legend: B rows, T tokens, I in, O out, N modules, R rank, S asked outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from graft.errors import ConfigError
from graft.method import Build, Delta, Method, parameter
from graft.methods.low_rank import LowRankDelta, asked_rows, check_rank
from graft.roles import Site


@dataclass(frozen=True, kw_only=True)
class MultiLoRA(Method):
    """n parallel LoRA modules with learned scales on linears (Wang et al. 2023, arXiv 2311.11501).

    Args:
        rank: r of each module; the count per site is n * (r * (in + out) + out): A (n, r, I), B (n, O, r), s (n, O).
        count: n.
        alpha: the factor on the sum is alpha / rank.
        per_output: a scale for each output; else one for each module.
        dropout: on the input only, while training.
        targets: roles, module names, "all-linear", or a regex as one string.
        exclude: roles or module names to leave out.

    Raises:
        ConfigError: a value out of range.
        SiteError: a target is no linear.
    """

    rank: int = 8
    count: int = 3
    alpha: float = 16
    per_output: bool = True
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    exclude: tuple[str, ...] | str = ()

    name: ClassVar[str] = "multi_lora"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2311.11501"
    trains: ClassVar[str] = "n (r (I + O) + O) per linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("MultiLoRA", self.rank, self.dropout)
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ConfigError(f"MultiLoRA: count must be an integer of at least 1, not {self.count!r}")
        if self.alpha == 0 or not math.isfinite(self.alpha):
            raise ConfigError(f"MultiLoRA: alpha must be a finite number and not 0, not {self.alpha}")

    def delta(self, site: Site, build: Build) -> Delta:
        return MultiLoRADelta(site, self, asked_rows(site, self.targets, build, "MultiLoRA"))


class MultiLoRADelta(LowRankDelta):
    """The modules of one linear: lora_A (N, R, I), lora_B (N, S, R), lora_scaling (N, S) or (N, 1)."""

    def __init__(self, site: Site, method: MultiLoRA, rows: Tensor | None) -> None:
        super().__init__(site, rows, method.dropout)
        weight: Tensor = site.module.weight  # type: ignore[assignment]
        count, rank = method.count, method.rank
        self.factor = method.alpha / rank
        self.lora_A = parameter(count, rank, site.in_features, like=weight)
        self.lora_B = parameter(count, self.size, rank, like=weight)
        # One axis: trainers decay what has more, and decay would pull the scales back to their start.
        self.lora_scaling = parameter(count * (self.size if method.per_output else 1), like=weight)
        for one in (*self.lora_A.data, *self.lora_B.data):
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))

    def scaling(self) -> Tensor:
        """s as (N, S), or (N, 1)."""
        return self.lora_scaling.view(len(self.lora_A), -1)

    def kept(self) -> dict[str, Tensor]:
        return super().kept() | {"lora_scaling": self.scaling()}

    def pair(self) -> tuple[Tensor, Tensor]:
        B_NSR = self.factor * self.scaling()[..., None] * self.lora_B
        return self.lora_A.flatten(0, 1), B_NSR.transpose(0, 1).flatten(1)
