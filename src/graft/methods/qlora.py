"""QLoRA: LoRA on every linear of a base in 4 bits (Dettmers et al. 2023, arXiv 2305.14314).

    y = x dequant(W)^T + s x A^T B^T,   A (R, I), B (O, R)

W stays as NF4 codes with double-quantized scales, 4.127 bits for each value; gradients flow through the dequantized
weight to x, never to W. It is LoRA with the paper's settings, and it refuses a base that is not quantized: there LoRA
itself is the same method.

Shape legend: I in, O out, R rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from graft.errors import ConfigError
from graft.method import Build, Method
from graft.methods.lora import LoRA
from graft.roles import Site
from graft.weights import quantized


@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """LoRA on a quantized base with the paper's settings (Dettmers et al. 2023, arXiv 2305.14314); A (R, I), B (O, R).

    Args:
        rank, alpha, dropout, targets: as LoRA's; 64, 16, 0.1 and every linear.

    Raises:
        ConfigError: a value out of range, or a base that is not quantized.
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.1
    targets: tuple[str, ...] | str = "all-linear"

    name: ClassVar[str] = "qlora"
    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv 2305.14314"

    def sites(self, build: Build) -> list[Site]:
        found = super().sites(build)
        if not any(quantized(site.module) for site in found):
            raise ConfigError(
                "QLoRA: the base is not quantized; load it in precision nf4 or int8, or take LoRA, which is the same "
                "method on a plain base"
            )
        return found

    def saved_as(self, adapter: Any) -> Method:
        """LoRA: a folder may be loaded on the base in another precision."""
        plain = super().saved_as(adapter)
        return LoRA(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(LoRA)})
