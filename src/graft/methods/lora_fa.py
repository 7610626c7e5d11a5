"""LoRA-FA: LoRA whose A stays as it was drawn (Zhang et al. 2023, arXiv 2308.03303).

    y = W x + b + s * B A dropout(x),   s = alpha / r (rsLoRA: alpha / sqrt(r));   only B (O, r) trains

The gradient of B needs A x (r numbers for a token) and not x (I numbers), so autograd keeps no x for the adapter.
With `projected`, the gradient of B is replaced before each step by

    (1 / s^2) g_B (A A^T + 1e-8 I)^-1

after which s g_B' A is the gradient of the whole weight, projected on the rows of A (the paper's later version). The
inverse is computed once, in fp32. A clipped gradient is projected as it is, as in peft's `LoraFAOptimizer`.

Shape legend: I in, O out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graft.errors import ConfigError, SiteError
from graft.method import Delta
from graft.methods.lora import LoRA, LoRADelta
from graft.roles import Site

STARTS = ("kaiming", "gaussian", "random")
DAMPING = 1e-8


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA with a frozen A (r, I) on linears (Zhang et al. 2023, arXiv 2308.03303); r * out values train per site.

    Its other settings are LoRA's, without `b_ratio`, which compares the rates of A and B.

    Args:
        projected: project the gradient of B in each step; it needs `GraftTrainer` or `graft train`.

    Raises:
        ConfigError: a value out of range, or a start that changes the base.
        SiteError: a target is an embedding, or a projected A has more rows than columns.
    """

    projected: bool = False

    name: ClassVar[str] = "lora_fa"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2308.03303"
    trains: ClassVar[str] = "r O per linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.b_ratio != 1.0:
            raise ConfigError("LoRAFA: b_ratio compares the rates of A and B, and A does not train; leave it off")
        if self.init not in STARTS:
            raise ConfigError(f"LoRAFA: init is one of {', '.join(STARTS)}, not {self.init!r}")

    def on_linear(self, site: Site, rank: int, scale: float, rows: list[Tensor]) -> Delta:
        if self.projected and rank > site.in_features:
            raise SiteError(
                f"{site.path}: a rank of {rank} over {site.in_features} inputs cannot be projected; lower it"
            )
        return LoRAFADelta(site, self, rank, scale, rows)

    def on_embedding(self, site: Site, rank: int, scale: float) -> Delta:
        raise SiteError(f"{site.path}: the A of an embedding starts at zero, and a frozen zero never acts; exclude it")

    def before_step(self, adapter: Any, step: int, steps: int) -> None:
        if self.projected:
            for _, delta in adapter.items():
                if isinstance(delta, LoRAFADelta):
                    delta.project()


class LoRAFADelta(LoRADelta):
    """The pair of one linear: A (n r, I), a buffer, and the parameter B (O, r); n as in LoRA."""

    def __init__(self, site: Site, method: LoRA, rank: int, scale: float, rows: list[Tensor]) -> None:
        super().__init__(site, method, rank, scale, rows)
        A = self.A.detach()
        del self.A
        self.register_buffer("A", A)
        self.inverse: tuple[tuple[int, int], Tensor] | None = None

    @torch.no_grad()
    def project(self) -> None:
        """Replace the gradient of B by its projected form; nothing if there is none."""
        if self.B.grad is None:
            return
        inverse_NRR = self._inverse()
        sizes = [len(rows) for rows in self.rows] or [len(self.B)]
        blocks = zip(self.B.grad.split(sizes), inverse_NRR, strict=True)
        self.B.grad.copy_(torch.cat([block.float() @ inverse for block, inverse in blocks]))

    def _inverse(self) -> Tensor:
        """(A A^T + 1e-8 I)^-1 / s^2 of each part, (N, R, R); kept until A is replaced, as by a checkpoint."""
        now = self.A.data_ptr(), self.A._version
        if self.inverse is None or self.inverse[0] != now:
            A_NRI = self.A.float().view(-1, self.rank, self.A.shape[1])
            gram_NRR = A_NRI @ A_NRI.transpose(1, 2)
            damped_NRR = gram_NRR + DAMPING * torch.eye(self.rank, device=gram_NRR.device)
            self.inverse = now, torch.linalg.inv(damped_NRR) / self.scale**2
        return self.inverse[1]
